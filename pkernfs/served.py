"""A region that is served: the keeper's socket, which is named by it, and where the mount of it is.

A mount has an id, and paths come and go: it may be mounted in several places, in other mount namespaces only (libvirt
gives each QEMU one), or nowhere any more while what is open in it lives on.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import NamedTuple

from pkernfs.mountinfo import FSTYPE, Mount, elsewhere, mounts, mounts_of
from pkernfs.processes import Holder, NoProcError
from pkernfs.sockets import KEEPER, WORKER, device_of, find, is_alive, region_key

SHOWN = 3  #: holders in a line


class Served(NamedTuple):
    """Who serves a region.  ``keeper``: the keeper's socket."""

    device: str  #: MAJOR:MINOR of the mount
    keeper: str

    @property
    def worker(self) -> str:
        """The worker's socket."""
        return self.keeper.removesuffix(KEEPER) + WORKER

    def here(self) -> list[Mount]:
        """Where it is mounted in the mount namespace of this process."""
        with suppress(NoProcError, OSError):
            return mounts_of(self.device)
        return []

    def elsewhere(self) -> list[Holder]:
        """Who has it mounted in others."""
        with suppress(NoProcError, OSError):
            return elsewhere(self.device)
        return []


def served(region: str) -> Served | None:
    """Who serves the region at ``region``; None when nobody does, or nobody that this user may know of."""
    try:
        status = os.stat(region)
    except OSError:
        return None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        return None
    users = tuple(dict.fromkeys((os.getuid(), 0, status.st_uid)))
    for uid in users:
        address = find(uid, region=region_key(status))
        if address is not None and is_alive(address):
            return Served(device_of(address), address)
    # A keeper before version 0.3.0 names its socket by the mount alone.  Goes with release 0.4.
    with suppress(NoProcError, OSError):
        for mount in reversed(mounts()):
            if mount.fstype == FSTYPE and mount.source == region and mount.owner in users:
                address = find(mount.owner, device=mount.device)
                if address is not None and os.path.basename(address).count("-") == 1 and is_alive(address):
                    return Served(mount.device, address)
    return None


def still_mounted(holders: list[Holder]) -> str:
    """Where a mount lives on that is not to be seen here."""
    return f"still mounted in the mount namespace of {some(list(map(str, holders)))}"


def some(names: list[str]) -> str:
    """The first of some names, and how many there are more."""
    return "; ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
