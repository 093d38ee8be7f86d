"""The extents of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkernfs.format import EXTENT, EXTENT_VALUE, INLINE_EXTENTS, Extent, ExtentValue, Inode
from pkernfs.fs.pages import has_extents
from pkernfs.fsck.check.trees import is_extent, items, keep

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker


def extents(checker: Checker, ino: int, inode: Inode) -> None:
    """Of two extents that overlap the first is the one that is too long, for each says where it begins."""
    if not has_extents(inode):
        return
    kept: list[tuple[int, bytes]] = []
    dropped: list[str] = []
    for extent, end in _ordered(checker, ino, inode, dropped):
        claimed = extent._replace(length=min(extent.length, end - extent.start))
        good = checker.ledger.claim_extent(claimed)
        if good != [extent]:
            dropped.append(f"memory of pages {extent.start:#x}+{extent.length:#x} of the file")
        if checker.ledger.salvage:
            kept += [(e.start, EXTENT_VALUE.pack(ExtentValue(e.page, e.length))) for e in good]
    keep(checker, ino, "root", kept, dropped)


def _ordered(checker: Checker, ino: int, inode: Inode, dropped: list[str]) -> Iterator[tuple[Extent, int]]:
    """The extents, each with the page of the file where it must end."""
    last: Extent | None = None
    for extent in _all_extents(checker, ino, inode, dropped):
        if last:
            if extent.start < last.start + last.length:
                checker.note("extent-order", f"inode {ino:#x}: expected a start behind {last}, found {extent}")
            if extent.start <= last.start:
                dropped.append(f"memory of pages {extent.start:#x}+{extent.length:#x} of the file")
                continue
            yield last, extent.start
        last = extent
    if last:
        yield last, last.start + last.length


def _all_extents(checker: Checker, ino: int, inode: Inode, dropped: list[str]) -> Iterator[Extent]:
    if not inode.root:
        checker.ledger.tally.nodes, checker.ledger.tally.broken = [], False
        for at in range(0, INLINE_EXTENTS * EXTENT.size, EXTENT.size):
            extent = EXTENT.unpack(inode.inline, at)
            if not extent.length:
                if inode.inline[at:].strip(b"\0"):
                    checker.note("extent-value", f"inode {ino:#x}: expected {at // EXTENT.size} extents, found more")
                    dropped.append("what stood behind the extents")
                return
            yield extent
        return
    for key, value in items(checker, inode.root, is_extent):
        if len(value) != EXTENT_VALUE.size:
            checker.note("extent-value", f"inode {ino:#x}: expected 16 bytes, found an extent of {len(value)}")
            dropped.append("an extent that cannot be read")
        else:
            yield Extent(key, *EXTENT_VALUE.unpack(value))
