"""Which memory a file gets, page by page or in whole blocks, and when it is moved from one to the other.

A chunk is a range of 512 pages of a file that begins at a multiple of 512: what one block can hold.  Small and sparse
chunks are made of single pages from slabs; a chunk that is at least half full is one block.  So a one-byte file costs
4 KiB, and a large file is made of blocks, in one piece where possible: hardware maps it with large leaves then, and
QEMU finds a guest's memory as one range.

With ``FileMap.compact`` a block may be taken where pages would do, and pages may be moved together into a block, or out
of one that is hardly used.  That can need space that is not there: see Volume.compacting.
"""

from __future__ import annotations

from collections.abc import Iterator

from pkernfs.format import FLAG_REGION_MAPPED, GUARDED, PAGE, PAGE_DATA, PAGES_PER_BLOCK, BlockNo, FilePage, PageNo
from pkernfs.fs.charge import check_room
from pkernfs.fs.damage import NO_PAGE
from pkernfs.fs.filemap import END, FileMap
from pkernfs.fs.guard import pins
from pkernfs.fs.transaction import Transaction

# A block for less than half of it would waste more than it holds; with more, a guest's memory that is written from its
# start, or in any order, would be copied from pages to blocks when nearly all of it has been written.
HALF = PAGES_PER_BLOCK // 2
#: flags of inodes whose pages must stay where they are
PINNED = FLAG_REGION_MAPPED | GUARDED


def allocate(tx: Transaction, filemap: FileMap, first: FilePage, end: FilePage) -> None:
    """Map every hole in pages [first, end) to zeroed memory.  Raises FsError: ENOSPC, EDQUOT."""
    if filemap.inode.project:
        check_room(tx, filemap.ino, filemap.inode, sum(until - at for at, until in _holes(filemap, first, end)))
    for at, until in _holes(filemap, first, end):
        _fill(tx, filemap, at, until)


def _holes(filemap: FileMap, first: FilePage, end: FilePage) -> Iterator[tuple[FilePage, FilePage]]:
    """The holes in pages [first, end), each as it is when the one before has been looked at."""
    while first < end:
        page, run = filemap.find(first)
        run = min(run, end - first)
        if not page:
            yield first, FilePage(first + run)
        first = FilePage(first + run)


def _fill(tx: Transaction, filemap: FileMap, first: FilePage, end: FilePage) -> None:
    """Allocate the hole [first, end)."""
    while first < end:
        chunk = FilePage(first - first % PAGES_PER_BLOCK)
        last = _last_chunk(filemap, chunk, end) if first == chunk and _wants_block(filemap, chunk, end) else chunk
        if last > chunk:
            # All whole chunks at once, and the rest of the last one with them: in one piece where possible.
            count = (last - chunk) // PAGES_PER_BLOCK
            for block, blocks in filemap.volume.allocator.alloc_blocks(tx, count, _block_behind(filemap, chunk)):
                filemap.add(tx, chunk, PageNo(block * PAGES_PER_BLOCK), blocks * PAGES_PER_BLOCK)
                chunk = FilePage(chunk + blocks * PAGES_PER_BLOCK)
            first = last
            continue
        step = min(end, FilePage(chunk + PAGES_PER_BLOCK))
        if not _make_block(tx, filemap, chunk, step - first):
            at = first
            for page, count in filemap.volume.allocator.alloc_pages(tx, step - first, PAGE_DATA):
                filemap.add(tx, at, page, count)
                at = FilePage(at + count)
        first = step


