"""Reading a region without a mount: read-only, the journal replayed in memory, nothing written."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from pkernfs.cli.text import printable
from pkernfs.errors import CorruptError
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu.guard import open_filesystem
from pkernfs.mountinfo import FSTYPE, mountpoints_of, mounts
from pkernfs.region import lock_holder, open_region

T = TypeVar("T")
TRIES = 5


def region_of(path: str) -> str:
    """The region that ``path`` is, or that is mounted there."""
    real = os.path.realpath(path)
    found = [mount.source for mount in mounts() if mount.mountpoint == real and mount.fstype == FSTYPE]
    return found[-1] if found else path


def keep_quiet() -> None:
    """No log: what is damaged comes up as an error, or in what is printed."""
    logging.getLogger("pkernfs").addHandler(logging.NullHandler())


def with_filesystem(region_path: str, use: Callable[[Filesystem], T], program: str = "pkernfs") -> T:
    """Open the region for reading and give what ``use`` makes of it.

    A region that is mounted changes while it is read: that is said, and a reader that stumbles over a change half made
    begins again.  Raises PkernfsError.
    """
    keep_quiet()
    for attempt in range(TRIES):
        with open_region(region_path, readonly=True, locked=False) as region:
            holder = lock_holder(region.path)
            try:
                fs = open_filesystem(region)
                if holder and attempt == 0:
                    mounted = mountpoints_of(region.path)
                    where = f"is mounted on {mounted[0]}" if mounted else f"is in use by {holder}"
                    print(
                        f"{program}: {printable(region_path)} {printable(where)}: what is shown may be changing",
                        file=sys.stderr,
                    )
                return use(fs)
            except CorruptError:
                if holder is None or attempt == TRIES - 1:
                    raise
    raise AssertionError("not reached")
