"""Who owns which memory, for reading: the block table, and the slabs that cut blocks into pages and inode slots."""

from __future__ import annotations

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_KINDS,
    BLOCK_SLAB,
    FIRST_FREE_SLOT,
    INODES_PER_PAGE,
    PAGE,
    PAGE_DATA,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGE_KINDS,
    PAGES_PER_BLOCK,
    RO_COMPAT_FAR_COPY,
    TABLE_FANOUT,
    TABLE_MAGIC,
    BlockNo,
    FilePage,
    Ino,
    PageNo,
    Superblock,
)
from pkernfs.fs.damage import Damage
from pkernfs.fs.pages import check_page, encode_page
from pkernfs.fs.slab import Slab
from pkernfs.region import Region, far_copy_at


def block_of(page: PageNo) -> tuple[BlockNo, int]:
    """The block that a page is in, and which of its pages it is."""
    return BlockNo(page // PAGES_PER_BLOCK), page % PAGES_PER_BLOCK


def page_of_inode(ino: Ino) -> tuple[PageNo, int]:
    """The page that an inode's slot is in, and which of its slots it is."""
    return PageNo(ino // INODES_PER_PAGE), ino % INODES_PER_PAGE


class BlockTablePage:
    """One page of the block table; the kinds live in the table of the whole region."""

    fresh = False

    def __init__(self, space: Space, index: int) -> None:
        self.space = space
        self.index = index
        self.offset = PAGE + index * PAGE

    def encode(self) -> bytes:
        """The page as it goes to the region."""
        first = self.index * TABLE_FANOUT
        kinds = self.space.table[first : first + TABLE_FANOUT]
        return encode_page(TABLE_MAGIC, self.offset, self.index, 0, 0, kinds)


class Space:
    """The kinds of all blocks, of the pages of slabs, and the inode slots in use.  The Allocator changes them.

    Raises CorruptError when the block table is damaged.
    """

    far_copy = PageNo(0)  #: page of the far copy of the superblock; 0: the region has none

    def __init__(self, region: Region, sb: Superblock, damage: Damage) -> None:
        self.region = region
        self.damage = damage
        self.blocks = sb.blocks
        self.first_block = sb.first_block
        if sb.ro_compat & RO_COMPAT_FAR_COPY:
            self.far_copy = PageNo(far_copy_at(sb.blocks) // PAGE)
        table = bytearray()
        for index in range(sb.table_pages):
            offset = PAGE + index * PAGE
            raw = region.read(offset, PAGE)
            check_page(raw, TABLE_MAGIC, offset, index, "the block table")
            table += raw[PAGE_HEADER_LAYOUT.size :]
        self.table = table[: self.blocks]
        if max(self.table) not in BLOCK_KINDS:
            raise CorruptError("the block table", PAGE, "kinds of blocks that do not exist")
        self.pages = [BlockTablePage(self, index) for index in range(sb.table_pages)]
        self.free_blocks = self.table.count(BLOCK_FREE, self.first_block)
        self.slabs: dict[BlockNo, Slab] = {}
        #: slabs that may have a free page / a free inode slot: hints, checked when used
        self.with_pages = set(self.slab_blocks())
        self.with_slots = set(self.with_pages)

    # -- slabs ----------------------------------------------------------------------------------------------------

    def is_slab(self, block: BlockNo) -> bool:
        """Whether a block is one that a slab can be read from."""
        return self.first_block <= block < self.blocks and self.table[block] == BLOCK_SLAB

    def slab(self, block: BlockNo) -> Slab:
        """The slab in ``block``.  Raises CorruptError."""
        slab = self.slabs.get(block)
        if slab is None:
            if not self.is_slab(block):
                raise CorruptError("a page number", block * BLOCK, f"block {block} is not a slab")
            slab = self.slabs[block] = Slab.decode(self.region.read(block * BLOCK, PAGE), block)
        return slab

    def usable_slab(self, block: BlockNo) -> Slab | None:
        """The slab in ``block``, to allocate from; None, and a note, when it is damaged: the others are used then."""
        try:
            return self.slab(block)
        except CorruptError as error:
            self.damage.note(error)
            return None

    def slab_blocks(self) -> list[BlockNo]:
        """The blocks that are slabs."""
        blocks = []
        at = self.table.find(BLOCK_SLAB)
        while at >= 0:
            blocks.append(BlockNo(at))
            at = self.table.find(BLOCK_SLAB, at + 1)
        return blocks

    def drop_slab(self, block: BlockNo) -> None:
        """Drop what is decoded of a slab, which is one no more or is to be decoded again."""
        self.slabs.pop(block, None)
        self.with_pages.discard(block)
        self.with_slots.discard(block)

    def relist(self, block: BlockNo) -> None:
        """Look into a slab again when something is to be allocated."""
        if self.table[block] == BLOCK_SLAB:
            self.with_pages.add(block)
            self.with_slots.add(block)

    # -- questions ------------------------------------------------------------------------------------------------

    def check_page_kind(self, page: PageNo, kind: int, what: str, ino: Ino) -> None:
        """Raise CorruptError, of inode ``ino``, when ``page`` is not a page of this kind."""
        block, index = block_of(page)
        if not self.is_slab(block):
            raise CorruptError(what, page * PAGE, f"page {page:#x} is not in a slab", ino=ino)
        found = self.slab(block).kinds[index]
        if found != kind:
            expected = f"expected a page of kind {PAGE_KINDS[kind]}, found {PAGE_KINDS[found]}"
            raise CorruptError(what, page * PAGE, expected, ino=ino)

    def is_data(self, start: FilePage, page: PageNo, count: int) -> bool:
        """Whether ``count`` pages from ``page`` on can be a file's content, its page ``start`` and what follows.

        Those are whole data blocks at multiples of 2 MiB, and data pages of slabs.  Raises CorruptError for a damaged
        slab.
        """
        # divmod and not block_of, here and in inode_in_use: they are asked for every extent and every inode.
        if not self.first_block * PAGES_PER_BLOCK <= page < page + count <= self.blocks * PAGES_PER_BLOCK:
            return False
        block, index = divmod(page, PAGES_PER_BLOCK)
        at = int(start)
        if self.table[block] == BLOCK_SLAB:
            step = min(count, PAGES_PER_BLOCK - index)
            if self.slab(BlockNo(block)).kinds[index : index + step] != bytes([PAGE_DATA]) * step:
                return False
            if step == count:
                return True
            at, count = at + step, count - step
            block, index = block + 1, 0  # what follows are blocks to the end: a slab begins with its header
        blocks, rest = divmod(count, PAGES_PER_BLOCK)
        if index or rest or at % PAGES_PER_BLOCK:
            return False
        return self.table[block : block + blocks] == bytes([BLOCK_DATA]) * blocks

    def inode_in_use(self, ino: Ino) -> bool:
        """Whether the slot is one that an inode may be read from."""
        if 0 < ino < FIRST_FREE_SLOT:
            return True
        page, slot = divmod(ino, INODES_PER_PAGE)
        block, index = divmod(page, PAGES_PER_BLOCK)
        if not self.first_block <= block < self.blocks or self.table[block] != BLOCK_SLAB:
            return False
        slab = self.slab(BlockNo(block))
        return slab.kinds[index] == PAGE_INODES and bool(slab.slots[index] >> slot & 1)

    def has_pages(self, count: int) -> bool:
        """Whether ``count`` pages (less than a slab holds) can be had for certain."""
        slabs = (self.usable_slab(block) for block in self.with_pages if self.table[block] == BLOCK_SLAB)
        return self.free_blocks > 0 or any(slab is not None and slab.free >= count for slab in slabs)

    # -- figures --------------------------------------------------------------------------------------------------

    def free_pages(self) -> int:
        """Pages of 4 KiB that can still be allocated: in free blocks and in slabs."""
        in_slabs = sum(slab.free for slab in map(self.usable_slab, self.slab_blocks()) if slab)
        return self.free_blocks * PAGES_PER_BLOCK + in_slabs

    def largest_free_run(self) -> int:
        """Blocks of the largest free piece: what a contiguous file can have."""
        used_or_not = bytes(self.table[self.first_block :]).translate(b"\0" + b"\1" * 255)
        return max(map(len, used_or_not.split(b"\1")))

    def inodes_in_use(self) -> int:
        """Inode slots in use, the reserved ones not counted."""
        return sum(slab.inodes for slab in map(self.usable_slab, self.slab_blocks()) if slab)
