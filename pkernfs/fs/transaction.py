"""The handle of an open transaction: who holds one may change metadata, as with jbd2's handle_t.

It is made by ``Volume.transaction`` and passed on.  What changes metadata is a method of it, or takes it as its first
argument, so that a change outside a transaction is a type error and not an assertion at run time.
"""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.format import GUARDED, BlockNo, Ino, Inode, PageNo
from pkernfs.fs.cache import Cache
from pkernfs.fs.damage import NO_PAGE, corrupt_inode
from pkernfs.fs.pages import Page, read_inode
from pkernfs.fs.slab import Slab


class Transaction:
    """What one transaction has changed so far.

    ``preparing``: the request at work is not executed by it yet.  ``charges``: quotas are charged at the end.
    """

    def __init__(self, cache: Cache, *, preparing: bool, charges: bool) -> None:
        self.cache = cache
        self.preparing = preparing
        self.charges = charges
        self.pages: dict[int, Page] = {}  #: by offset
        self.inodes: dict[Ino, Inode] = {}
        self.before: dict[Ino, Inode] = {}  #: what those were; a free slot has mode 0
        self.freed_blocks: list[tuple[BlockNo, int]] = []  #: with a count
        self.freed_pages: list[tuple[PageNo, int]] = []  #: with a count
        self.freed_inodes: list[Ino] = []
        self.stores: list[tuple[int, bytes]] = []  #: (offset, data) beside pages and inodes
        self.words: list[tuple[int, bytes]] = []  #: (offset, data): stored last, word by word, in order
        self.undo: list[Callable[[], None]] = []

    def change(self, page: Page) -> None:
        """Note that ``page`` changes: to be called before it is changed."""
        self.pages[page.offset] = page

    # -- inodes ---------------------------------------------------------------------------------------------------

    def put_inode(self, ino: Ino, inode: Inode) -> None:
        """Change an inode.  Raises FsError(EROFS) when it was found damaged."""
        cache = self.cache
        if ino in cache.damage.inodes:
            cache.damage.check_changeable(ino)
        if self.charges and ino not in self.before:
            self._keep_before(ino)
        cache.pieces.pop(ino, None)
        cache.inodes[ino] = inode
        self.inodes[ino] = inode

    def _keep_before(self, ino: Ino) -> None:
        self.before[ino] = self.cache.inodes.get(ino) or read_inode(self.cache.region, ino)

    def free_inode(self, ino: Ino, inode: Inode) -> None:
        """Empty the slot, and free it at the commit."""
        if self.charges and ino not in self.before:
            self._keep_before(ino)
        self.cache.pieces.pop(ino, None)
        self.cache.inodes.pop(ino, None)
        self.inodes[ino] = inode._replace(mode=0, nlink=0, size=0, pages=0, root=NO_PAGE, xattrs=NO_PAGE, inline=b"")
        self.freed_inodes.append(ino)

    def pin(self, ino: Ino, count: int) -> None:
        """Count ``count`` more (or less) pins of a file.  Raises CorruptError."""
        inode = self.cache.inode(ino)
        if inode.flags & GUARDED or inode.iommu + count < 0:
            found = "page tables that are mapped" if inode.flags & GUARDED else "fewer pins than mappings"
            raise corrupt_inode(ino, found)
        self.put_inode(ino, inode._replace(iommu=inode.iommu + count))

    # -- memory ---------------------------------------------------------------------------------------------------

    def free_blocks(self, block: BlockNo, count: int) -> None:
        """Free data blocks at the commit."""
        self.freed_blocks.append((block, count))

    def free_pages(self, page: PageNo, count: int = 1) -> None:
        """Free pages of a slab at the commit."""
        self.freed_pages.append((page, count))

    # -- the end --------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Drop what was decoded and changed: the region still holds the state before."""
        cache = self.cache
        cache.pieces.clear()
        for page in self.pages.values():
            cache.nodes.pop(page.offset, None)
            if isinstance(page, Slab):
                cache.space.drop_slab(page.block)
                if not page.fresh:
                    cache.space.relist(page.block)
        for ino in self.inodes:
            cache.inodes.pop(ino, None)
        for undo in reversed(self.undo):
            undo()
