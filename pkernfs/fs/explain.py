"""What owns an address: the first question when a DMA fault names one.

The owner of a data block or page is found by the walk of the check, which reads all metadata once.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from pkernfs.errors import PkernfsError, UsageError
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_KINDS,
    BLOCK_META,
    INODE_SIZE,
    INODES_PER_PAGE,
    PAGE,
    PAGE_FREE,
    PAGE_HEADER,
    PAGE_INODES,
    PAGE_KINDS,
    PAGES_PER_BLOCK,
    ROOT_INO,
    SUPERBLOCK,
)
from pkernfs.fs.check import Checker
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.pages import read_inode


def explain(fs: Filesystem, offset: int) -> dict[str, Any]:
    """What is at region offset ``offset`` (bytes).

    The result has ``offset``, ``physical``, ``block``, ``page``, ``structure``; where something owns it ``ino`` and
    ``path`` (of one of its names, or None); for content ``file_offset``.  Raises UsageError outside the region.
    """
    sb = fs.volume.sb
    if not 0 <= offset < sb.blocks * BLOCK:
        raise UsageError(f"offset {offset:#x}: expected less than {sb.blocks * BLOCK:#x}, the size of the region")
    block, page = offset // BLOCK, offset // PAGE
    facts: dict[str, Any] = {
        "offset": offset,
        "physical": fs.physical(offset),
        "block": block,
        "page": page,
        "block_kind": BLOCK_KINDS[fs.volume.allocator.table[block]],
    }
    kind = fs.volume.allocator.table[block]
    if kind == BLOCK_META:
        return facts | _of_metadata(fs, offset)
    if kind == BLOCK_FREE:
        return facts | {"structure": "free"}
    if kind == BLOCK_DATA:
        return facts | _owned(fs, offset, "data", _checker(fs).ledger.blocks[block])
    slab = fs.volume.allocator.slab(block)
    index = page % PAGES_PER_BLOCK
    structure = PAGE_KINDS[slab.kinds[index]]
    facts["page_kind"] = structure
    if slab.kinds[index] in (PAGE_FREE, PAGE_HEADER):
        return facts | {"structure": structure}
    if slab.kinds[index] == PAGE_INODES:
        ino = offset // INODE_SIZE
        used = slab.slots[index] >> ino % INODES_PER_PAGE & 1
        return facts | (_named(fs, "inode", ino) if used else {"structure": "free inode"})
    return facts | _owned(fs, offset, structure, _checker(fs).ledger.pages[block][index])


def _of_metadata(fs: Filesystem, offset: int) -> dict[str, Any]:
    sb = fs.volume.sb
    journal = fs.volume.journal
    if offset < SUPERBLOCK.size:
        return {"structure": "superblock"}
    if offset < PAGE:
        ino = offset // INODE_SIZE
        used = read_inode(fs.region, ino).mode
        return _named(fs, "reserved inode", ino) if used else {"structure": "reserved inode, free"}
    if offset < PAGE * (1 + sb.table_pages):
        return {"structure": f"block table, page {offset // PAGE - 1}"}
    if sb.journal_offset <= offset < sb.journal_offset + PAGE:
        return {"structure": "copy of the superblock"}
    if journal.header_at <= offset < journal.body_at:
        return {"structure": "journal header"}
    if journal.body_at <= offset < journal.body_at + journal.capacity:
        return {"structure": "journal body"}
    return {"structure": "unused metadata"}


def _checker(fs: Filesystem) -> Checker:
    checker = Checker(fs.volume)
    checker.run()
    return checker


def _owned(fs: Filesystem, offset: int, structure: str, ino: int) -> dict[str, Any]:
    if not ino:
        return {"structure": f"{structure}, allocated but owned by nobody"}
    facts = _named(fs, structure, ino)
    inode = fs.getattr(ino)
    if stat.S_ISREG(inode.mode):
        for extent in fs.extents(ino):
            if extent.page <= offset // PAGE < extent.page + extent.length:
                facts["file_offset"] = extent.start * PAGE + offset - extent.page * PAGE
                facts["beyond_end"] = facts["file_offset"] >= inode.size
    return facts


def _named(fs: Filesystem, structure: str, ino: int) -> dict[str, Any]:
    return {"structure": structure, "ino": ino, "path": path_of(fs, ino)}


def path_of(fs: Filesystem, ino: int) -> str | None:
    """A path of the inode from the root on, or None when it has no name.  Reads directories until it is found."""
    if ino == ROOT_INO:
        return "/"
    todo = [(b"/", int(ROOT_INO))]
    seen = set()
    while todo:
        path, directory = todo.pop()
        if directory in seen:
            continue
        seen.add(directory)
        try:
            for entry in fs.directory(directory).scan():
                if entry.ino == ino:
                    return os.fsdecode(path + entry.name)
                if stat.S_ISDIR(entry.mode):
                    todo.append((path + entry.name + b"/", entry.ino))
        except PkernfsError:
            continue  # a damaged directory hides what is below it
    return None
