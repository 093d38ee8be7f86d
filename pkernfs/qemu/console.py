"""Reading the serial port of a guest that counts.

The guest of mount_helpers/guest-kernel prints one line per tick:

    PKERNFS-GUEST boot_id=<uuid> count=<n> sum=<md5>

and, when a piece of its memory is not what it wrote there, a last one that begins `PKERNFS-GUEST FAILED`.  QEMU appends
to one file over all restarts, so the file is the guest's own account of its life.
"""

import collections
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pkernfs.errors import quoted
from pkernfs.qemu.errors import QemuError

BEAT = re.compile(
    r"^PKERNFS-GUEST boot_id=(?P<boot_id>[0-9a-f-]{36}) count=(?P<count>\d+) sum=(?P<sum>[0-9a-f]{32})\r?$"
)
FAILED = "PKERNFS-GUEST FAILED"

#: The guest verifies this many pieces of its memory in turn, one per tick (CHUNKS in mount_helpers/guest-kernel).
CHUNKS = 8

#: Seconds between two looks at the file.
POLL = 0.005


class Beat(NamedTuple):
    """One tick of the guest."""

    boot_id: str  #: of the guest's kernel; a new boot has a new one
    tick: int  #: how many there have been since that boot, from 1
    sum: str  #: md5 of the piece of memory that this tick verified


def parse(text: str) -> Iterator[Beat]:
    """The ticks in a guest's output, in order; of an unfinished last line nothing is taken.

    Raises QemuError at the first sign that the guest did not simply go on: a failed checksum, another boot, a tick that
    is missing or there twice.
    """
    last: Beat | None = None
    for line in text.split("\n")[:-1]:
        if line.startswith(FAILED):
            raise QemuError("the guest's memory to be what it wrote", line.strip(), "its RAM was not preserved")
        if not (match := BEAT.match(line)):
            continue
        beat = Beat(match["boot_id"], int(match["count"]), match["sum"])
        if last is not None and beat.boot_id != last.boot_id:
            raise QemuError(f"boot_id {last.boot_id}", beat.boot_id, "the guest booted again")
        if last is not None and beat.tick != last.tick + 1:
            raise QemuError(f"tick {last.tick + 1}", f"tick {beat.tick}", "the guest did not go on from where it was")
        last = beat
        yield beat


class Console:
    """The file that the guest's serial port is appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self) -> str:
        """All that the guest has printed."""
        try:
            return self.path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def last(self) -> Beat | None:
        """The last tick, after all before it have been checked as `parse` does."""
        return next(iter(collections.deque(parse(self.text()), maxlen=1)), None)

    def wait(self, tick: int, timeout: float, check: Callable[[], None] = lambda: None) -> Beat:
        """Wait for the tick number `tick`, or a later one, and return the last tick.

        `check` is called now and then, and may raise.  Raises QemuError when `timeout` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        size = -1
        while True:
            # Reading all of a small file again is the simplest way that cannot miss anything, but only when it has
            # grown.
            grown = self.path.stat().st_size if self.path.exists() else 0
            if grown != size:
                size = grown
                last = self.last()
                if last is not None and last.tick >= tick:
                    return last
            if time.monotonic() > deadline:
                tail = self.text().strip().splitlines()[-1:] or ["nothing"]
                hint = f"see {self.path}; a slow machine may need more than {timeout:g} s"
                raise QemuError(f"tick {tick} of the guest", quoted(tail[0]), hint)
            check()
            time.sleep(POLL)
