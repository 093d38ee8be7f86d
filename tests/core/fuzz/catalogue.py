"""Where every field of every structure of a sound image is."""

from __future__ import annotations

import functools
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from pkernfs import format as f
from pkernfs.format import Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.guard import has_records
from pkernfs.fs.node import BODY_AT, Node
from pkernfs.fs.pages import read_inode
from pkernfs.fs.volume import Volume
from pkernfs.iommu.guard import PageTableGuard
from pkernfs.layout import Layout
from pkernfs.region import far_copy_at
from tests.core.fuzz.images import view_of


class Field(NamedTuple):
    """One field of a structure."""

    structure: str
    name: str
    offset: int
    size: int  #: bytes; more than 8: not a number
    covered: str  #: what kind of checksum covers it: "page", "inode", "superblock", "journal" or ""
    at: int  #: region offset of what the checksum is of


class Catalogue(NamedTuple):
    """The fields of an image by structure and name, and numbers that mean something in it."""

    fields: dict[str, dict[str, list[Field]]]
    pages: list[int]  #: page numbers of structures of all kinds
    inos: list[Ino]


@functools.cache
def catalogue_of(name: str) -> Catalogue:
    """The catalogue of an image, as it is once its journal was replayed; the journal as it is before."""
    region = view_of(name)
    journal = list(_journal(region))
    fs = Filesystem(Volume(region), PageTableGuard)
    walk = _Walk(fs)
    found: dict[str, dict[str, list[Field]]] = {}
    for field in [*journal, *walk.fields()]:
        found.setdefault(field.structure, {}).setdefault(field.name, []).append(field)
    sb = fs.volume.sb
    metadata = [0, 1, sb.journal_offset // f.PAGE, sb.journal_offset // f.PAGE + 1, sb.first_block * f.PAGES_PER_BLOCK]
    free = [page for page, kind in walk.pages.items() if kind == f.PAGE_FREE][:3]
    used = [page for page, kind in walk.pages.items() if kind != f.PAGE_FREE]
    total = fs.volume.total_pages
    return Catalogue(found, [*metadata, *free, *used, total - 1, total], walk.inos)


def _record(structure: str, codec: Layout[Any], offset: int, covered: str, at: int) -> Iterator[Field]:
    ends = [*list(codec.offsets.values())[1:], codec.size]
    for (name, start), end in zip(codec.offsets.items(), ends, strict=True):
        yield Field(structure, name, offset + start, end - start, covered, at)


def _journal(region: Any) -> Iterator[Field]:
    sb = f.SUPERBLOCK.unpack(region.view)
    header_at = sb.journal_offset + f.PAGE
    header = f.JOURNAL_HEADER.unpack(region.view, header_at)
    yield from _record("journal header", f.JOURNAL_HEADER, header_at, "journal", header_at)
    at = header_at + f.PAGE
    for _ in range(header.records if header.commit & 1 else 0):
        yield from _record("journal record", f.JOURNAL_RECORD, at, "journal", header_at)
        record = f.JOURNAL_RECORD.unpack(region.view, at)
        at += f.JOURNAL_RECORD.size
        if record.kind == f.STORE:
            yield Field("journal data", "word", at + record.length // 16 * 8, 8, "journal", header_at)
            at += record.length


def _codec(key: int, value: bytes) -> Layout[Any]:
    """Of a record of page tables, of those that images.domains makes."""
    if len(value) != f.REQUEST.size:
        return f.MAPPING if len(value) == f.MAPPING.size else f.DOMAIN
    return f.ATTACHMENT if key >> 60 == f.ATTACHMENT_KEY >> 60 else f.PENDING


class _Walk:
    """The structures of a sound volume."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.pages: dict[int, int] = {}  #: kinds of the pages of slabs, and PAGE_DATA for the first ones of data blocks
        self.inos: list[Ino] = []

    def fields(self) -> Iterator[Field]:
        sb = self.fs.volume.sb
        yield from _record("superblock", f.SUPERBLOCK, 0, "superblock", 0)
        yield from _record("superblock copy", f.SUPERBLOCK, sb.journal_offset, "superblock", sb.journal_offset)
        far = far_copy_at(sb.blocks)
        yield from _record("superblock far copy", f.SUPERBLOCK, far, "superblock", far)
        yield from _record("block table", f.PAGE_HEADER_LAYOUT, f.PAGE, "page", f.PAGE)
        for block in range(sb.blocks + 1):
            yield Field("block table", "kind", f.PAGE + BODY_AT + block, 1, "page", f.PAGE)
        for ino in range(1, f.FIRST_FREE_SLOT):
            yield from self.inode(f.Ino(ino), "reserved inode" if ino <= f.ROOT_PGTABLES_INO else "free inode")
        for block, kind in enumerate(self.fs.volume.space.table):
            if kind == f.BLOCK_DATA:
                self.pages[block * f.PAGES_PER_BLOCK] = f.PAGE_DATA
            elif kind == f.BLOCK_SLAB:
                yield from self.slab(block)

    def slab(self, block: int) -> Iterator[Field]:
        offset = block * f.BLOCK
        yield from _record("slab header", f.PAGE_HEADER_LAYOUT, offset, "page", offset)
        slab = self.fs.volume.space.slab(f.BlockNo(block))
        free = 0
        for index, kind in enumerate(slab.kinds):
            page = block * f.PAGES_PER_BLOCK + index
            free += kind == f.PAGE_FREE
            if kind == f.PAGE_FREE and free > 3:
                continue
            self.pages[page] = kind
            yield Field("slab header", "kind", offset + f.SLAB_KINDS_AT + index, 1, "page", offset)
            if kind in (f.PAGE_INODES, f.PAGE_FREE):
                yield Field("slab header", "slots", offset + f.SLAB_SLOTS_AT + 2 * index, 2, "page", offset)
            if kind == f.PAGE_INODES:
                for slot in range(f.INODES_PER_PAGE):
                    used = slab.slots[index] >> slot & 1
                    yield from self.inode(f.Ino(page * f.INODES_PER_PAGE + slot), "inode" if used else "free inode")

    def inode(self, ino: Ino, structure: str) -> Iterator[Field]:
        offset = ino * f.INODE_SIZE
        inode = read_inode(self.fs.region, ino)
        self.inos.append(ino)
        for field in _record(structure, f.INODE, offset, "inode", offset):
            if field.name.startswith("orphan") and inode.orphan_next:
                yield field._replace(structure="list of orphans")
            elif field.name != "inline":
                yield field
        inline = offset + f.INODE.offsets["inline"]
        content = stat.S_ISREG(inode.mode) or (stat.S_ISLNK(inode.mode) and inode.size > f.INLINE_SIZE)
        if content and not inode.root:
            for n in range(f.INLINE_EXTENTS):
                yield from _record("extent", f.EXTENT, inline + n * f.EXTENT.size, "inode", offset)
        elif stat.S_ISLNK(inode.mode):
            yield Field("symlink target", "text", inline, f.INLINE_SIZE, "inode", offset)
        if inode.root:
            yield from self.tree(inode.root, ino, "directory" if stat.S_ISDIR(inode.mode) else "extents")
        if inode.xattrs:
            yield from self.tree(inode.xattrs, ino, "attributes")
        if has_records(inode):
            yield from self.tree(inode.iommu, ino, "records")

    def tree(self, page: int, owner: Ino, kind: str) -> Iterator[Field]:
        at = page * f.PAGE
        node = Node.decode(self.fs.region.read(at, f.PAGE), f.PageNo(page), owner)
        structure = f"{kind} node"
        yield from _record(structure, f.PAGE_HEADER_LAYOUT, at, "page", at)
        n = len(node.keys)
        some = sorted({0, 1, n // 2, n - 1} & set(range(n))) if n > 12 else list(range(n))
        second = at + BODY_AT + 8 * n
        place = second + 2 * n
        for index in range(n):
            if index in some:
                yield Field(structure, "key", at + BODY_AT + 8 * index, 8, "page", at)
            if node.level:
                if index in some:
                    yield Field(structure, "child", second + 8 * index, 8, "page", at)
                yield from self.tree(node.children[index], owner, kind)
                continue
            if index in some:
                yield Field(structure, "length", second + 2 * index, 2, "page", at)
                if kind == "records":
                    yield from _record("record", _codec(node.keys[index], node.values[index]), place, "page", at)
                else:
                    yield from self.value(kind, node.values[index], place, at)
            place += len(node.values[index])

    def value(self, kind: str, value: bytes, offset: int, at: int) -> Iterator[Field]:
        if kind == "extents":
            yield from _record("extent", f.EXTENT_VALUE, offset, "page", at)
        elif kind == "directory":
            yield from _record("directory entry", f.DIRENT, offset, "page", at)
            yield Field("directory entry", "text", offset + f.DIRENT.size, len(value) - f.DIRENT.size, "page", at)
        else:
            head = f.XATTR_HEAD.unpack(value)
            yield from _record("attribute", f.XATTR_HEAD, offset, "page", at)
            yield Field("attribute", "text", offset + f.XATTR_HEAD.size, head.name_length, "page", at)
            first = f.XATTR_HEAD.size + head.name_length
            if value[f.XATTR_HEAD.size : first] == f.HOLD_NAME:
                yield from _record("hold", f.HOLD, offset + first, "page", at)
                yield Field("hold", "text", offset + first + f.HOLD.size, head.size - f.HOLD.size, "page", at)
            for start in range(first, len(value) if head.external else 0, f.EXTENT_VALUE.size):
                yield from _record("attribute value", f.EXTENT_VALUE, offset + start, "page", at)
                run = f.EXTENT_VALUE.unpack(value, start)
                yield Field("attribute value", "data", run.page * f.PAGE, 8, "", 0)
