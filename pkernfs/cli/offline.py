"""Reading a region without a mount: read-only, the journal replayed in memory, nothing written."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from pkernfs.client import mount_of
from pkernfs.errors import CorruptError, printable
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu.guard import open_filesystem
from pkernfs.processes import Holder, NoProcError, lock_holder
from pkernfs.region import open_region
from pkernfs.served import served

T = TypeVar("T")
TRIES = 5


def region_of(path: str) -> str:
    """The region that ``path`` is, or that is mounted there."""
    mount = mount_of(path)
    return mount.source if mount is not None and mount.mountpoint == os.path.realpath(path) else path


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
            holder, use_now = _user(region.path)
            try:
                fs = open_filesystem(region)
                if use_now and attempt == 0:
                    print(f"{program}: {printable(region_path)} {use_now}", file=sys.stderr)
                return use(fs)
            except CorruptError:
                if holder is None or attempt == TRIES - 1:
                    raise
    raise AssertionError("not reached")


def _user(region: str) -> tuple[Holder | None, str]:
    """Who holds a region that is read meanwhile, and what to say of that; "": nobody does."""
    try:
        holder = lock_holder(region)
        mounted = found.here() if holder and (found := served(region)) else []
    except NoProcError:
        return None, "may be in use, as /proc is not mounted: then what is shown may be changing"
    if holder is None:
        return None, ""
    where = f"is mounted on {printable(mounted[0].mountpoint)}" if mounted else f"is in use by {holder}"
    return holder, f"{where}: what is shown may be changing"