def _block_behind(filemap: FileMap, chunk: FilePage) -> BlockNo:
    """The block behind the one that holds the chunk before this one: where it would be in one piece; or 0."""
    before = filemap.find(FilePage(chunk - 1))[0] if chunk else NO_PAGE
    return BlockNo(before // PAGES_PER_BLOCK + 1 if before and filemap.is_block(before) else 0)


def _wants_block(filemap: FileMap, chunk: FilePage, end: FilePage) -> bool:
    """Whether the empty chunk, to be filled from its start to ``end``, is to be a block."""
    wanted = end - chunk >= (HALF if filemap.compact else PAGES_PER_BLOCK)
    if not wanted and filemap.compact:
        wanted = _block_behind(filemap, chunk) != 0
    return wanted and filemap.find(chunk)[1] >= PAGES_PER_BLOCK


def _last_chunk(filemap: FileMap, chunk: FilePage, end: FilePage) -> FilePage:
    """The end of the run of chunks from ``chunk`` on that are empty, begin below ``end`` and can be blocks.

    When there is a block too few, or none is to be taken for a part, the last chunk is left for pages.
    """
    hole = filemap.find(chunk)[1] // PAGES_PER_BLOCK
    whole, rest = divmod(end - chunk, PAGES_PER_BLOCK)
    count = min(whole + (rest > 0), hole)
    if count > whole and (not filemap.compact or count > filemap.volume.space.free_blocks):
        count = whole
    return FilePage(chunk + count * PAGES_PER_BLOCK)


def _make_block(tx: Transaction, filemap: FileMap, chunk: FilePage, more: int) -> bool:
    """Turn the pages of a chunk into one block when ``more`` pages make it half full; whether it is done.

    Moves data: never done to pinned files.
    """
    end = FilePage(chunk + PAGES_PER_BLOCK)
    old = list(filemap.until(chunk, end))
    mapped = sum(min(e.start + e.length, end) - max(e.start, chunk) for e in old)
    if mapped + more < HALF or not _may_move(filemap) or not filemap.volume.space.free_blocks:
        return False
    block, _ = filemap.volume.allocator.alloc_blocks(tx, 1, _block_behind(filemap, chunk))[0]
    _move(tx, filemap, chunk, end, [(PageNo(block * PAGES_PER_BLOCK), PAGES_PER_BLOCK)])
    return True


def cut_at(filemap: FileMap, end: FilePage) -> FilePage:
    """From which page on a file that is to have ``end`` pages can be cut: a block that is needed in part stays."""
    chunk = FilePage(end - end % PAGES_PER_BLOCK)
    page, _ = filemap.find(chunk)
    return FilePage(chunk + PAGES_PER_BLOCK) if end > chunk and page and filemap.is_block(page) else end


def truncate(tx: Transaction, filemap: FileMap, end: FilePage, most: int) -> bool:
    """Unmap what lies beyond ``end`` pages, or the first ``most`` extents of that; True: all of it.

    A block that is needed in part stays, unless it can become pages.
    """
    behind = cut_at(filemap, end)
    if not filemap.remove(tx, behind, END, most):
        return False
    if behind == end:
        return True
    chunk = FilePage(end - end % PAGES_PER_BLOCK)
    left = end - chunk
    allocator = filemap.volume.allocator
    if left < HALF and _may_move(filemap) and filemap.volume.space.has_pages(left):
        _move(tx, filemap, chunk, behind, allocator.alloc_pages(tx, left, PAGE_DATA))
    return True


def _may_move(filemap: FileMap) -> bool:
    return filemap.compact and not filemap.inode.flags & PINNED and not pins(filemap.inode)


def _move(tx: Transaction, filemap: FileMap, first: FilePage, end: FilePage, runs: list[tuple[PageNo, int]]) -> None:
    """Copy pages [first, end) to ``runs`` (zeroed), as far as they go, and map those instead."""
    region = filemap.volume.region
    at = first
    copies = []
    for page, count in runs:
        copies.append((at, page, count))
        for extent in filemap.until(at, FilePage(at + count)):
            low, high = max(extent.start, at), min(extent.start + extent.length, at + count)
            source = (extent.page + low - extent.start) * PAGE
            region.store((page + low - at) * PAGE, region.present(source, (high - low) * PAGE))
        at = FilePage(at + count)
    filemap.remove(tx, first, end)
    for start, page, count in copies:
        filemap.add(tx, start, page, count)
