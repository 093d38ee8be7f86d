"""The lock of a region."""

from __future__ import annotations

import fcntl
import time
from contextlib import suppress

from pkernfs.errors import RegionBusyError
from pkernfs.processes import NoProcError, lock_holder
from pkernfs.served import served, still_mounted

LOCK_WAIT = 10.0  #: seconds
LOOK = 0.25  #: seconds between two looks at who has it mounted: all processes are asked


def lock(fd: int, path: str, *, shared: bool = False) -> None:
    """Take the lock of the region at ``path``: exclusive, or shared with others who only read.

    umount(8) returns before the server has ended: while the lock is held and the region is not mounted, wait for up to
    LOCK_WAIT seconds.  Raises RegionBusyError, which says who has it.
    """
    deadline = time.monotonic() + LOCK_WAIT
    look = 0.0
    where, hint = "", "try again when it has ended"
    while True:
        try:
            return fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            now = time.monotonic()
            if now >= look and (found := served(path)) is not None:
                look = now + LOOK
                if mounts := found.here():
                    where, hint = f", mounted on {mounts[0].mountpoint}", f"umount {mounts[0].mountpoint} first"
                    break
                if holders := found.elsewhere():
                    where, hint = f", {still_mounted(holders)}", "mount -t pkernfs REGION DIR mounts it here too"
                    break
            if now >= deadline:
                break
        time.sleep(0.005)
    holder = None
    with suppress(NoProcError, OSError):
        holder = lock_holder(path)
    raise RegionBusyError(f"{path}: the region is in use by {holder or 'another process'}{where}", hint=hint)
