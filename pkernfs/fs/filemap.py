"""Where a file's pages are: extents, in the inode or in a tree.  Which memory they get is chosen in chunks.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK_DATA,
    EXTENT,
    EXTENT_VALUE,
    INLINE_EXTENTS,
    INLINE_SIZE,
    MAX_FILE_SIZE,
    PAGE,
    PAGES_PER_BLOCK,
    Extent,
    ExtentValue,
    FilePage,
    Ino,
    Inode,
    PageNo,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.damage import NO_PAGE, corrupt_inode
from pkernfs.fs.space import block_of
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume

MAX_PAGES = 1 << 52  #: more than any file has
FIRST, END = FilePage(0), FilePage(MAX_PAGES)


def end_of(size: int) -> FilePage:
    """The first page behind a file of ``size`` bytes."""
    return FilePage(-(-size // PAGE))


def _place(extent: Extent) -> str:
    return f"the extent of pages {extent.start} to {extent.start + extent.length - 1}"


class FileMap:
    """The extents of inode ``ino``.  ``finish`` gives the changed inode.

    ``compact``: a block may be taken where pages would do, and pages may be moved: see chunks.py.
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
                raise self._bad(f"{_place(extent)} overlaps the one before")
            end = extent.start + extent.length
            extents.append(extent)
        return extents

    def _bad(self, found: str) -> CorruptError:
        return corrupt_inode(self.ino, found, f"the extents of inode {self.ino}")

    def _check(self, extent: Extent) -> None:
        if extent.start + extent.length > MAX_FILE_SIZE // PAGE or not self.volume.space.is_data(*extent):
            at = f"{extent.length} pages from page {extent.page} of the region on"
            raise self._bad(f"{_place(extent)} is at {at}, which is not memory for data")

    # -- reading --------------------------------------------------------------------------------------------------

    def _tree_extent(self, item: tuple[int, bytes]) -> Extent:
        if len(item[1]) != EXTENT_VALUE.size:
            raise self._bad(f"an extent of {len(item[1])} bytes, expected {EXTENT_VALUE.size}")
        extent = Extent(FilePage(item[0]), *EXTENT_VALUE.unpack(item[1]))
        self._check(extent)
        return extent

    def extents(self, first: FilePage = FIRST) -> Iterator[Extent]:
        """The extents that end behind page ``first``, in order."""
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
                raise self._bad(f"{_place(extent)} overlaps the one before")
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

    def add(self, tx: Transaction, start: FilePage, page: PageNo, count: int) -> None:
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
        taken, done = self._take(tx, first, end, most)
        for _, page, count in taken:
            self._free(tx, page, count)
        return done

    def move(self, tx: Transaction, first: FilePage, end: FilePage, to: FileMap, most: int) -> bool:
        """Unmap as ``remove``, and map what was there in another file, at the same pages.

        Raises FsError: ENOSPC, EDQUOT.
        """
        taken, done = self._take(tx, first, end, most)
        for start, page, count in taken:
            to.add(tx, start, page, count)
        return done

    def _take(self, tx: Transaction, first: FilePage, end: FilePage, most: int | None) -> tuple[list[Extent], bool]:
        """Unmap pages [first, end), or the first ``most`` extents there: what they held, and whether that is all."""
        taken = []
        extents = list(islice(self.until(first, end), None if most is None else most + 1))
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
            taken.append(Extent(cut_first, PageNo(extent.page + cut_first - extent.start), cut_end - cut_first))
            self.pages -= cut_end - cut_first
        return taken, most is None or len(extents) <= most

    def until(self, first: FilePage, end: FilePage) -> Iterator[Extent]:
        """The extents that touch pages [first, end)."""
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
                    raise self._bad(f"a part of data block {block}, which belongs to one file as a whole")
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

    def finish(self) -> Inode:
        """The inode with the changes."""
        inline = b"".join(map(EXTENT.pack, self.inline))
        return self.inode._replace(
            root=self.tree.root,
            pages=self.pages + self.tree.pages,
            inline=inline + bytes(INLINE_SIZE - len(inline)),
        )
