"""Verifying every checksum of a region in use, a block at a time, so that other requests come in between.

What is verified are single structures; whether they agree with each other is for the check (fsck.pkernfs).
"""

from __future__ import annotations

from typing import NamedTuple

from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import (
    BLOCK,
    BLOCK_SLAB,
    FIRST_FREE_SLOT,
    INODES_PER_PAGE,
    NODE_MAGIC,
    PAGE,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    SUPERBLOCK,
    TABLE_MAGIC,
)
from pkernfs.fs.allocator import Slab
from pkernfs.fs.btree import Node
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.pages import check_page, read_inode
from pkernfs.fs.xattrs import Xattrs
from pkernfs.region import check_superblock


class Scrubbed(NamedTuple):
    """What a step did.  ``next``: the block to go on with; the number of blocks when all are done."""

    next: int
    structures: int  #: whose checksums were verified
    problems: list[str]


def scrub_step(fs: Filesystem, block: int) -> Scrubbed:
    """Verify what is in the next block from ``block`` on that has structures with checksums; block 0: the metadata."""
    step = _Step(fs)
    table = fs.volume.allocator.table
    if block <= 0:
        step.metadata()
    elif block < len(table) and table[block] == BLOCK_SLAB:  # it may have become something else since it was named
        step.slab(block)
    following = table.find(BLOCK_SLAB, max(block, 0) + 1)
    return Scrubbed(following if following >= 0 else len(table), step.structures, step.problems)


class _Step:
    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.region = fs.region
        self.structures = 0
        self.problems: list[str] = []

    def metadata(self) -> None:
        """Superblocks, block table, reserved inodes."""
        sb = self.fs.volume.sb
        for offset in (0, sb.journal_offset):
            self.structures += 1
            try:
                raw = self.region.read(offset, SUPERBLOCK.size)
                check_superblock(raw, self.region.size, f"superblock at {offset:#x}", readonly=True)
            except FormatError as error:
                self.problems.append(error.text)
        for index in range(sb.table_pages):
            offset = PAGE * (1 + index)
            self.structures += 1
            try:
                check_page(self.region.read(offset, PAGE), TABLE_MAGIC, offset, index, "the block table")
            except CorruptError as error:
                self.problems.append(str(error))
        for ino in range(1, FIRST_FREE_SLOT):
            self.inode(ino)

    def slab(self, block: int) -> None:
        """A slab's header, and its pages of inodes and of tree nodes."""
        self.structures += 1
        try:
            slab = Slab.decode(self.region.read(block * BLOCK, PAGE), block)
        except CorruptError as error:
            self.problems.append(str(error))
            return
        for index, kind in enumerate(slab.kinds):
            page = block * PAGES_PER_BLOCK + index
            if kind == PAGE_NODE:
                self.node(page)
            elif kind == PAGE_INODES:
                for slot in range(INODES_PER_PAGE):
                    if slab.slots[index] >> slot & 1:
                        self.inode(page * INODES_PER_PAGE + slot)

    def node(self, page: int) -> None:
        """A tree node, whoever its owner is."""
        self.structures += 1
        raw = self.region.read(page * PAGE, PAGE)
        try:
            owner = PAGE_HEADER_LAYOUT.unpack(raw).owner
            check_page(raw, NODE_MAGIC, page * PAGE, owner, f"a tree node of inode {owner}")
            Node.decode(raw, page, owner)
        except CorruptError as error:
            self.problems.append(str(error))

    def inode(self, ino: int) -> None:
        """An inode, and the values of its attributes that have pages of their own."""
        self.structures += 1
        try:
            inode = read_inode(self.region, ino)
            if inode.mode and inode.xattrs:
                xattrs = Xattrs(self.fs.volume, ino, inode)
                for attribute in xattrs.all():
                    self.structures += attribute.head.external
                    xattrs.value(attribute)
        except CorruptError as error:
            self.problems.append(str(error))
