"""The start of a mount: from a region and a directory to a keeper that sees to it that the mount is served."""

from __future__ import annotations

import os
from collections.abc import Callable

from pkernfs.fs.lookups import lookups_size
from pkernfs.options import MountOptions
from pkernfs.region import lock_region
from pkernfs.server.child import worker_command
from pkernfs.server.keeper import Keeper
from pkernfs.server.resources import asking
from pkernfs.server.state import Descriptors, State
from pkernfs.server.stats import make_stats


def mount(region: str, mountpoint: str, options: MountOptions, ready: Callable[[int, str], None]) -> None:
    """Mount and keep the mount until its end.

    ``ready`` is called once the mount is usable, with the number of records that recovery replayed, and a warning or
    "".  Raises PkernfsError, before anything is mounted.
    """
    # Not mapped, and nothing is read: that is for the worker, which gets the descriptor.  What can be refused without
    # that is refused here, before a worker has begun to import.
    locked = lock_region(region, readonly=options.readonly)
    with asking("this mount"):
        references = os.memfd_create("pkernfs-references", os.MFD_CLOEXEC)
        os.truncate(references, lookups_size(locked.size))
        state = State(locked.path, mountpoint, options, worker_command())
        keeper = Keeper(state, Descriptors(locked.fd, references, make_stats(), -1, -1, -1))
        started = keeper.start()
    ready(started.replayed, started.warning)
    keeper.keep()
