"""The extents of a file."""

from __future__ import annotations

from collections.abc import Iterator

from pkernfs.format import EXTENT, EXTENT_VALUE, INLINE_EXTENTS, Extent, ExtentValue, FilePage, Ino, Inode
from pkernfs.fs.pages import has_extents
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.check.trees import is_extent, items
from pkernfs.fsck.findings import Structure
from pkernfs.fsck.problems import Code


def extents(check: Check, _: Ino, inode: Inode) -> None:
    """Of two extents that overlap the first is the one that is too long, for each says where it begins."""
    if not has_extents(inode) or not (inode.root or inode.inline.strip(b"\0")):
        return
    structure = check.structure("root", is_extent)
    for extent, end in _ordered(check, structure, inode):
        claimed = extent._replace(length=min(extent.length, end - extent.start))
        good = check.memory.claim_extent(claimed)
        if good != [extent]:
            structure.dropped.append(_memory_of(extent))
        if structure.keeps:
            for part in good:
                structure.keep(part.start, EXTENT_VALUE.pack(ExtentValue(part.page, part.length)))
    check.close(structure)


def _memory_of(extent: Extent) -> str:
    return f"memory of pages {extent.start:#x}+{extent.length:#x} of the file"


def _ordered(check: Check, structure: Structure, inode: Inode) -> Iterator[tuple[Extent, int]]:
    """The extents, each with the page of the file where it must end."""
    last: Extent | None = None
    for extent in _all_extents(check, structure, inode):
        if last:
            if extent.start < last.start + last.length:
                text = f"expected a start behind {_place(last)}, found {_place(extent)}"
                check.note(Code.EXTENT_ORDER, f"inode {structure.owner}: {text}")
            if extent.start <= last.start:
                structure.dropped.append(_memory_of(extent))
                continue
            yield last, extent.start
        last = extent
    if last:
        yield last, last.start + last.length


def _place(extent: Extent) -> str:
    return f"pages {extent.start:#x}+{extent.length:#x} of the file at page {extent.page:#x}"


def _all_extents(check: Check, structure: Structure, inode: Inode) -> Iterator[Extent]:
    if not inode.root:
        for at in range(0, INLINE_EXTENTS * EXTENT.size, EXTENT.size):
            extent = EXTENT.unpack(inode.inline, at)
            if not extent.length:
                if inode.inline[at:].strip(b"\0"):
                    text = f"inode {structure.owner}: expected {at // EXTENT.size} extents, found more"
                    check.note(Code.EXTENT_VALUE, text)
                    structure.dropped.append("what stood behind the extents")
                return
            yield extent
        return
    for key, value in items(check, structure, inode.root):
        if len(value) != EXTENT_VALUE.size:
            text = f"inode {structure.owner}: expected 16 bytes, found an extent of {len(value)}"
            check.note(Code.EXTENT_VALUE, text)
            structure.dropped.append("an extent that cannot be read")
        else:
            yield Extent(FilePage(key), *EXTENT_VALUE.unpack(value))
