"""What owns an address: the first question when a DMA fault names one.

The owner of a data block or page is found by the walk of the check, which reads all metadata once.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from pkernfs.errors import UsageError
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_KINDS,
    BLOCK_META,
    DISCARD,
    GUARDED,
    INODE_SIZE,
    INODES_PER_PAGE,
    JOURNAL_HEADER,
    JOURNAL_RECORD,
    PAGE,
    PAGE_FREE,
    PAGE_HEADER,
    PAGE_INODES,
    PAGE_KINDS,
    PAGE_NODE,
    PAGE_XATTR,
    PAGES_PER_BLOCK,
    STORE,
    SUPERBLOCK,
    WORDS,
    BlockNo,
    Ino,
    Inode,
    PageNo,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.pages import read_inode
from pkernfs.fs.paths import paths_of
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.check import FILESYSTEM, run_check

RECORD_KINDS = {STORE: "store", DISCARD: "discard", WORDS: "words"}


def explain(fs: Filesystem, offset: int) -> dict[str, Any]:
    """What is at region offset ``offset`` (bytes).

    The result has ``offset``, ``physical``, ``block``, ``page``, ``structure``; where something owns it ``ino``,
    ``paths`` (of all its names), ``path`` (the first, or None) and ``orphan`` (removed, and still open); for content
    ``file_offset``, ``size``, ``beyond_end`` and ``extent``; for tree nodes ``tree``, for values of attributes
    ``attribute``, for the journal ``record``.  All in bytes.  Raises UsageError outside the region, CorruptError.
    """
    sb = fs.volume.sb
    if not 0 <= offset < sb.blocks * BLOCK:
        raise UsageError(f"offset {offset:#x}: expected less than {sb.blocks * BLOCK:#x}, the size of the region")
    block, page = offset // BLOCK, offset // PAGE
    facts: dict[str, Any] = {
        "offset": offset,
        "physical": fs.volume.physical(offset),
        "block": block,
        "page": page,
        "block_kind": BLOCK_KINDS[fs.volume.space.table[block]],
    }
    kind = fs.volume.space.table[block]
    if kind == BLOCK_META:
        return facts | _of_metadata(fs, offset)
    if kind == BLOCK_FREE:
        return facts | {"structure": "free"}
    if kind == BLOCK_DATA:
        return facts | _owned(fs, offset, "data")
    slab = fs.volume.space.slab(BlockNo(block))
    index = page % PAGES_PER_BLOCK
    structure = PAGE_KINDS[slab.kinds[index]]
    facts["page_kind"] = structure
    if slab.kinds[index] in (PAGE_FREE, PAGE_HEADER):
        return facts | {"structure": structure}
    if slab.kinds[index] == PAGE_INODES:
        ino = Ino(offset // INODE_SIZE)
        used = slab.slots[index] >> ino % INODES_PER_PAGE & 1
        return facts | (_named(fs, "inode", ino) if used else {"structure": "free inode"})
    return facts | _owned(fs, offset, structure)


def _of_metadata(fs: Filesystem, offset: int) -> dict[str, Any]:
    sb = fs.volume.sb
    journal = fs.volume.journal
    if offset < SUPERBLOCK.size:
        return {"structure": "superblock"}
    if offset < PAGE:
        ino = Ino(offset // INODE_SIZE)
        used = read_inode(fs.region, ino).mode
        return _named(fs, "reserved inode", ino) if used else {"structure": "reserved inode, free"}
    if offset < PAGE * (1 + sb.table_pages):
        return {"structure": f"block table, page {offset // PAGE - 1}"}
    if sb.journal_offset <= offset < sb.journal_offset + PAGE:
        return {"structure": "copy of the superblock"}
    if journal.header_at <= offset < journal.body_at:
        return {"structure": "journal header"}
    if journal.body_at <= offset < journal.body_at + journal.capacity:
        return _journal_record(fs, offset)
    return {"structure": "unused metadata"}


def _journal_record(fs: Filesystem, offset: int) -> dict[str, Any]:
    """Which record of the last transaction stands at an offset in the journal's body, and what it is for.

    The transaction is checkpointed, or the body of one that was never committed: nothing of it is relied on.
    """
    volume = fs.volume
    at = volume.journal.body_at
    header = JOURNAL_HEADER.unpack(fs.region.read(volume.journal.header_at, JOURNAL_HEADER.size))
    end = min(at + header.length, at + volume.journal.capacity)
    for number in range(header.records):
        if at + JOURNAL_RECORD.size > end or offset < at:
            break
        record = JOURNAL_RECORD.unpack(fs.region.read(at, JOURNAL_RECORD.size))
        if record.kind not in RECORD_KINDS:
            break
        after = at + JOURNAL_RECORD.size + (0 if record.kind == DISCARD else record.length)
        if offset < after:
            return {
                "structure": f"journal record {number} of the last transaction",
                "record": {
                    "sequence": header.sequence,
                    "kind": RECORD_KINDS[record.kind],
                    "offset": record.offset,
                    "length": record.length * PAGE if record.kind == DISCARD else record.length,
                },
            }
        at = after
    return {"structure": "journal body, not in use"}


def _owned(fs: Filesystem, offset: int, structure: str) -> dict[str, Any]:
    """Of a data block, or of a page that is neither free nor of inodes nor a header."""
    check = run_check(fs.volume, FILESYSTEM)
    page = PageNo(offset // PAGE)
    ino = check.memory.owner_of(page)
    if not ino:
        unread = ", or by something that cannot be read: run fsck.pkernfs" if check.findings.incomplete else ""
        return {"structure": f"{structure}, allocated but owned by nobody{unread}"}
    facts = _named(fs, structure, ino)
    inode = read_inode(fs.region, ino)
    facts["orphan"] = ino in check.reached.listed
    if structure == PAGE_KINDS[PAGE_NODE]:
        return facts | {"tree": _tree_of(fs, ino, inode, page)}
    if structure == PAGE_KINDS[PAGE_XATTR]:
        return facts | {"attribute": _attribute_at(fs, ino, inode, page)}
    for extent in fs.content.extents(ino):
        if extent.page <= page < extent.page + extent.length:
            facts["file_offset"] = extent.start * PAGE + offset - extent.page * PAGE
            facts["beyond_end"] = facts["file_offset"] >= inode.size
            facts["size"] = inode.size
            facts["extent"] = {
                "file_offset": extent.start * PAGE,
                "region_offset": extent.page * PAGE,
                "physical": fs.volume.physical(extent.page * PAGE),
                "length": extent.length * PAGE,
            }
    return facts


def _tree_of(fs: Filesystem, ino: Ino, inode: Inode, page: PageNo) -> str:
    """Which of an inode's trees has a node."""
    if inode.xattrs and page in Tree(fs.volume, ino, inode.xattrs).all_pages():
        return "attributes"
    if inode.flags & GUARDED and inode.iommu and page in Tree(fs.volume, ino, PageNo(inode.iommu)).all_pages():
        return "records"
    return "directory" if stat.S_ISDIR(inode.mode) else "extents"


def _attribute_at(fs: Filesystem, ino: Ino, inode: Inode, page: PageNo) -> str | None:
    """The name of the attribute whose value has a page."""
    for attribute in Xattrs(fs.volume, ino, inode).all():
        if any(run.page <= page < run.page + run.length for run in attribute.runs):
            return os.fsdecode(attribute.name)
    return None


def _named(fs: Filesystem, structure: str, ino: Ino) -> dict[str, Any]:
    paths = [os.fsdecode(path) for path in paths_of(fs.volume, {ino}).get(ino, [])]
    return {"structure": structure, "ino": ino, "path": paths[0] if paths else None, "paths": paths}
