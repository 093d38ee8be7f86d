"""Allocating and freeing: blocks, pages of slabs, inode slots."""

from __future__ import annotations

import errno

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_SLAB,
    INODES_PER_PAGE,
    PAGE,
    PAGE_FREE,
    PAGE_HEADER,
    PAGE_INODES,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    TABLE_FANOUT,
    BlockNo,
    Ino,
    Inode,
    PageNo,
)
from pkernfs.fs.ahead import Ahead
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.slab import ALL_SLOTS, Slab
from pkernfs.fs.space import Space, block_of, page_of_inode
from pkernfs.fs.transaction import Transaction

DISCARD_BLOCKS = 1 << 20  #: 2 TiB: what one record of the journal can count
FREE_SLOT = Inode()
NO_BLOCK = BlockNo(0)  #: no block: the superblock's


class Allocator:
    """Takes memory of ``space``, within a transaction, and gives back at its end what it freed.

    Data blocks are taken from the lowest free address, slabs from the highest, so that the middle stays in one piece.
    Whatever is allocated reads as zero.  Raises FsError(ENOSPC); the transaction then puts everything back.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.region = space.region
        self.ahead = Ahead(space)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _set_kind(self, tx: Transaction, block: BlockNo, count: int, kind: int) -> None:
        space = self.space
        old = bytes(space.table[block : block + count])
        freed = (kind == BLOCK_FREE) * count - old.count(BLOCK_FREE)

        def undo() -> None:
            space.table[block : block + count] = old
            space.free_blocks -= freed
            if kind != BLOCK_FREE:
                self.region.discard(block * BLOCK, count * BLOCK)

        tx.undo.append(undo)
        space.table[block : block + count] = bytes([kind]) * count
        space.free_blocks += freed
        for index in range(block // TABLE_FANOUT, (block + count - 1) // TABLE_FANOUT + 1):
            tx.change(space.pages[index])

    def alloc_blocks(self, tx: Transaction, count: int, near: BlockNo = NO_BLOCK) -> list[tuple[BlockNo, int]]:
        """``count`` zeroed data blocks as runs (block, count): from ``near`` on, or in one piece, where possible."""
        space = self.space
        if count > space.free_blocks:
            raise FsError(errno.ENOSPC, f"{count} blocks of 2 MiB wanted, {space.free_blocks} are free")
        runs = self._choose(count, near)
        self.ahead.reserve(runs)
        for at, size in runs:
            self._set_kind(tx, at, size, BLOCK_DATA)
        return runs

    def _choose(self, count: int, near: BlockNo) -> list[tuple[BlockNo, int]]:
        """Free blocks for ``alloc_blocks``."""
        table, first = self.space.table, self.space.first_block
        runs: list[tuple[BlockNo, int]] = []
        size = count
        while count:
            size = min(size, count)
            if near and table[near : near + size] == bytes(size):
                at = near
            else:
                at = BlockNo(table.find(bytes(size), first))
            near = NO_BLOCK
            if at < 0:
                # Halves, not the largest run there is: finding that means reading the table once for each run, and
                # a file in up to twice as many pieces costs less than that in a region of many TiB.
                size = (size + 1) // 2
                continue
            runs.append((at, size))
            count -= size
            if count:
                if table is self.space.table:
                    table = table[:]
                table[at : at + size] = bytes([BLOCK_DATA]) * size
        return runs

    # -- pages ----------------------------------------------------------------------------------------------------

    def new_slab(self, tx: Transaction) -> Slab:
        """The last free block, cut into pages."""
        space = self.space
        block = BlockNo(space.table.rfind(BLOCK_FREE, space.first_block))
        if block < 0:
            raise FsError(errno.ENOSPC, "no block of 2 MiB is free for a new slab")
        self.ahead.reserve([(block, 1)])
        self._set_kind(tx, block, 1, BLOCK_SLAB)
        slab = space.slabs[block] = Slab.empty(block)
        tx.change(slab)
        space.with_pages.add(block)
        return slab

    def _slab_with_page(self, tx: Transaction) -> Slab:
        space = self.space
        while space.with_pages:
            # Any slab, not the fullest: which is full would have to be kept in order, and no slab is worth emptying,
            # as its block is free only when the last inode in it is.
            block = next(iter(space.with_pages))
            if space.table[block] == BLOCK_SLAB:
                slab = space.usable_slab(block)
                if slab and slab.free:
                    return slab
            space.with_pages.discard(block)
        return self.new_slab(tx)

    def alloc_pages(self, tx: Transaction, count: int, kind: int) -> list[tuple[PageNo, int]]:
        """``count`` zeroed pages as runs (page, count), in one piece where a slab has it.

        Pages for tree nodes are not zeroed: they are stored whole.
        """
        runs: list[tuple[PageNo, int]] = []
        while count:
            slab = self._slab_with_page(tx)
            size = min(count, slab.free)
            at = slab.kinds.find(bytes(size))
            while at < 0:
                size = (size + 1) // 2
                at = slab.kinds.find(bytes(size))
            tx.change(slab)
            slab.kinds[at : at + size] = bytes([kind]) * size
            slab.free -= size
            page = PageNo(slab.block * PAGES_PER_BLOCK + at)
            if kind != PAGE_NODE:
                self.region.zero(page * PAGE, size * PAGE)
            runs.append((page, size))
            count -= size
        return runs

    def alloc_page(self, tx: Transaction, kind: int) -> PageNo:
        """One page; its number."""
        return self.alloc_pages(tx, 1, kind)[0][0]

    # -- inode slots ----------------------------------------------------------------------------------------------

    def alloc_inode(self, tx: Transaction) -> Ino:
        """The number of a free slot, now in use."""
        space = self.space
        slab = None
        index = -1
        while space.with_slots and index < 0:
            block = next(iter(space.with_slots))
            if space.table[block] == BLOCK_SLAB:
                slab = space.usable_slab(block)
                index = slab.page_with_slots() if slab else -1
            if index < 0:
                space.with_slots.discard(block)
        if slab is None or index < 0:
            page = self.alloc_page(tx, PAGE_INODES)
            block, index = block_of(page)
            slab = space.slab(block)
            slab.first_with_slots = min(slab.first_with_slots, index)
            space.with_slots.add(block)
        tx.change(slab)
        free = ~slab.slots[index] & ALL_SLOTS
        slot = (free & -free).bit_length() - 1
        slab.slots[index] |= 1 << slot
        slab.inodes += 1
        ino = Ino((slab.block * PAGES_PER_BLOCK + index) * INODES_PER_PAGE + slot)
        tx.before[ino] = FREE_SLOT
        return ino

    # -- the end of a transaction ---------------------------------------------------------------------------------

    def apply_frees(self, tx: Transaction) -> list[tuple[int, int]]:
        """Free what the transaction gave up; the ranges (offset, length) whose memory goes back to the host.

        Raises CorruptError when a part of it is not in use (any more): two structures point to it.
        """
        touched: dict[BlockNo, Slab] = {}
        for ino in tx.freed_inodes:
            self._free_slot(tx, ino, touched)
        for page, count in tx.freed_pages:
            self._free_pages(tx, page, count, touched)
        for block, slab in touched.items():
            self.space.with_pages.add(block)
            if slab.free == PAGES_PER_BLOCK - 1:
                tx.free_blocks(block, 1)
                del tx.pages[slab.offset]
                self.space.drop_slab(block)
                tx.undo.append(lambda block=block: self.space.relist(block))  # type: ignore[misc]
        discards = []
        for block, count in tx.freed_blocks:
            if BLOCK_FREE in self.space.table[block : block + count]:
                raise CorruptError("the block table", block * BLOCK, f"{count} blocks were freed that are not in use")
            self._set_kind(tx, block, count, BLOCK_FREE)
            for at in range(block, block + count, DISCARD_BLOCKS):
                discards.append((at * BLOCK, min(DISCARD_BLOCKS, block + count - at) * BLOCK))
        return discards

    def _free_slot(self, tx: Transaction, ino: Ino, touched: dict[BlockNo, Slab]) -> None:
        page, slot = page_of_inode(ino)
        block, index = block_of(page)
        slab = touched[block] = self.space.slab(block)
        if slab.kinds[index] != PAGE_INODES or not slab.slots[index] >> slot & 1:
            raise corrupt_inode(ino, "it was freed twice")
        tx.change(slab)
        slab.slots[index] &= ~(1 << slot)
        slab.inodes -= 1
        slab.first_with_slots = min(slab.first_with_slots, index)
        self.space.with_slots.add(block)
        if not slab.slots[index]:
            slab.kinds[index] = PAGE_FREE
            slab.free += 1

    def _free_pages(self, tx: Transaction, page: PageNo, count: int, touched: dict[BlockNo, Slab]) -> None:
        block, index = block_of(page)
        slab = touched[block] = self.space.slab(block)
        kinds = slab.kinds[index : index + count]
        if (
            len(kinds) != count
            or PAGE_FREE in kinds
            or PAGE_HEADER in kinds
            or page <= self.space.far_copy < page + count
        ):
            raise CorruptError(f"slab {block}", page * PAGE, f"{count} pages were freed that are not in use")
        tx.change(slab)
        slab.kinds[index : index + count] = bytes(count)
        slab.free += count
