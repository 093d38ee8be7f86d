"""What owns an address: the first question when a DMA fault names one.

The owner of a data block or page is found by the walk of the check, which reads all metadata once.
"""

from __future__ import annotations

import os
import stat

from msgspec import Struct

from pkernfs import api
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
    ROOT_PGTABLES_INO,
    STORE,
    SUPERBLOCK,
    WORDS,
    BlockNo,
    Ino,
    Inode,
    PageNo,
    PhysAddr,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.pages import read_inode
from pkernfs.fs.paths import paths_of
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.check import FILESYSTEM, run_check
from pkernfs.iommu.awaiting import of_file
from pkernfs.iommu.invalidations import generation
from pkernfs.iommu.records import Records

RECORD_KINDS = {STORE: "store", DISCARD: "discard", WORDS: "words"}


class Record(Struct):
    """A record of the journal's last transaction, and what it is for."""

    sequence: int
    kind: str
    offset: int
    length: int


class Explained(Struct, omit_defaults=True):
    """What is at an offset, all in bytes.  --json prints the fields that are not as they are here."""

    offset: int
    physical: PhysAddr
    block: BlockNo
    page: PageNo
    block_kind: str
    page_kind: str | None = None  #: in slabs
    structure: str = ""
    record: Record | None = None  #: in the journal
    # Where something owns it:
    ino: Ino | None = None
    path: str | None = ""  #: the first of ``paths``; None: it has no name
    paths: list[str] | None = None  #: all of its names
    orphan: bool | None = None  #: removed, and still open
    awaits: int | None = None  #: removed, and kept until the invalidations of the list with this token are acknowledged
    tree: str | None = None  #: of a tree's nodes: which one
    attribute: str | None = ""  #: of attributes' values: the name, None where that cannot be told
    # Where it is content of a file:
    file_offset: int | None = None
    beyond_end: bool | None = None
    size: int | None = None
    extent: api.Extent | None = None


def explain(fs: Filesystem, offset: int) -> Explained:
    """What is at region offset ``offset`` (bytes).  Raises UsageError outside the region, CorruptError."""
    sb = fs.volume.sb
    if not 0 <= offset < sb.blocks * BLOCK:
        raise UsageError(f"offset {offset:#x}: expected less than {sb.blocks * BLOCK:#x}, the size of the region")
    block, page = BlockNo(offset // BLOCK), PageNo(offset // PAGE)
    kind = fs.volume.space.table[block]
    found = Explained(offset, PhysAddr(fs.volume.physical(offset)), block, page, BLOCK_KINDS[kind])
    if kind == BLOCK_META:
        _metadata(fs, found)
    elif kind == BLOCK_FREE:
        found.structure = "free"
    elif kind == BLOCK_DATA:
        found.structure = "data"
        _owner(fs, found)
    else:
        _in_slab(fs, found)
    return found


def _in_slab(fs: Filesystem, found: Explained) -> None:
    slab = fs.volume.space.slab(found.block)
    index = found.page % PAGES_PER_BLOCK
    found.structure = found.page_kind = PAGE_KINDS[slab.kinds[index]]
    if found.page == fs.volume.space.far_copy:
        found.structure = "far copy of the superblock"
    if found.page == fs.volume.space.far_copy or slab.kinds[index] in (PAGE_FREE, PAGE_HEADER):
        return
    if slab.kinds[index] != PAGE_INODES:
        _owner(fs, found)
        return
    ino = Ino(found.offset // INODE_SIZE)
    if slab.slots[index] >> ino % INODES_PER_PAGE & 1:
        found.structure = "inode"
        _name(fs, found, ino)
    else:
        found.structure = "free inode"


def _metadata(fs: Filesystem, found: Explained) -> None:
    sb, offset = fs.volume.sb, found.offset
    journal = fs.volume.journal
    if offset < SUPERBLOCK.size:
        found.structure = "superblock"
    elif offset < PAGE:
        ino = Ino(offset // INODE_SIZE)
        found.structure = "reserved inode, free"
        if read_inode(fs.region, ino).mode:
            found.structure = "reserved inode"
            _name(fs, found, ino)
    elif offset < PAGE * (1 + sb.table_pages):
        found.structure = f"block table, page {offset // PAGE - 1}"
    elif sb.journal_offset <= offset < sb.journal_offset + PAGE:
        found.structure = "copy of the superblock"
    elif journal.header_at <= offset < journal.body_at:
        found.structure = "journal header"
    elif journal.body_at <= offset < journal.body_at + journal.capacity:
        _journal_record(fs, found)
    else:
        found.structure = "unused metadata"


def _journal_record(fs: Filesystem, found: Explained) -> None:
    """Which record of the last transaction stands at an offset in the journal's body, and what it is for.

    The transaction is checkpointed, or the body of one that was never committed: nothing of it is relied on.
    """
    volume, offset = fs.volume, found.offset
    found.structure = "journal body, not in use"
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
            found.structure = f"journal record {number} of the last transaction"
            length = record.length * PAGE if record.kind == DISCARD else record.length
            found.record = Record(header.sequence, RECORD_KINDS[record.kind], record.offset, length)
            return
        at = after


def _owner(fs: Filesystem, found: Explained) -> None:
    """Of a data block, or of a page that is neither free nor of inodes nor a header."""
    check = run_check(fs.volume, FILESYSTEM)
    page = found.page
    ino = check.memory.owner_of(page)
    if not ino:
        unread = ", or by something that cannot be read: run fsck.pkernfs" if check.findings.incomplete else ""
        found.structure += f", allocated but owned by nobody{unread}"
        return
    _name(fs, found, ino)
    inode = read_inode(fs.region, ino)
    found.orphan = ino in check.reached.listed
    if found.page_kind == PAGE_KINDS[PAGE_NODE]:
        found.tree = _tree_of(fs, ino, inode, page)
        return
    if found.page_kind == PAGE_KINDS[PAGE_XATTR]:
        found.attribute = _attribute_at(fs, ino, inode, page)
        return
    if found.orphan and (of_file(fs.volume, ino) if not inode.flags & GUARDED else not fs.guard.may_free(ino, inode)):
        found.awaits = generation(Records(fs.volume, ROOT_PGTABLES_INO))
    for extent in fs.content.extents(ino):
        if extent.page <= page < extent.page + extent.length:
            start, at = extent.start * PAGE, extent.page * PAGE
            found.file_offset = start + found.offset - at
            found.beyond_end = found.file_offset >= inode.size
            found.size = inode.size
            found.extent = api.Extent(
                file_offset=start,
                region_offset=at,
                physical=fs.volume.physical(at),
                length=extent.length * PAGE,
            )


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


def _name(fs: Filesystem, found: Explained, ino: Ino) -> None:
    found.ino = ino
    found.paths = [os.fsdecode(path) for path in paths_of(fs.volume, {ino}).get(ino, [])]
    found.path = found.paths[0] if found.paths else None
