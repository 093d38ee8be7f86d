"""What comes first: superblocks, journal, block table, slab headers, reserved inodes."""

from __future__ import annotations

import stat

from pkernfs.errors import CorruptError, FormatError, file_type, quoted
from pkernfs.format import (
    BLOCK_KINDS,
    BLOCK_META,
    BLOCK_SLAB,
    FIRST_FREE_SLOT,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    ORPHANS_INO,
    PAGE,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGES_PER_BLOCK,
    SUPERBLOCK,
    SUPERBLOCK_CHECKED,
    TABLE_FANOUT,
    TABLE_MAGIC,
    Ino,
    PageNo,
)
from pkernfs.fs.damage import NO_PAGE
from pkernfs.fs.journal import MAX_SEQUENCE
from pkernfs.fs.pages import check_page
from pkernfs.fsck.check.rules import RESERVED
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import Fields, NoInodes, Unusable
from pkernfs.fsck.problems import Code
from pkernfs.region import check_superblock, copies_of


def superblocks(check: Check) -> None:
    """The superblock and its copies are sound and equal."""
    first = check.region.read(0, SUPERBLOCK.size)
    for offset in (0, *copies_of(check.volume.sb)):
        raw = check.region.read(offset, SUPERBLOCK.size)
        try:
            check_superblock(raw, check.region.size, f"superblock at {offset:#x}", readonly=True)
        except FormatError as error:
            check.note(Code.SUPERBLOCK, error.text, offset=offset)
            continue
        if raw[:SUPERBLOCK_CHECKED] != first[:SUPERBLOCK_CHECKED]:
            text = f"superblock at {offset:#x}: expected that at 0, found another one"
            check.note(Code.SUPERBLOCK, text, offset=offset)


def journal(check: Check) -> None:
    """No transaction waits to be applied: opening the volume replayed it."""
    at = check.volume.journal.header_at
    header = JOURNAL_HEADER.unpack(check.region.read(at, JOURNAL_HEADER.size))
    if header.commit & 1:
        check.note(Code.JOURNAL, f"expected no transaction to apply, found commit record {header.commit:#x}", offset=at)
    elif header.magic != JOURNAL_MAGIC:
        check.note(Code.JOURNAL, f"journal magic: expected {JOURNAL_MAGIC:#x}, found {header.magic:#x}", offset=at)
    elif header.commit >> 1 > MAX_SEQUENCE:
        check.note(Code.JOURNAL, f"expected a count of transactions, found commit record {header.commit:#x}", offset=at)


def block_table(check: Check) -> None:
    """The pages of the table are sound, and exactly the first blocks are metadata."""
    sb = check.volume.sb
    table = bytearray()
    for index in range(sb.table_pages):
        offset = PAGE + index * PAGE
        raw = check.region.read(offset, PAGE)
        try:
            check_page(raw, TABLE_MAGIC, offset, index, f"page {index} of the block table")
        except CorruptError as error:
            check.findings.incomplete = True
            check.findings.note_error(Code.BLOCK_TABLE, error)
            return
        table += raw[PAGE_HEADER_LAYOUT.size :]
    wanted = bytes([BLOCK_META]) * sb.first_block
    if table[: sb.first_block] != wanted or table.count(BLOCK_META) != sb.first_block:
        check.note(Code.BLOCK_KIND, f"expected metadata in blocks 0 to {sb.first_block - 1} and nowhere else")
    if check.volume.space.far_copy and table[sb.blocks - 1] != BLOCK_SLAB:
        kind = BLOCK_KINDS.get(table[sb.blocks - 1], "of no kind")
        check.note(Code.BLOCK_KIND, f"expected the last block to be a slab, with a superblock, found it {quoted(kind)}")
    if table[: sb.blocks] != check.volume.space.table or any(table[sb.blocks : sb.table_pages * TABLE_FANOUT]):
        check.note(Code.BLOCK_TABLE, "expected the kinds that the volume was opened with, and zeros behind them")


def slab_headers(check: Check) -> None:
    """The headers of slabs are sound, only pages of inodes have slots in use, and the superblock has its page."""
    check.memory.load_slabs()
    check.memory.claim_far_copy()
    for block, slab in check.memory.slabs.items():
        for index, bits in enumerate(slab.slots):
            if bits and slab.kinds[index] != PAGE_INODES:
                page = PageNo(block * PAGES_PER_BLOCK + index)
                text = f"page {page:#x} holds no inodes, found slots {bits:#x}"
                check.note(Code.SLAB_SLOTS, text, offset=page * PAGE, data=NoInodes(page))


def reserved_inodes(check: Check) -> None:
    """The slots in block 0 hold what mkfs made, and nothing else."""
    for ino in map(Ino, range(1, FIRST_FREE_SLOT)):
        inode = check.inode(ino)
        if inode is None:
            continue
        if ino == ORPHANS_INO and (inode.pages or inode.root or inode.size or inode.xattrs):
            text = f"inode {ino}: expected the head of a list, found content"
            data = Fields(ino, {"pages": 0, "root": NO_PAGE, "size": 0, "xattrs": NO_PAGE})
            check.note(Code.RESERVED_INODE, text, ino=ino, data=data)
        kind, flags = RESERVED.get(ino, (0, 0))
        found = stat.S_IFMT(inode.mode)
        if (found, inode.flags) == (kind, flags):
            continue
        wanted = f"{file_type(kind)} with flags {flags:#x}" if kind else "nothing"
        text = f"inode {ino}: expected {wanted}, found {file_type(found)} with flags {inode.flags:#x}"
        if kind and found == kind:
            check.reached.wrong_flags.add(ino)
            check.note(Code.RESERVED_INODE, text, ino=ino, data=Fields(ino, {"flags": flags}))
        else:
            check.note(Code.RESERVED_INODE, text, ino=ino, data=Unusable(ino, "not what belongs there"))
