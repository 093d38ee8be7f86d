"""What comes first: superblocks, journal, block table, slab headers, reserved inodes."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import (
    BLOCK_META,
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
)
from pkernfs.fs.journal import MAX_SEQUENCE
from pkernfs.fs.pages import check_page
from pkernfs.fsck.check.inodes import RESERVED
from pkernfs.region import check_superblock

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker


def superblocks(checker: Checker) -> None:
    """Both copies are sound and equal."""
    sb = checker.volume.sb
    copies = [checker.region.read(at, SUPERBLOCK.size) for at in (0, sb.journal_offset)]
    for offset, raw in zip((0, sb.journal_offset), copies, strict=True):
        try:
            check_superblock(raw, checker.region.size, f"superblock at {offset:#x}", readonly=True)
        except FormatError as error:
            checker.note("superblock", error.text, offset=offset)
            return
    if copies[0][:SUPERBLOCK_CHECKED] != copies[1][:SUPERBLOCK_CHECKED]:
        checker.note("superblock", "expected equal superblocks, found two that differ", offset=sb.journal_offset)


def journal(checker: Checker) -> None:
    """No transaction waits to be applied: opening the volume replayed it."""
    at = checker.volume.journal.header_at
    header = JOURNAL_HEADER.unpack(checker.region.read(at, JOURNAL_HEADER.size))
    if header.seal & 1:
        checker.note("journal", f"expected no transaction to apply, found seal {header.seal:#x}", offset=at)
    elif header.magic != JOURNAL_MAGIC:
        checker.note("journal", f"journal magic: expected {JOURNAL_MAGIC:#x}, found {header.magic:#x}", offset=at)
    elif header.seal >> 1 > MAX_SEQUENCE:
        checker.note("journal", f"expected a count of transactions, found seal {header.seal:#x}", offset=at)


def block_table(checker: Checker) -> None:
    """The pages of the table are sound, and exactly the first blocks are metadata."""
    sb = checker.volume.sb
    table = bytearray()
    for index in range(sb.table_pages):
        offset = PAGE + index * PAGE
        raw = checker.region.read(offset, PAGE)
        try:
            check_page(raw, TABLE_MAGIC, offset, index, f"page {index} of the block table")
        except CorruptError as error:
            checker.ledger.note_damage("block-table", error)
            return
        table += raw[PAGE_HEADER_LAYOUT.size :]
    wanted = bytes([BLOCK_META]) * sb.first_block
    if table[: sb.first_block] != wanted or table.count(BLOCK_META) != sb.first_block:
        checker.note("block-kind", f"expected metadata in blocks 0 to {sb.first_block - 1} and nowhere else")
    if table[: sb.blocks] != checker.volume.space.table or any(table[sb.blocks : sb.table_pages * TABLE_FANOUT]):
        checker.note("block-table", "expected the kinds that the volume was opened with, and zeros behind them")


def slab_headers(checker: Checker) -> None:
    """The headers of slabs are sound, and only pages of inodes have slots in use."""
    checker.ledger.load_slabs()
    for block, slab in checker.ledger.slabs.items():
        for index, bits in enumerate(slab.slots):
            if bits and slab.kinds[index] != PAGE_INODES:
                page = block * PAGES_PER_BLOCK + index
                checker.slots_elsewhere.append(page)
                checker.note("slab-slots", f"page {page:#x} holds no inodes, found slots {bits:#x}", offset=page * PAGE)


def reserved_inodes(checker: Checker) -> None:
    """The slots in block 0 hold what mkfs made, and nothing else."""
    for ino in range(1, FIRST_FREE_SLOT):
        inode = checker.inode(ino)
        kind, flags = RESERVED.get(ino, (0, 0))
        found = (stat.S_IFMT(inode.mode), inode.flags) if inode else (kind, flags)
        if ino == ORPHANS_INO and inode and (inode.pages or inode.root or inode.size or inode.xattrs):
            checker.note("reserved-inode", f"inode {ino}: expected the head of a list, found content", ino=ino)
            checker.correct(ino, pages=0, root=0, size=0, xattrs=0)
        if found != (kind, flags):
            checker.note(
                "reserved-inode", f"inode {ino}: expected type, flags {kind:o}, {flags}, found {found}", ino=ino
            )
            if kind and found[0] == kind:
                checker.correct(ino, flags=flags)
            else:
                checker.bad[ino] = "not what belongs there"
