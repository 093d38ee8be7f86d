"""Verifying every checksum of a region in use, a few structures at a time, so that other requests come in between.

What is verified are single structures; whether they agree with each other is for the check (fsck.pkernfs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import (
    BLOCK_SLAB,
    FIRST_FREE_SLOT,
    INODES_PER_PAGE,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    PAGE,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    SUPERBLOCK,
    TABLE_MAGIC,
    BlockNo,
    Ino,
    PageNo,
)
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.node import Node
from pkernfs.fs.pages import check_page, read_inode
from pkernfs.fs.slab import Slab
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.findings import NO_INO
from pkernfs.region import check_superblock, copies_of

if TYPE_CHECKING:
    from pkernfs import api

STEP = 256  #: structures of one step, and at most one page of inodes more: a few milliseconds


class Damage(NamedTuple):
    """A structure whose checksum does not hold."""

    text: str
    ino: Ino  #: the inode that it is, or belongs to; 0: none
    offset: int  #: in the region, bytes

    @classmethod
    def of(cls, error: CorruptError, ino: Ino = NO_INO) -> Damage:
        """What an error says."""
        return cls(f"{error.what} at region offset {error.offset:#x}: {error.found}", ino, error.offset)


class Scrubbed(NamedTuple):
    """What a step did.  ``next``: the page to go on with; the number of pages of the region when all are done."""

    next: PageNo
    structures: int  #: whose checksums were verified
    problems: list[Damage]

    def reply(self) -> api.Scrubbed:
        """As the control protocol has it."""
        from pkernfs import api

        problems = [api.DamagedChecksum(*damage) for damage in self.problems]
        return api.Scrubbed(next=self.next, structures=self.structures, problems=problems)


def scrub_step(fs: Filesystem, page: PageNo) -> Scrubbed:
    """Verify some of the structures with checksums from ``page`` on; 0: all that is not in slabs."""
    step = _Step(fs)
    if page <= 0:
        step.metadata()
        return Scrubbed(_next_slab(fs, BlockNo(0)), step.structures, step.problems)
    while page < fs.volume.total_pages and step.structures < STEP:
        block = BlockNo(page // PAGES_PER_BLOCK)
        # It may have become something else since it was named.
        if fs.volume.space.table[block] == BLOCK_SLAB:
            page = step.slab(block, page % PAGES_PER_BLOCK)
        if not page % PAGES_PER_BLOCK or fs.volume.space.table[block] != BLOCK_SLAB:
            page = _next_slab(fs, block)
    return Scrubbed(page, step.structures, step.problems)


def scrub_all(fs: Filesystem) -> Iterator[Scrubbed]:
    """All steps, one after the other."""
    page = PageNo(0)
    while page < fs.volume.total_pages:
        step = scrub_step(fs, page)
        yield step
        page = step.next


def _next_slab(fs: Filesystem, block: BlockNo) -> PageNo:
    """The first page of the first slab behind ``block``, or the number of pages."""
    found = fs.volume.space.table.find(BLOCK_SLAB, block + 1)
    return PageNo(found * PAGES_PER_BLOCK if found >= 0 else fs.volume.total_pages)


class _Step:
    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.region = fs.region
        self.structures = 0
        self.problems: list[Damage] = []

    def damaged(self, error: CorruptError, ino: Ino = NO_INO) -> None:
        self.fs.volume.damage.note(error)
        self.problems.append(Damage.of(error, ino))

    def metadata(self) -> None:
        """Superblocks, journal, block table, reserved inodes."""
        sb = self.fs.volume.sb
        for offset in (0, *copies_of(sb)):
            self.structures += 1
            try:
                raw = self.region.read(offset, SUPERBLOCK.size)
                check_superblock(raw, self.region.size, f"superblock at {offset:#x}", readonly=True)
            except FormatError as error:
                self.problems.append(Damage(error.text, NO_INO, offset))
        self.journal()
        for index in range(sb.table_pages):
            offset = PAGE * (1 + index)
            self.structures += 1
            try:
                what = f"page {index} of the block table"
                check_page(self.region.read(offset, PAGE), TABLE_MAGIC, offset, index, what)
            except CorruptError as error:
                self.damaged(error)
        for ino in range(1, FIRST_FREE_SLOT):
            self.inode(Ino(ino))

    def journal(self) -> None:
        """Its header, and the last transaction where that is known to be whole: applied, and not yet overwritten."""
        self.structures += 1
        journal = self.fs.volume.journal
        header = JOURNAL_HEADER.unpack(self.region.read(journal.header_at, JOURNAL_HEADER.size))
        expected = (2 * journal.sequence, JOURNAL_MAGIC)
        try:
            if (header.commit, header.magic) != expected:
                found = f"expected commit record, magic {expected}, found {(header.commit, header.magic)}"
                raise CorruptError("the journal header", journal.header_at, found)
            if journal.whole:
                for _ in journal.records(journal.sequence):
                    pass
        except CorruptError as error:
            self.damaged(error)

    def slab(self, block: BlockNo, first: int) -> PageNo:
        """A slab from its page ``first`` on; the page of the region to go on with, the one behind it at the end."""
        end = PageNo((block + 1) * PAGES_PER_BLOCK)
        self.structures += not first
        try:
            slab = Slab.decode(self.region.read(block * PAGES_PER_BLOCK * PAGE, PAGE), block)
        except CorruptError as error:
            if not first:
                self.damaged(error)
            return end
        for index in range(first, PAGES_PER_BLOCK):
            page = PageNo(block * PAGES_PER_BLOCK + index)
            if self.structures >= STEP:
                return page
            if slab.kinds[index] == PAGE_NODE:
                self.node(page)
            elif slab.kinds[index] == PAGE_INODES:
                for slot in range(INODES_PER_PAGE):
                    self.inode(Ino(page * INODES_PER_PAGE + slot))
        return end

    def node(self, page: PageNo) -> None:
        """A tree node, whoever its owner is."""
        self.structures += 1
        raw = self.region.read(page * PAGE, PAGE)
        owner = Ino(PAGE_HEADER_LAYOUT.unpack(raw).owner)
        try:
            Node.decode(raw, page, owner)
        except CorruptError as error:
            # Not of the inode that the page names: a damaged page may name any.
            self.damaged(CorruptError(error.what, error.offset, error.found), Ino(owner))

    def inode(self, ino: Ino) -> None:
        """An inode, and the values of its attributes that have pages of their own.  A free slot has a checksum, too."""
        self.structures += 1
        try:
            inode = read_inode(self.region, ino)
            if inode.mode and inode.xattrs:
                xattrs = Xattrs(self.fs.volume, ino, inode)
                for attribute in xattrs.all():
                    self.structures += attribute.head.external
                    xattrs.value(attribute)
        except CorruptError as error:
            self.damaged(error, ino)
