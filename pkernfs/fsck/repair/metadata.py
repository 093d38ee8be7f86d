"""Repair of what must be sound before a volume can be opened: the superblocks, the journal, the block table.

What is stored here is not in a transaction, for the journal is not to be trusted yet, but each store can be torn: the
other superblock, or the next repair, makes up for it.
"""

from __future__ import annotations

from contextlib import suppress

from pkernfs.errors import CorruptError, FormatError, PkernfsError
from pkernfs.format import (
    BLOCK,
    BLOCK_FREE,
    BLOCK_KINDS,
    BLOCK_META,
    BLOCK_SLAB,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    MAGIC,
    PAGE,
    PAGE_HEADER_LAYOUT,
    RO_COMPAT_FAR_COPY,
    SUPERBLOCK,
    SUPERBLOCK_CHECKED,
    TABLE_FANOUT,
    TABLE_MAGIC,
    BlockNo,
    JournalHeader,
    Superblock,
)
from pkernfs.fs.journal import MAX_SEQUENCE, Journal
from pkernfs.fs.pages import check_page, encode_page
from pkernfs.fs.slab import Slab
from pkernfs.fsck.findings import NO_INO
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import Repair, batches
from pkernfs.region import Region, check_superblock, copies_of, find_copies


def mend_superblocks(region: Region) -> list[Repair]:
    """Restore the superblock from a copy, and the copies from it.  Raises FormatError when none can be used."""
    done = []
    try:
        sb = check_superblock(region.read(0, SUPERBLOCK.size), region.size, region.path or "region")
    except FormatError as error:
        copies = find_copies(region)
        if not copies:
            raise FormatError(error.text, hint="no copy of the superblock can be used either") from None
        at, sb = copies[0]
        # A superblock that allows reading only, or is too new, is not changed.
        check_superblock(region.read(at, SUPERBLOCK.size), region.size, "the copy of the superblock")
        raw = region.read(at, SUPERBLOCK_CHECKED)
        if region.word(0) != MAGIC:  # overwritten by somebody else, and so are the words behind, which no copy has
            raw += bytes(SUPERBLOCK.size - SUPERBLOCK_CHECKED)
        # The magic last: a superblock without it is not taken for one.
        region.store(8, raw[8:])
        region.store_word(0, int.from_bytes(raw[:8], "little"))
        done = [Repair(Code.SUPERBLOCK, f"restored from its copy at {at:#x}")]
    raw = region.read(0, SUPERBLOCK_CHECKED)
    for at in copies_of(sb):
        if region.read(at, SUPERBLOCK_CHECKED) != raw:
            region.store(at, raw)
            done.append(Repair(Code.SUPERBLOCK, "the copy was written anew", NO_INO, at))
    return done


def mend_journal(region: Region, sb: Superblock) -> list[Repair]:
    """Replay is the volume's; here a committed transaction that cannot be trusted is dropped, and the header mended."""
    journal = Journal(region, sb)
    at = journal.header_at
    commit = region.word(at)
    done = []
    try:
        if commit & 1:
            list(journal.records(commit >> 1))
    except CorruptError as error:
        commit &= ~1
        region.store_word(at, commit)
        text = f"dropped a transaction that cannot be trusted ({error.what}: {error.found}); it was not applied"
        done.append(Repair(Code.JOURNAL, text, NO_INO, at))
    magic = JOURNAL_HEADER.unpack(region.read(at, JOURNAL_HEADER.size)).magic
    if magic != JOURNAL_MAGIC or commit >> 1 > MAX_SEQUENCE:
        commit = commit if commit >> 1 <= MAX_SEQUENCE else 0
        region.store(at, JOURNAL_HEADER.pack(JournalHeader(commit & ~1, JOURNAL_MAGIC, 0, commit >> 1, 0, 0)))
        done.append(Repair(Code.JOURNAL, "its header was written anew", NO_INO, at))
    return done


def mend_table(region: Region, sb: Superblock) -> list[Repair]:
    """Pages of the block table have right headers and possible kinds; what blocks are used for comes later.

    To be called when no transaction waits in the journal.
    """
    stores = []
    done = []
    for index in range(sb.table_pages):
        offset = PAGE + index * PAGE
        raw = region.read(offset, PAGE)
        try:
            check_page(raw, TABLE_MAGIC, offset, index, "the block table")
            text, trusted = f"page {index} of the block table named kinds of blocks that cannot be", True
        except CorruptError as error:
            text = f"page {index} of the block table was damaged ({error.found}): its checksum was made right"
            trusted = False
        found = raw[PAGE_HEADER_LAYOUT.size :]
        first = index * TABLE_FANOUT
        kinds = bytearray(found)
        for at, kind in enumerate(found):
            block = BlockNo(first + at)
            if block < sb.first_block:
                kinds[at] = BLOCK_META
            elif block >= sb.blocks:
                kinds[at] = BLOCK_FREE
            elif block == sb.blocks - 1 and sb.ro_compat & RO_COMPAT_FAR_COPY:
                kinds[at] = BLOCK_SLAB
            elif kind == BLOCK_META or kind not in BLOCK_KINDS or (kind == BLOCK_FREE and not trusted):
                kinds[at] = BLOCK_SLAB if is_slab(region, block) else BLOCK_FREE
        if trusted and kinds == found:
            continue
        stores.append((offset, encode_page(TABLE_MAGIC, offset, index, 0, 0, bytes(kinds))))
        done.append(Repair(Code.BLOCK_TABLE, text, NO_INO, offset))
    journal = Journal(region, sb)
    for batch in batches(stores):
        journal.commit(batch, [])
    return done


def is_slab(region: Region, block: BlockNo) -> bool:
    """Whether the block begins with the header of a slab, whatever its checksum."""
    try:
        Slab.decode(region.read(block * BLOCK, PAGE), block, verify=False)
    except CorruptError:
        return False
    return True


def finish_transaction(region: Region) -> None:
    """After an interruption: apply what is committed, as the next mount would; what cannot be trusted waits for it."""
    with suppress(PkernfsError):
        Journal(region, check_superblock(region.read(0, SUPERBLOCK.size), region.size, "superblock")).recover()
    region.flush()


def mend_part(region: Region, code: Code) -> None:
    """Mend only what findings of this code keep from being opened.  Raises FormatError, CorruptError."""
    if code == Code.SUPERBLOCK:
        mend_superblocks(region)
        return
    sb = check_superblock(region.read(0, SUPERBLOCK.size), region.size, region.path or "region")
    mend_journal(region, sb)
    if code == Code.BLOCK_TABLE:
        Journal(region, sb).recover()
        mend_table(region, sb)


def mend_metadata(region: Region) -> tuple[list[Repair], int]:
    """Make it possible to open the volume; the repairs, and the number of records of the journal that were replayed.

    Raises FormatError when no superblock can be used.
    """
    done = mend_superblocks(region)
    sb = check_superblock(region.read(0, SUPERBLOCK.size), region.size, region.path or "region")
    done += mend_journal(region, sb)
    records = Journal(region, sb).recover()
    return done + mend_table(region, sb), records
