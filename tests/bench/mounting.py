"""How long a mount takes: from the start of the mount command until it has ended and the root has been listed.

A region's size and the number of its files should not matter: a mount must read what it needs, not all there is.
"""

from __future__ import annotations

import os
import time
from typing import Final, NamedTuple

from tests.bench.systems import GiB, System


class Case(NamedTuple):
    """What is mounted."""

    size: int  #: bytes of the filesystem, sparse
    files: int  #: empty files in it, 1000 to a directory

    @property
    def label(self) -> str:
        """First column of the table."""
        return f"mount, {self.size // GiB} GiB, {self.files:,} files"


CASES: Final = [Case(GiB, 100), Case(64 * GiB, 100), Case(2 * GiB, 100_000)]


def fill(system: System, case: Case) -> None:
    """Make a filesystem as `case` wants it, and leave it mounted."""
    system.prepare(case.size)
    system.mount()
    for number in range(case.files):
        folder = system.mnt / f"{number // 1000:03}"
        if number % 1000 == 0:
            folder.mkdir()
        os.close(os.open(folder / f"{number:06}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def measure(system: System) -> float:
    """Unmount, and mount again; return the milliseconds that the second took."""
    system.unmount()
    time.sleep(0.5)  # umount(8) may be back before the server has ended, whose time is not the next one's
    start = time.perf_counter()
    system.mount()
    os.listdir(system.mnt)
    return (time.perf_counter() - start) * 1e3
