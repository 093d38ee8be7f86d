"""Where a file's pages are: extents, in the inode or in a tree, and the policy that picks pages or whole blocks.

A chunk is a range of 512 pages of a file that begins at a multiple of 512: what one block can hold.  Small and sparse
chunks are made of single pages from slabs; a chunk that is at least half full is one block.  So a one-byte file costs
4 KiB, and a large file is made of blocks, in one piece where possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK_DATA,
    EXTENT,
    EXTENT_VALUE,
    FLAG_REGION_MAPPED,
    GUARDED,
    INLINE_EXTENTS,
    INLINE_SIZE,
    MAX_FILE_SIZE,
    PAGE,
    PAGE_DATA,
    PAGES_PER_BLOCK,
    BlockNo,
    Extent,
    ExtentValue,
    FilePage,
    Ino,
    Inode,
    PageNo,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.charge import check_room
from pkernfs.fs.damage import NO_PAGE, corrupt_inode
from pkernfs.fs.guard import pins
from pkernfs.fs.space import block_of
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume

HALF = PAGES_PER_BLOCK // 2
MAX_PAGES = 1 << 52  #: more than any file has
FIRST, END = FilePage(0), FilePage(MAX_PAGES)
#: flags of inodes whose pages must stay where they are
PINNED = FLAG_REGION_MAPPED | GUARDED


def end_of(size: int) -> FilePage:
    """The first page behind a file of ``size`` bytes."""
    return FilePage(-(-size // PAGE))


class FileMap:
    """The extents of inode ``ino``.  ``finish`` gives the changed inode.

    ``compact``: a block may be taken where pages would do, and pages may be moved together into a block, or out of one
    that is hardly used.  That can need space that is not there: see Volume.compacting.
    """

    def __init__(self, volume: Volume, ino: Ino, inode: Inode, *, compact: bool = True) -> None:
        self.compact = compact
        self.volume = volume
        self.ino = ino
        self.inode = inode
        self.tree = Tree(volume, ino, inode.root)
        self.inline: list[Extent] = [] if inode.root else self._decode_inline(inode.inline)
        self.pages = inode.pages

    def _decode_inline(self, raw: bytes) -> list[Extent]:
        extents = []
        end = 0
        for at in range(0, INLINE_EXTENTS * EXTENT.size, EXTENT.size):
            extent = EXTENT.unpack(raw, at)
            if not extent.length:
                break
            self._check(extent)
            if extent.start < end:
                raise self._bad(f"{extent} overlaps the one before")
            end = extent.start + extent.length
            extents.append(extent)
        return extents

    def _bad(self, found: str) -> CorruptError:
        return corrupt_inode(self.ino, found, f"the extents of inode {self.ino}")

    def _check(self, extent: Extent) -> None:
        if extent.start + extent.length > MAX_FILE_SIZE // PAGE or not self.volume.space.is_data(*extent):
            raise self._bad(f"{extent} is not memory for data")

    # -- reading --------------------------------------------------------------------------------------------------

    def _tree_extent(self, item: tuple[int, bytes]) -> Extent:
        if len(item[1]) != EXTENT_VALUE.size:
            raise self._bad(f"a value of {len(item[1])} bytes")
        extent = Extent(FilePage(item[0]), *EXTENT_VALUE.unpack(item[1]))
        self._check(extent)
        return extent

    def extents(self, first: FilePage = FIRST) -> Iterator[Extent]:
        """The extents that end above page ``first``, in order."""
        if not self.tree.root:
            for extent in self.inline:
                if extent.start + extent.length > first:
                    yield extent
            return
        below = self.tree.floor(first)
        end = 0
        for item in self.tree.scan(below[0] if below else first):
            extent = self._tree_extent(item)
            if extent.start < end:
                raise self._bad(f"{extent} overlaps the one before")
            end = extent.start + extent.length
            if end > first:
                yield extent

    def find(self, page: FilePage) -> tuple[PageNo, int]:
        """(region page, run): what page ``page`` of the file is, and for how many pages it goes on like that.

        Region page 0 means a hole; the run of the last hole is huge.
        """
        for extent in self.extents(page):
            if extent.start > page:
                return NO_PAGE, extent.start - page
            skip = page - extent.start
            return PageNo(extent.page + skip), extent.length - skip
        return NO_PAGE, MAX_PAGES

    def is_block(self, page: PageNo) -> bool:
        """Whether region page ``page`` is in a data block (and not in a slab)."""
        return self.volume.space.table[page // PAGES_PER_BLOCK] == BLOCK_DATA

    # -- changing -------------------------------------------------------------------------------------------------

    def _put(self, tx: Transaction, extent: Extent) -> None:
        if not self.tree.root:
            self.inline.append(extent)
            self.inline.sort()
            if len(self.inline) <= INLINE_EXTENTS:
                return
            extents, self.inline = self.inline, []
            for one in extents:
                self.tree.put(tx, one.start, EXTENT_VALUE.pack(ExtentValue(one.page, one.length)))
        else:
            self.tree.put(tx, extent.start, EXTENT_VALUE.pack(ExtentValue(extent.page, extent.length)))

    def _delete(self, tx: Transaction, extent: Extent) -> None:
        if self.tree.root:
            self.tree.delete(tx, extent.start)
        else:
            self.inline.remove(extent)

    def _shorten(self, tx: Transaction, extent: Extent, length: int) -> None:
        """Keep the first ``length`` pages of an extent.  In place: allocates nothing."""
        if self.tree.root:
            self.tree.put(tx, extent.start, EXTENT_VALUE.pack(ExtentValue(extent.page, length)))
        else:
            self.inline[self.inline.index(extent)] = extent._replace(length=length)

    def _add(self, tx: Transaction, start: FilePage, page: PageNo, count: int) -> None:
        """Map a hole, merging with the extents before and behind where the pages go on."""
        self.pages += count
        for extent in list(self._around(start, count)):
            if extent.start + extent.length == start and extent.page + extent.length == page:
                self._delete(tx, extent)
                start, page, count = extent.start, extent.page, extent.length + count
            elif extent.start == start + count and extent.page == page + count:
                self._delete(tx, extent)
                count += extent.length
        self._put(tx, Extent(start, page, count))

    def _around(self, start: FilePage, count: int) -> Iterator[Extent]:
        for extent in self.extents(FilePage(max(start - 1, 0))):
            if extent.start > start + count:
                return
            yield extent

    def remove(self, tx: Transaction, first: FilePage, end: FilePage, most: int | None = None) -> bool:
        """Unmap pages [first, end), or the first ``most`` extents there, and free what they held at the commit.

        True: all is unmapped.  Allocates nothing unless it cuts out the middle of an extent.
        """
        extents = list(islice(self._until(first, end), None if most is None else most + 1))
        for extent in extents[:most]:
            cut_first = max(first, extent.start)
            cut_end = min(end, FilePage(extent.start + extent.length))
            if extent.start < cut_first:
                self._shorten(tx, extent, cut_first - extent.start)
            else:
                self._delete(tx, extent)
            if cut_end < extent.start + extent.length:
                skip = cut_end - extent.start
                self._put(tx, Extent(cut_end, PageNo(extent.page + skip), extent.length - skip))
            self._free(tx, PageNo(extent.page + cut_first - extent.start), cut_end - cut_first)
            self.pages -= cut_end - cut_first
        return most is None or len(extents) <= most

    def _until(self, first: FilePage, end: FilePage) -> Iterator[Extent]:
        for extent in self.extents(first):
            if extent.start >= end:
                return
            yield extent

    def _free(self, tx: Transaction, page: PageNo, count: int) -> None:
        table = self.volume.space.table
        while count:
            block, index = block_of(page)
            if table[block] == BLOCK_DATA:
                if index or count < PAGES_PER_BLOCK:
                    raise self._bad(f"part of data block {block}")
                blocks = 1
                while (blocks + 1) * PAGES_PER_BLOCK <= count and self.is_block(
                    PageNo((block + blocks) * PAGES_PER_BLOCK)
                ):
                    blocks += 1
                tx.free_blocks(block, blocks)
                step = blocks * PAGES_PER_BLOCK
            else:
                step = min(count, PAGES_PER_BLOCK - index)
                tx.free_pages(page, step)
            page = PageNo(page + step)
            count -= step

    def allocate(self, tx: Transaction, first: FilePage, end: FilePage) -> None:
        """Map every hole in pages [first, end) to zeroed memory.  Raises FsError: ENOSPC, EDQUOT."""
        if self.inode.project:
            check_room(tx, self.ino, self.inode, sum(until - at for at, until in self._holes(first, end)))
        for at, until in self._holes(first, end):
            self._fill(tx, at, until)

    def _holes(self, first: FilePage, end: FilePage) -> Iterator[tuple[FilePage, FilePage]]:
        """The holes in pages [first, end), each as it is when the one before has been looked at."""
        while first < end:
            page, run = self.find(first)
            run = min(run, end - first)
            if not page:
                yield first, FilePage(first + run)
            first = FilePage(first + run)

    def _fill(self, tx: Transaction, first: FilePage, end: FilePage) -> None:
        """Allocate the hole [first, end)."""
        while first < end:
            chunk = FilePage(first - first % PAGES_PER_BLOCK)
            last = self._last_chunk(chunk, end) if first == chunk and self._wants_block(chunk, end) else chunk
            if last > chunk:
                # All whole chunks at once, and the rest of the last one with them: in one piece where possible.
                count = (last - chunk) // PAGES_PER_BLOCK
                for block, blocks in self.volume.allocator.alloc_blocks(tx, count, self._block_behind(chunk)):
                    self._add(tx, chunk, PageNo(block * PAGES_PER_BLOCK), blocks * PAGES_PER_BLOCK)
                    chunk = FilePage(chunk + blocks * PAGES_PER_BLOCK)
                first = last
                continue
            step = min(end, FilePage(chunk + PAGES_PER_BLOCK))
            if not self._make_block(tx, chunk, step - first):
                at = first
                for page, count in self.volume.allocator.alloc_pages(tx, step - first, PAGE_DATA):
                    self._add(tx, at, page, count)
                    at = FilePage(at + count)
            first = step

    def _block_behind(self, chunk: FilePage) -> BlockNo:
        """The block behind the one that holds the chunk before this one: where it would be in one piece; or 0."""
        before = self.find(FilePage(chunk - 1))[0] if chunk else NO_PAGE
        return BlockNo(before // PAGES_PER_BLOCK + 1 if before and self.is_block(before) else 0)

    def _wants_block(self, chunk: FilePage, end: FilePage) -> bool:
        """Whether the empty chunk, to be filled from its start to ``end``, is to be a block."""
        if self.find(chunk)[1] < PAGES_PER_BLOCK:
            return False
        if not self.compact:
            return end - chunk >= PAGES_PER_BLOCK
        return end - chunk >= HALF or self._block_behind(chunk) != 0

    def _last_chunk(self, chunk: FilePage, end: FilePage) -> FilePage:
        """The end of the run of chunks from ``chunk`` on that are empty, begin below ``end`` and can be blocks.

        When there is a block too few, or none is to be taken for a part, the last chunk is left for pages.
        """
        hole = self.find(chunk)[1] // PAGES_PER_BLOCK
        whole, rest = divmod(end - chunk, PAGES_PER_BLOCK)
        count = min(whole + (rest > 0), hole)
        if count > whole and (not self.compact or count > self.volume.space.free_blocks):
            count = whole
        return FilePage(chunk + count * PAGES_PER_BLOCK)

    def _make_block(self, tx: Transaction, chunk: FilePage, more: int) -> bool:
        """Turn the pages of a chunk into one block when ``more`` pages make it half full; whether it is done.

        Moves data: never done to pinned files.
        """
        end = FilePage(chunk + PAGES_PER_BLOCK)
        old = list(self._until(chunk, end))
        mapped = sum(min(e.start + e.length, end) - max(e.start, chunk) for e in old)
        if mapped + more < HALF or not self._may_move() or not self.volume.space.free_blocks:
            return False
        block, _ = self.volume.allocator.alloc_blocks(tx, 1, self._block_behind(chunk))[0]
        self._move(tx, chunk, end, [(PageNo(block * PAGES_PER_BLOCK), PAGES_PER_BLOCK)])
        return True

    def truncate(self, tx: Transaction, end: FilePage, most: int) -> bool:
        """Unmap what lies beyond ``end`` pages, or the first ``most`` extents of that; True: all of it.

        A block that is needed in part stays, unless it can become pages.
        """
        chunk = FilePage(end - end % PAGES_PER_BLOCK)
        behind = FilePage(chunk + PAGES_PER_BLOCK)
        page, _ = self.find(chunk)
        if end == chunk or not page or not self.is_block(page):
            return self.remove(tx, end, END, most)
        if not self.remove(tx, behind, END, most):
            return False
        left = end - chunk
        allocator = self.volume.allocator
        if left < HALF and self._may_move() and self.volume.space.has_pages(left):
            self._move(tx, chunk, behind, allocator.alloc_pages(tx, left, PAGE_DATA))
        return True

    def _may_move(self) -> bool:
        return self.compact and not self.inode.flags & PINNED and not pins(self.inode)

    def _move(self, tx: Transaction, first: FilePage, end: FilePage, runs: list[tuple[PageNo, int]]) -> None:
        """Copy pages [first, end) to ``runs`` (zeroed), as far as they go, and map those instead."""
        region = self.volume.region
        at = first
        copies = []
        for page, count in runs:
            copies.append((at, page, count))
            for extent in self._until(at, FilePage(at + count)):
                low, high = max(extent.start, at), min(extent.start + extent.length, at + count)
                source = (extent.page + low - extent.start) * PAGE
                region.store((page + low - at) * PAGE, region.view[source : source + (high - low) * PAGE])
            at = FilePage(at + count)
        self.remove(tx, first, end)
        for start, page, count in copies:
            self._add(tx, start, page, count)

    def finish(self) -> Inode:
        """The inode with the changes."""
        inline = b"".join(map(EXTENT.pack, self.inline))
        return self.inode._replace(
            root=self.tree.root,
            pages=self.pages + self.tree.pages,
            inline=inline + bytes(INLINE_SIZE - len(inline)),
        )
