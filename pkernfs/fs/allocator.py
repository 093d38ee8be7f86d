"""Who owns which memory: the block table, and the slabs that cut blocks into 4 KiB pages and pages into inode slots."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pkernfs.errors import CorruptError, FsError
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
    PAGE_FREE,
    PAGE_HEADER,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGE_KINDS,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    TABLE_FANOUT,
    TABLE_MAGIC,
    Inode,
)
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.pages import check_page, seal_page
from pkernfs.fs.slab import ALL_SLOTS, Slab

if TYPE_CHECKING:
    from pkernfs.fs.volume import Transaction, Volume

DISCARD_BLOCKS = 1 << 20  #: 2 TiB: what one record of the journal can count
FREE_SLOT = Inode()


class TablePage:
    """One page of the block table; the kinds live in the allocator's table of the whole region."""

    fresh = False

    def __init__(self, allocator: Allocator, index: int) -> None:
        self.allocator = allocator
        self.index = index
        self.offset = PAGE + index * PAGE

    def encode(self) -> bytes:
        """The page as it goes to the region."""
        first = self.index * TABLE_FANOUT
        kinds = self.allocator.table[first : first + TABLE_FANOUT]
        return seal_page(TABLE_MAGIC, self.offset, self.index, 0, 0, kinds)


