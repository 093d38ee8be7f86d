"""What was found damaged while a region is in use."""

from __future__ import annotations

import errno
import logging

from pkernfs.errors import CorruptError, FsError, PkernfsError
from pkernfs.format import INODE_SIZE, Ino, PageNo

log = logging.getLogger("pkernfs")

NO_INO = Ino(0)  #: no inode
NO_PAGE = PageNo(0)  #: no page: the superblock's

MAX_LOGGED = 1000  #: findings that are logged and told; a region that is damaged all over is not worth more lines


def corrupt_inode(ino: Ino, found: str, what: str = "") -> CorruptError:
    """Inode ``ino`` is damaged, or what belongs to it and is called ``what``; no change is made to it from then on."""
    return CorruptError(what or f"inode {ino}", ino * INODE_SIZE, found, ino=ino)


class Damage:
    """The findings of one mount: each is logged once, and the inode that it belongs to is not changed any more.

    What is intact in that inode can still be read.  A finding in a structure of the whole region (an error without
    ``ino``) freezes nothing: what does not need that structure goes on.
    """

    def __init__(self) -> None:
        self.found: dict[int, CorruptError] = {}  #: by region offset of the structure
        self.inodes: set[Ino] = set()

    def note(self, error: CorruptError) -> None:
        """Remember a finding; log it if it is a new one."""
        if error.ino:
            self.inodes.add(Ino(error.ino))
        if error.offset in self.found or len(self.found) >= MAX_LOGGED:
            return
        self.found[error.offset] = error
        log.error("%s", error)
        if len(self.found) == MAX_LOGGED:
            log.error("%d structures were found damaged: more are not logged", MAX_LOGGED)

    def complain(self, error: PkernfsError) -> None:
        """Log what no caller gets to see; damage once, and not that it keeps an inode from being changed."""
        if isinstance(error, CorruptError):
            self.note(error)
        elif error.errno != errno.EROFS:
            log.error("%s", error)

    def check_changeable(self, ino: Ino) -> None:
        """Raise FsError(EROFS) when the inode was found damaged."""
        if ino in self.inodes:
            raise FsError(errno.EROFS, f"inode {ino} was found damaged, run fsck.pkernfs")
