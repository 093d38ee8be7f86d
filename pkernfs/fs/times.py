"""The times of inodes: when reading and writing store new ones."""

from __future__ import annotations

from pkernfs.format import INODE_ATIME_AT, INODE_SIZE, Ino, Inode
from pkernfs.fs.volume import Volume

DAY = 86400 * 10**9
I64_MAX = (1 << 63) - 1
WORD = (1 << 64) - 1


def clamp_time(ns: int) -> int:
    """A time as the format can hold it: 1677-09-21 to 2262-04-11, as other filesystems clamp to their own limits."""
    return max(-I64_MAX - 1, min(ns, I64_MAX))


class Times:
    """The policies of one mount."""

    #: of reading: "relatime" (as mount(8) has it), "strictatime" or "noatime"
    policy = "relatime"
    #: Whether writing updates mtime and ctime.  A kernel that writes back has its own, of when write(2) was called, and
    #: sends them with setattr: but not when they have not changed since it did so last.
    on_write = True

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.region = volume.region

    def atime_due(self, inode: Inode) -> bool:
        """Whether reading is to store a new atime."""
        if self.policy == "noatime" or self.region.readonly:
            return False
        atime = inode.atime
        fresh = atime > inode.mtime and atime > inode.ctime and self.volume.clock() - atime < DAY
        return not fresh or self.policy == "strictatime"

    def accessed(self, ino: Ino, inode: Inode) -> None:
        """Store a new atime when the policy asks for it; not in an inode that was found damaged.

        With one store, in place, and no transaction: reading stays cheap.
        """
        if self.atime_due(inode) and ino not in self.volume.damage.inodes:
            volume = self.volume
            now = volume.clock()
            volume.inodes[ino] = inode._replace(atime=now)
            volume.region.store_word(ino * INODE_SIZE + INODE_ATIME_AT, now & WORD)
