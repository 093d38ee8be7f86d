"""Which processes map a file's memory: from the region, past the mount, and through the mount.

Found in /proc/PID/maps, which waits for what PID is doing with its memory; that may be waiting for this very server, so
it is looked at in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pkernfs import api
from pkernfs.format import PAGE, Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.processes import holder, parse_maps, pids
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
    wanted = f"{int(major or 0):02x}:{int(minor or 0):02x}"
    for pid in pids():
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
            text = file.read()
            if b" %d " % ino in text and any(
                one.shared and one.inode == ino and one.device == wanted for one in parse_maps(text)
            ):
                yield pid
