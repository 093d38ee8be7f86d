"""What the filesystem asks before it touches what hardware may be using.

fs does not know the hardware.  It knows pins: how many users beyond the mount a file's pages have.  And it knows that
the content of some inodes, those with a flag of GUARDED, is not its own: somebody else keeps it, and records beside it
that pin other files.  Whoever that is registers a Guard where the filesystem is opened, and fs asks it.

All questions that begin with ``may`` raise FsError when the answer is no, but for ``may_free``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkernfs.format import GUARDED, FilePage, Ino, Inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume

if TYPE_CHECKING:
    from pkernfs import api


def pins(inode: Inode) -> int:
    """How many pins a file has: what they cover is not freed, and does not move."""
    return 0 if inode.flags & GUARDED else inode.iommu


def has_records(inode: Inode) -> bool:
    """Whether the guard keeps records in this inode, which go before it."""
    return inode.iommu > 0 and bool(inode.flags & GUARDED)


class Guard:
    """Allows everything: for a region in which nothing is pinned or guarded, as mkfs makes it.

    Asked about names: all directories.  Asked about content and freeing: inodes with a flag of GUARDED, and files with
    pins (``may_cut``, ``awaits`` and what follows from that) only.
    """

    def __init__(self, volume: Volume) -> None:
        self.volume = volume

    # -- names ----------------------------------------------------------------------------------------------------

    def flags_of_new(self, directory: Inode, mode: int) -> int:
        """Flags, beside the filesystem's own, of an inode that is made in a directory.  Raises FsError(EPERM)."""
        return 0

    def may_link(self, inode: Inode, directory: Inode) -> None:
        """May the inode get another name, in this directory?"""

    def may_move(self, source: Inode, target: Inode) -> None:
        """May a name move from one directory to another?"""

    def may_unlink(self, ino: Ino, inode: Inode) -> None:
        """May the last name of a guarded inode go?"""

    # -- content --------------------------------------------------------------------------------------------------

    def may_open(self, inode: Inode, flags: int) -> None:
        """May any inode be opened with the flags of open(2), or a file be made in this directory and opened so?"""

    def may_write(self, ino: Ino) -> None:
        """May a user write to a guarded inode?"""

    def may_map(self, ino: Ino) -> None:
        """May the memory of a guarded inode be mapped past the mount?"""

    def may_resize(self, ino: Ino, inode: Inode, size: int) -> None:
        """May a user give a guarded inode this size?"""

    def resized(self, tx: Transaction, ino: Ino, inode: Inode) -> None:
        """A guarded inode has grown, in this transaction."""

    def may_cut(self, ino: Ino, inode: Inode, end: FilePage) -> None:
        """May a file be cut to ``end`` pages, though it has pins?"""

    def awaits(self, ino: Ino, first: FilePage) -> bool:
        """Whether memory of a file with pins, from page ``first`` on, is to be put aside when it is cut off.

        Hardware may still have cached it, so that it must be nobody's.  Raises CorruptError.
        """
        return False

    def hand_on(self, tx: Transaction, ino: Ino, to: Ino, first: FilePage) -> None:
        """Inode ``to`` has got memory of a file from page ``first`` on: it has pins for that now."""

    def cut(self, tx: Transaction, ino: Ino, first: FilePage) -> None:
        """All memory of a file from page ``first`` on was handed on: it has no pins for that any more."""

    def describe_pins(self, ino: Ino) -> list[api.Pin]:
        """What pins a file, for ``pkernfs info --json``."""
        return []

    def describe_awaiting(self, ino: Ino) -> list[api.Awaiting]:
        """What hardware may have cached of a file that was mapped, for ``pkernfs info --json``."""
        return []

    def kept_bytes(self) -> int:
        """Memory that nobody uses, and that hardware may still have cached, bytes.  Raises CorruptError."""
        return 0

    def how_to_release(self) -> str:
        """What to do so that this memory is free, for a message that there is none; "": there is none of that."""
        return ""

    # -- freeing --------------------------------------------------------------------------------------------------

    def may_free(self, ino: Ino, inode: Inode) -> bool:
        """Whether a guarded inode without a name may be freed: hardware is done with it.  Raises CorruptError."""
        return True

    def is_pinning(self, ino: Ino) -> bool:
        """Whether the records of a guarded inode still pin files.  Raises CorruptError."""
        return False

    def unpin(self, ino: Ino, most: int) -> list[Ino]:
        """Drop up to ``most`` of the pins that a guarded inode holds, at once; the files that have none then."""
        return []

    def drop_records(self, tx: Transaction, ino: Ino) -> None:
        """Drop what records are left in a guarded inode that pins nothing any more."""