class Allocator:
    """Allocates and frees blocks, pages and inode slots within the open transaction of ``volume``.

    Data blocks are taken from the lowest free address, slabs from the highest, so that the middle stays in one piece.
    Whatever is allocated reads as zero.  Raises FsError(ENOSPC); the transaction then puts everything back.
    """

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.region = volume.region
        sb = volume.sb
        self.blocks = sb.blocks
        self.first_block = sb.first_block
        table = bytearray()
        for index in range(sb.table_pages):
            offset = PAGE + index * PAGE
            raw = self.region.read(offset, PAGE)
            check_page(raw, TABLE_MAGIC, offset, index, "the block table")
            table += raw[PAGE_HEADER_LAYOUT.size :]
        self.table = table[: self.blocks]
        if max(self.table) not in BLOCK_KINDS:
            raise CorruptError("the block table", PAGE, "kinds of blocks that do not exist")
        self.pages = [TablePage(self, index) for index in range(sb.table_pages)]
        self.free_blocks = self.table.count(BLOCK_FREE, self.first_block)
        self.slabs: dict[int, Slab] = {}
        #: slabs that may have a free page / a free inode slot: hints, checked when used
        self.with_pages = set(self.slab_blocks())
        self.with_slots = set(self.with_pages)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _set_kind(self, block: int, count: int, kind: int) -> None:
        tx = self.volume.tx
        assert tx is not None
        old = bytes(self.table[block : block + count])
        freed = (kind == BLOCK_FREE) * count - old.count(BLOCK_FREE)

        def undo() -> None:
            self.table[block : block + count] = old
            self.free_blocks -= freed
            if kind != BLOCK_FREE:
                self.region.discard(block * BLOCK, count * BLOCK)

        tx.undo.append(undo)
        self.table[block : block + count] = bytes([kind]) * count
        self.free_blocks += freed
        for index in range(block // TABLE_FANOUT, (block + count - 1) // TABLE_FANOUT + 1):
            self.volume.change(self.pages[index])

    def alloc_blocks(self, count: int, near: int = 0) -> list[tuple[int, int]]:
        """``count`` zeroed data blocks as runs (block, count): from ``near`` on, or in one piece, where possible."""
        if count > self.free_blocks:
            raise FsError(errno.ENOSPC, f"{count} blocks of 2 MiB wanted, {self.free_blocks} are free")
        runs: list[tuple[int, int]] = []
        size = count
        while count:
            size = min(size, count)
            if near and self.table[near : near + size] == bytes(size):
                at = near
            else:
                at = self.table.find(bytes(size), self.first_block)
            near = 0
            if at < 0:
                size = (size + 1) // 2
                continue
            self.region.reserve(at * BLOCK, size * BLOCK)
            self._set_kind(at, size, BLOCK_DATA)
            runs.append((at, size))
            count -= size
        return runs

    def free_blocks_later(self, block: int, count: int) -> None:
        """Free data blocks when the transaction commits."""
        assert self.volume.tx is not None
        self.volume.tx.freed_blocks.append((block, count))

    # -- pages ----------------------------------------------------------------------------------------------------

    def slab(self, block: int) -> Slab:
        """The slab in ``block``.  Raises CorruptError."""
        slab = self.slabs.get(block)
        if slab is None:
            if not self.first_block <= block < self.blocks or self.table[block] != BLOCK_SLAB:
                raise CorruptError("a page number", block * BLOCK, f"block {block} is not a slab")
            slab = self.slabs[block] = Slab.decode(self.region.read(block * BLOCK, PAGE), block)
        return slab

    def usable_slab(self, block: int) -> Slab | None:
        """The slab in ``block``, to allocate from; None, and a note, when it is damaged: the others are used then."""
        try:
            return self.slab(block)
        except CorruptError as error:
            self.volume.damage.note(error)
            return None

    def _new_slab(self) -> Slab:
        block = self.table.rfind(BLOCK_FREE, self.first_block)
        if block < 0:
            raise FsError(errno.ENOSPC, "no block of 2 MiB is free for a new slab")
        self.region.reserve(block * BLOCK, BLOCK)
        self._set_kind(block, 1, BLOCK_SLAB)
        slab = self.slabs[block] = Slab.empty(block)
        self.volume.change(slab)
        self.with_pages.add(block)
        return slab

    def _slab_with_page(self) -> Slab:
        while self.with_pages:
            block = next(iter(self.with_pages))
            if self.table[block] == BLOCK_SLAB:
                slab = self.usable_slab(block)
                if slab and slab.free:
                    return slab
            self.with_pages.discard(block)
        return self._new_slab()

    def alloc_pages(self, count: int, kind: int) -> list[tuple[int, int]]:
        """``count`` zeroed pages as runs (page, count), in one piece where a slab has it.

        Pages for tree nodes are not zeroed: they are stored whole.
        """
        runs = []
        while count:
            slab = self._slab_with_page()
            size = min(count, slab.free)
            at = slab.kinds.find(bytes(size))
            while at < 0:
                size = (size + 1) // 2
                at = slab.kinds.find(bytes(size))
            self.volume.change(slab)
            slab.kinds[at : at + size] = bytes([kind]) * size
            slab.free -= size
            page = slab.block * PAGES_PER_BLOCK + at
            if kind != PAGE_NODE:
                self.region.zero(page * PAGE, size * PAGE)
            runs.append((page, size))
            count -= size
        return runs

    def has_pages(self, count: int) -> bool:
        """Whether ``count`` pages (less than a slab holds) can be had for certain."""
        slabs = (self.usable_slab(block) for block in self.with_pages if self.table[block] == BLOCK_SLAB)
        return self.free_blocks > 0 or any(slab is not None and slab.free >= count for slab in slabs)

    def alloc_page(self, kind: int) -> int:
        """One page; its number."""
        return self.alloc_pages(1, kind)[0][0]

    def free_pages_later(self, page: int, count: int = 1) -> None:
        """Free pages when the transaction commits."""
        assert self.volume.tx is not None
        self.volume.tx.freed_pages.append((page, count))

    def check_page_kind(self, page: int, kind: int, what: str, ino: int) -> None:
        """Raise CorruptError, of inode ``ino``, when ``page`` is not a page of this kind."""
        block, index = divmod(page, PAGES_PER_BLOCK)
        if not self.first_block <= block < self.blocks or self.table[block] != BLOCK_SLAB:
            raise CorruptError(what, page * PAGE, f"page {page:#x} is not in a slab", ino=ino)
        found = self.slab(block).kinds[index]
        if found != kind:
            expected = f"expected a page of kind {PAGE_KINDS[kind]}, found {PAGE_KINDS[found]}"
            raise CorruptError(what, page * PAGE, expected, ino=ino)

    def is_data(self, start: int, page: int, count: int) -> bool:
        """Whether ``count`` pages from ``page`` on, page ``start`` of a file and what follows, can be a file's content:
        whole data blocks at multiples of 2 MiB, and data pages of slabs.  Raises CorruptError for a damaged slab."""
        if not self.first_block * PAGES_PER_BLOCK <= page < page + count <= self.blocks * PAGES_PER_BLOCK:
            return False
        block, index = divmod(page, PAGES_PER_BLOCK)
        if self.table[block] == BLOCK_SLAB:
            step = min(count, PAGES_PER_BLOCK - index)
            if self.slab(block).kinds[index : index + step] != bytes([PAGE_DATA]) * step:
                return False
            start, page, count = start + step, page + step, count - step
        # What follows are blocks to the end: a slab begins with its header.
        block, index = divmod(page, PAGES_PER_BLOCK)
        blocks, rest = divmod(count, PAGES_PER_BLOCK)
        aligned = not (index or start % PAGES_PER_BLOCK)
        whole = not rest and self.table[block : block + blocks] == bytes([BLOCK_DATA]) * blocks
        return not count or (aligned and whole)

    # -- inode slots ----------------------------------------------------------------------------------------------

    def inode_in_use(self, ino: int) -> bool:
        """Whether the slot is one that an inode may be read from."""
        if 0 < ino < FIRST_FREE_SLOT:
            return True
        page, slot = divmod(ino, INODES_PER_PAGE)
        block, index = divmod(page, PAGES_PER_BLOCK)
        if not self.first_block <= block < self.blocks or self.table[block] != BLOCK_SLAB:
            return False
        slab = self.slab(block)
        return slab.kinds[index] == PAGE_INODES and bool(slab.slots[index] >> slot & 1)

    def alloc_inode(self) -> int:
        """The number of a free slot, now in use."""
        slab = None
        index = -1
        while self.with_slots and index < 0:
            block = next(iter(self.with_slots))
            if self.table[block] == BLOCK_SLAB:
                slab = self.usable_slab(block)
                index = slab.page_with_slots() if slab else -1
            if index < 0:
                self.with_slots.discard(block)
        if slab is None or index < 0:
            page = self.alloc_page(PAGE_INODES)
            block, index = divmod(page, PAGES_PER_BLOCK)
            slab = self.slab(block)
            slab.first_with_slots = min(slab.first_with_slots, index)
            self.with_slots.add(block)
        self.volume.change(slab)
        free = ~slab.slots[index] & ALL_SLOTS
        slot = (free & -free).bit_length() - 1
        slab.slots[index] |= 1 << slot
        slab.inodes += 1
        ino = (slab.block * PAGES_PER_BLOCK + index) * INODES_PER_PAGE + slot
        assert self.volume.tx is not None
        self.volume.tx.before[ino] = FREE_SLOT
        return ino

    def free_inode_later(self, ino: int) -> None:
        """Free a slot when the transaction commits."""
        assert self.volume.tx is not None
        self.volume.tx.freed_inodes.append(ino)

    # -- the end of a transaction ---------------------------------------------------------------------------------

    def apply_frees(self, tx: Transaction) -> list[tuple[int, int]]:
        """Free what the transaction gave up; the ranges (offset, length) whose memory goes back to the host.

        Raises CorruptError when a part of it is not in use (any more): two structures lead to it.
        """
        discards = []
        touched: dict[int, Slab] = {}
        for ino in tx.freed_inodes:
            page, slot = divmod(ino, INODES_PER_PAGE)
            block, index = divmod(page, PAGES_PER_BLOCK)
            slab = touched[block] = self.slab(block)
            if slab.kinds[index] != PAGE_INODES or not slab.slots[index] >> slot & 1:
                raise corrupt_inode(ino, "it was freed twice")
            self.volume.change(slab)
            slab.slots[index] &= ~(1 << slot)
            slab.inodes -= 1
            slab.first_with_slots = min(slab.first_with_slots, index)
            self.with_slots.add(block)
            if not slab.slots[index]:
                slab.kinds[index] = PAGE_FREE
                slab.free += 1
        for page, count in tx.freed_pages:
            block, index = divmod(page, PAGES_PER_BLOCK)
            slab = touched[block] = self.slab(block)
            kinds = slab.kinds[index : index + count]
            if len(kinds) != count or PAGE_FREE in kinds or PAGE_HEADER in kinds:
                raise CorruptError(f"slab {block}", page * PAGE, f"{count} pages were freed that are not in use")
            self.volume.change(slab)
            slab.kinds[index : index + count] = bytes(count)
            slab.free += count
        for block, slab in touched.items():
            self.with_pages.add(block)
            if slab.free == PAGES_PER_BLOCK - 1:
                tx.freed_blocks.append((block, 1))
                del tx.pages[slab.offset]
                self._drop_slab(block)
                tx.undo.append(lambda block=block: self._relist(block))  # type: ignore[misc]
        for block, count in tx.freed_blocks:
            if BLOCK_FREE in self.table[block : block + count]:
                raise CorruptError("the block table", block * BLOCK, f"{count} blocks were freed that are not in use")
            self._set_kind(block, count, BLOCK_FREE)
            for at in range(block, block + count, DISCARD_BLOCKS):
                discards.append((at * BLOCK, min(DISCARD_BLOCKS, block + count - at) * BLOCK))
        return discards

    def _drop_slab(self, block: int) -> None:
        self.slabs.pop(block, None)
        self.with_pages.discard(block)
        self.with_slots.discard(block)

    def _relist(self, block: int) -> None:
        if self.table[block] == BLOCK_SLAB:
            self.with_pages.add(block)
            self.with_slots.add(block)

    def forget(self, tx: Transaction) -> None:
        """An aborted transaction: drop the slabs that it changed; they are decoded again from the region."""
        for page in tx.pages.values():
            if isinstance(page, Slab):
                self._drop_slab(page.block)
                if not page.fresh:
                    self._relist(page.block)

    # -- figures --------------------------------------------------------------------------------------------------

    def free_pages(self) -> int:
        """Pages of 4 KiB that can still be allocated: in free blocks and in slabs."""
        in_slabs = sum(slab.free for slab in map(self.usable_slab, self.slab_blocks()) if slab)
        return self.free_blocks * PAGES_PER_BLOCK + in_slabs

    def slab_blocks(self) -> list[int]:
        """The blocks that are slabs."""
        blocks = []
        at = self.table.find(BLOCK_SLAB)
        while at >= 0:
            blocks.append(at)
            at = self.table.find(BLOCK_SLAB, at + 1)
        return blocks

    def inodes_in_use(self) -> int:
        """Inode slots in use, the reserved ones not counted."""
        return sum(slab.inodes for slab in map(self.usable_slab, self.slab_blocks()) if slab)
