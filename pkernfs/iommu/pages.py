"""The pages of a file of page tables: which are in use, and where they are."""

from __future__ import annotations

import errno
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    BITMAP_PAGES,
    INODE_SIZE,
    PAGE,
    PAGES_PER_BLOCK,
    Extent,
    FilePage,
    Ino,
    Inode,
    PhysAddr,
    TablePage,
)
from pkernfs.fs.chunks import allocate
from pkernfs.fs.damage import NO_PAGE, corrupt_inode
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.runs import joined_runs
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.iommu.formats import ADDRESS, ENTRIES

NO_RUN = (TablePage(0), 0)


class TablePages:
    """The pages of inode ``ino``, by their number in the file.

    Changes end with ``finish``.
    """

    def __init__(self, volume: Volume, ino: Ino) -> None:
        self.volume = volume
        self.region = volume.region
        self.base = volume.sb.phys_base
        self.ino = ino
        self.inode = volume.inode(ino)
        self.filemap = FileMap(volume, ino, self.inode)
        self.bitmaps: dict[int, tuple[int, int]] = {}  #: by number: as it is in the region, and as it is to be
        self.free_runs: Iterator[tuple[TablePage, int]] | None = None
        self.run = NO_RUN
        self.awaiting = 0  #: pages that tables were in and that await an invalidation, for messages
        self._locate()

    def _locate(self) -> None:
        extents = list(self.filemap.extents())
        end = 0
        for extent in extents:
            if extent.start != end:
                raise self._bad_inode(f"no memory at page {end}")
            end += extent.length
        if end * PAGE != self.inode.size:
            raise self._bad_inode(f"a size of {self.inode.size}, with {end} pages of memory")
        self.starts = [extent.start for extent in extents]
        self.extents = extents
        self.by_region = sorted(extents, key=lambda extent: extent.page)
        self.region_starts = [extent.page for extent in self.by_region]

    def bad(self, found: str) -> CorruptError:
        """An error in the tables.  They can be made anew: it does not say that the inode is damaged."""
        return CorruptError(f"the page tables of inode {self.ino}", self.ino * INODE_SIZE, found)

    def _bad_inode(self, found: str) -> CorruptError:
        return corrupt_inode(self.ino, found)

    # -- where they are -------------------------------------------------------------------------------------------

    def offset(self, page: TablePage) -> int:
        """The region offset of a page.  Raises CorruptError when the file has no memory there."""
        index = bisect_right(self.starts, page) - 1
        extent = self.extents[index] if index >= 0 else Extent(FilePage(0), NO_PAGE, 0)
        if not extent.start <= page < extent.start + extent.length:
            raise self.bad(f"page {page} has no memory")
        return (extent.page + page - extent.start) * PAGE

    def physical(self, page: TablePage) -> PhysAddr:
        """The physical address of a page."""
        return PhysAddr(self.base + self.offset(page))

    def target(self, entry: int) -> TablePage | None:
        """The page that an entry (of any table) points to; None: it is none of this file."""
        address = entry & ADDRESS
        number = (address - self.base) // PAGE
        index = bisect_right(self.region_starts, number) - 1
        if address < self.base or index < 0:
            return None
        extent = self.by_region[index]
        skip = number - extent.page
        return TablePage(extent.start + skip) if skip < extent.length else None

    def read(self, page: TablePage) -> array[int]:
        """The 512 entries of a table."""
        return array("Q", self.region.read(self.offset(page), PAGE))

    # -- which are in use -----------------------------------------------------------------------------------------

    def _bitmap(self, number: int) -> int:
        if number not in self.bitmaps:
            raw = self.region.read(self.offset(bitmap_page(number)), PAGE)
            old = int.from_bytes(raw, "little")
            self.bitmaps[number] = (old, old)
        return self.bitmaps[number][1]

    def _numbers(self) -> range:
        return range(-(-self.inode.size // (BITMAP_PAGES * PAGE)))

    def _runs(self, digit: str, number: int) -> Iterator[tuple[TablePage, int]]:
        """(page, count): the runs of used ("1") or free ("0") pages of bitmap ``number``."""
        # As digits, searched by a regular expression: 0.3 ms for a bitmap with 200 runs, where shifting the number from
        # run to run takes 2.5 ms and a look at each bit 38 ms.
        pages = min(self.inode.size // PAGE - number * BITMAP_PAGES, BITMAP_PAGES)
        bits = format(self._bitmap(number), f"0{BITMAP_PAGES}b")[::-1][:pages]
        for match in re.finditer(f"{digit}+", bits):
            yield TablePage(bitmap_page(number) + match.start()), match.end() - match.start()

    def used(self) -> Iterator[tuple[TablePage, int]]:
        """(page, count): the runs of pages in use, those of the bitmaps too."""
        for number in self._numbers():
            yield from self._runs("1", number)

    def used_count(self) -> int:
        """Pages in use, without those of the bitmaps."""
        return sum(self._bitmap(number).bit_count() for number in self._numbers()) - len(self._numbers())

    def in_use(self, page: TablePage) -> bool:
        """Whether the bit of a page is set."""
        return bool(self._bitmap(page // BITMAP_PAGES) >> page % BITMAP_PAGES & 1)

    def _mark(self, page: TablePage, count: int, use: bool) -> None:
        number, bit = divmod(page, BITMAP_PAGES)
        now = self._bitmap(number)
        mask = (1 << count) - 1 << bit
        if now & mask != (0 if use else mask):
            raise self.bad(f"{count} pages from {page} on: expected them {'free' if use else 'in use'}")
        self.bitmaps[number] = (self.bitmaps[number][0], now ^ mask)

    # -- changing -------------------------------------------------------------------------------------------------

    def grow(self, tx: Transaction, blocks: int = 1) -> TablePage:
        """Add blocks of 2 MiB; the first of their pages.  Raises FsError: ENOSPC, EDQUOT, and changes nothing then."""
        first = TablePage(self.inode.size // PAGE)
        end = first + blocks * PAGES_PER_BLOCK
        if self.volume.space.free_blocks < blocks:
            awaiting = f"; {self.awaiting} pages await pkernfs iommu invalidations --ack" if self.awaiting else ""
            raise FsError(errno.ENOSPC, f"{blocks} more blocks of 2 MiB for page tables{awaiting}")
        allocate(tx, self.filemap, FilePage(first), FilePage(end))
        self.inode = self.inode._replace(size=end * PAGE)
        self._locate()
        for page in range(-(-first // BITMAP_PAGES) * BITMAP_PAGES, end, BITMAP_PAGES):
            self.bitmaps[page // BITMAP_PAGES] = (0, 1)
        return first

    def allocate(self, tx: Transaction) -> TablePage:
        """A page that is free, or of a block that the file grows by.  What it holds is anything: store all of it."""
        page, left = self.run
        while not left:
            if self.free_runs is None:
                self.free_runs = (run for number in self._numbers() for run in list(self._runs("0", number)))
            found = next(self.free_runs, None)
            if found is None:
                self.free_runs = None
                if self.inode.size:
                    self.grow(tx)
                    self.free_runs = iter(list(self._runs("0", self._numbers()[-1])))
                else:
                    self.grow(tx)
            else:
                page, left = found
        self.run = (TablePage(page + 1), left - 1)
        self._mark(page, 1, True)
        return page

    def use_new_blocks(self) -> None:
        """Let ``allocate`` give pages of blocks only that the file grows by from now on; mark those of bitmaps."""
        self.free_runs, self.run = iter(()), NO_RUN
        for number in self._numbers():
            now = self._bitmap(number)
            self.bitmaps[number] = (self.bitmaps[number][0], now | 1)

    def check_used(self, page: TablePage) -> TablePage:
        """A page that a table is in; raises CorruptError when it is marked as free, so that it could be given away."""
        if not self.in_use(page):
            raise self.bad(f"page {page} is a table, and is marked as free")
        return page

    def has_free(self, count: int) -> bool:
        """Whether ``count`` pages are free without growing."""
        return self.inode.size // PAGE - len(self._numbers()) - self.used_count() >= count

    def allocate_block(self, tx: Transaction) -> TablePage:
        """The first of 512 pages that are one block."""
        if not self.inode.size:
            self.grow(tx)
        # A device table is one piece of memory for the hardware, and one for all devices of a segment is a whole block.
        # A smaller one (DevTabBase has a size) would have to move when a device of a higher bus comes: hardware would
        # have to be stopped for that.
        page = self.grow(tx)
        if page % BITMAP_PAGES == 0:  # the block with a bitmap in it stays for single pages
            page = self.grow(tx)
        self._mark(page, PAGES_PER_BLOCK, True)
        return page

    def use_only(self, tx: Transaction, pages: set[TablePage], *, marked: bool = True) -> int:
        """Free all pages but these and the bitmaps, and blocks that are wholly free at the end; how many were freed.

        ``marked``: they are marked as used already (CorruptError).
        """
        kept: dict[int, bytearray] = {number: bytearray(PAGE) for number in self._numbers()}
        for page in pages:
            number, bit = divmod(page, BITMAP_PAGES)
            kept[number][bit >> 3] |= 1 << (bit & 7)
        freed = 0
        for number, raw in kept.items():
            raw[0] |= 1
            was, new = self._bitmap(number), int.from_bytes(raw, "little")
            if marked and new & ~was:
                raise self.bad("tables in pages that are not marked as used")
            freed += (was & ~new).bit_count()
            self.bitmaps[number] = (self.bitmaps[number][0], new)
        self._trim(tx)
        return freed

    def _trim(self, tx: Transaction) -> None:
        """Give back blocks at the end that nothing is in; the first one stays."""
        pages = self.inode.size // PAGE
        while pages > PAGES_PER_BLOCK:
            number, bit = divmod(pages - PAGES_PER_BLOCK, BITMAP_PAGES)
            used = self._bitmap(number) >> bit
            if used > (1 if bit == 0 else 0):
                break
            if bit == 0:
                del self.bitmaps[number]
            pages -= PAGES_PER_BLOCK
        if pages * PAGE < self.inode.size:
            self.filemap.remove(tx, FilePage(pages), FilePage(self.inode.size // PAGE))
            self.inode = self.inode._replace(size=pages * PAGE)
            self._locate()
            self.free_runs, self.run = None, NO_RUN

    def store(self, page: TablePage, entries: array[int]) -> None:
        """Fill a page (or a block) that was allocated in this transaction, and that nothing points to yet."""
        self.region.store(self.offset(page), entries.tobytes())

    def words(self, tx: Transaction, page: TablePage, index: int, values: Iterable[int]) -> None:
        """Store entries from ``index`` on when the transaction commits, one by one."""
        data = array("Q", values).tobytes()
        tx.words.append((self.offset(page) + 8 * index, data))

    def finish(self, tx: Transaction) -> Inode:
        """Put the file's inode and the bitmaps into the transaction."""
        stores = []
        for number, (old, new) in self.bitmaps.items():
            if old != new:
                was, now = (array("Q", value.to_bytes(PAGE, "little")) for value in (old, new))
                at = self.offset(bitmap_page(number))
                changed = [index for index in range(ENTRIES) if was[index] != now[index]]
                for first, count in joined_runs((index, 1) for index in changed):
                    stores.append((at + 8 * first, now[first : first + count].tobytes()))
        # Ahead of the tables' own words: only we look at the bitmaps.
        tx.words[:0] = stores
        stamp = self.volume.clock()
        inode = self.filemap.finish()._replace(size=self.inode.size, mtime=stamp, ctime=stamp)
        tx.put_inode(self.ino, inode)
        return inode


def bitmap_page(number: int) -> TablePage:
    """Where a bitmap is: at the beginning of the pages that it tells of."""
    return TablePage(number * BITMAP_PAGES)
