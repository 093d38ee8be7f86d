"""Which processes map a file's memory: from the region, past the mount, and through the mount.

Found in /proc/PID/maps, which waits for what PID is doing with its memory; that may be waiting for this very server, so
it is looked at in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from pkernfs import api
from pkernfs.format import PAGE, Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.processes import holder, pids, shared_by
from pkernfs.server.threads import in_thread


async def mappers(fs: Filesystem, device: str, ino: Ino) -> list[api.Mapper]:
    """All of a regular file's, directly first.  ``device``: MAJOR:MINOR of the mount.  Raises FsError, NoProcError."""
    ranges = [(extent.page * PAGE, extent.length * PAGE) for extent in fs.content.extents(ino)]

    def look() -> list[api.Mapper]:
        found = [api.Mapper(pid=pid, text=str(holder(pid)), map="direct") for pid in fs.region.mapped_by(ranges)]
        return found + [api.Mapper(pid=pid, text=str(holder(pid)), map="path") for pid in through_mount(device, ino)]

    return await in_thread(look)


def through_mount(device: str, ino: int) -> Iterator[int]:
    """The processes with a shared mapping of a file of the mount.  Raises NoProcError."""
    major, _, minor = device.partition(":")
    number = os.makedev(int(major or 0), int(minor or 0))
    for pid in pids():
        with suppress(OSError):
            if shared_by(pid, number, ino):
                yield pid
