"""The decoded objects of an open region: copies that may be dropped at any time outside a transaction."""

from __future__ import annotations

import errno

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, PAGE, Ino, Inode, Superblock
from pkernfs.fs.damage import Damage, corrupt_inode
from pkernfs.fs.node import Node
from pkernfs.fs.pages import check_inode, read_inode
from pkernfs.fs.space import Space
from pkernfs.region import Region

# Above these everything is dropped, not what was used longest ago: an order of use would cost something at every hit,
# and decoding an inode anew costs 0.75 us.  65536 inodes are 45 MiB of Python objects.
CACHED_INODES = 65536  #: decoded inodes kept
CACHED_NODES = 8192  #: decoded tree nodes kept


class Cache:
    """Inodes and tree nodes, decoded, and where the memory of files was found last.

    Raises CorruptError when the block table is damaged.
    """

    def __init__(self, region: Region, sb: Superblock) -> None:
        self.region = region
        self.damage = Damage()
        self.space = Space(region, sb, self.damage)
        self.total_pages = sb.blocks * BLOCK // PAGE
        self.inodes: dict[Ino, Inode] = {}
        self.nodes: dict[int, Node] = {}  #: by offset
        #: by file: the piece of it that was found last: from byte, to byte, and the distance from the file's bytes to
        #: the region's.  Nothing that a transaction has changed or freed is in here.
        self.pieces: dict[Ino, tuple[int, int, int]] = {}
        self.in_transaction = False  #: what was changed is here only, and must not be dropped

    def inode(self, ino: Ino) -> Inode:
        """The inode, which must be in use.  Raises FsError(ESTALE) when it is not, CorruptError when it is damaged."""
        inode = self.inodes.get(ino)
        if inode is None:
            self.trim()
            if not self.space.inode_in_use(ino):
                raise FsError(errno.ESTALE, f"inode {ino} is not in use any more")
            inode = read_inode(self.region, ino)
            if not inode.mode:
                raise FsError(errno.ESTALE, f"inode {ino} is not in use any more")
            check_inode(ino, inode, self.total_pages)
            self.inodes[ino] = inode
        return inode

    def inode_named_by(self, owner: Ino, ino: Ino) -> Inode:
        """The inode that something of inode ``owner`` names.  Raises CorruptError, of the owner when it is free."""
        try:
            return self.inode(ino)
        except FsError:
            raise corrupt_inode(owner, f"it names inode {ino}, which is free") from None

    def trim(self) -> None:
        """Keep no more decoded objects than there is room for; while a transaction is open it may need them all."""
        if not self.in_transaction:
            if len(self.inodes) > CACHED_INODES:
                self.inodes.clear()
                self.pieces.clear()
            if len(self.nodes) > CACHED_NODES:
                self.nodes.clear()
