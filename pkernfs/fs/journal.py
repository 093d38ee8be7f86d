"""The redo journal: one transaction at a time is logged, committed with one 8-byte store, applied and checkpointed.

One at a time, and applied at once, where jbd2 gathers many and checkpoints them later: memory has no seeks to save, and
so a reader (hardware, a program that maps the region, the next kernel) finds everything at its place after each call.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import suppress

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    BLOCK,
    DISCARD,
    JOURNAL_CHECKED_AT,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    JOURNAL_RECORD,
    PAGE,
    RO_COMPAT_FAR_COPY,
    STORE,
    SUPERBLOCK,
    WORDS,
    JournalRecord,
    Superblock,
    checksum,
    geometry,
)
from pkernfs.region.base import Region
from pkernfs.region.superblock import far_copy_at

#: Names the request that a transaction executes, see replies.py.
REPLY_KEY = JournalRecord(SUPERBLOCK.offsets["reply_key"], 8, STORE)
#: The numbers begin again behind it, so that 2 * sequence + 1 always fits its word; a greater one is damage.
MAX_SEQUENCE = 1 << 61


class Journal:
    """The journal of one region.  ``commit`` makes a set of stores happen together, ``recover`` finishes them."""

    def __init__(self, region: Region, sb: Superblock) -> None:
        self.region = region
        self.header_at = sb.journal_offset + PAGE
        self.body_at = sb.journal_offset + 2 * PAGE
        self.capacity = geometry(sb.blocks).journal_size
        self.end = sb.blocks * BLOCK  #: of the filesystem; the region may go on
        self.first_free = sb.first_block * BLOCK
        #: where the far copy of the superblock begins; behind the end when there is none
        self.far_copy = far_copy_at(sb.blocks) if sb.ro_compat & RO_COMPAT_FAR_COPY else self.end
        self.sequence = region.word(self.header_at) >> 1
        #: Header and body are those of transaction ``sequence``.  Not known of what an earlier user left: a crash in
        #: the middle of storing the next one leaves a mixture, which nobody looks at.
        self.whole = False

    def commit(
        self,
        stores: Iterable[tuple[int, bytes]],
        discards: Iterable[tuple[int, int]],
        words: Iterable[tuple[int, bytes]] = (),
    ) -> None:
        """Make all of ``stores`` and then ``words`` (offset, data) durable at once.

        Then ``discards`` (offset, length) are given back.  Each of the words is one store, in order.

        Offsets and lengths of stores and words are multiples of 8, of discards multiples of the page size.

        Raises FsError: ENOSPC when they do not fit (mkfs makes the journal large enough for all that operations
        change), or the host has no memory for what they store to, and nothing is stored; EIO when the medium fails:
        the region can be read only then, and the next mount finds the state before or after.
        """
        parts: list[bytes] = []
        pack = JOURNAL_RECORD.pack_values
        stores = list(stores)
        for offset, data in stores:
            parts += (pack(offset, len(data), STORE), data)
        words = list(words)
        for offset, data in words:
            parts += (pack(offset, len(data), WORDS), data)
        discards = list(discards)
        for offset, length in discards:
            parts.append(pack(offset, length // PAGE, DISCARD))
        records = len(stores) + len(words) + len(discards)
        body = b"".join(parts)
        if len(body) > self.capacity:
            raise FsError(errno.ENOSPC, f"a transaction of {len(body)} bytes, the journal holds {self.capacity}")
        region = self.region
        if not region.whole:
            # Behind the commit record nothing may fail.
            for offset, data in (*stores, *words):
                region.make_storable(offset, len(data))
        self.sequence = self.sequence % MAX_SEQUENCE + 1
        self.whole = False
        checkpointed = 2 * self.sequence
        header = JOURNAL_HEADER.pack_values(0, JOURNAL_MAGIC, 0, self.sequence, len(body), records)
        crc = checksum(body, checksum(header[JOURNAL_CHECKED_AT:]))
        # The transaction before is checkpointed on the medium before its body goes: a commit record must fit the body.
        region.barrier()
        region.store(self.body_at, body)
        # One store for the header's rest: in which order its words arrive does not matter before the commit record.
        # The commit record is left alone here: the word that is there says "checkpointed" already.
        region.store(self.header_at + 8, header[8:12] + crc.to_bytes(4, "little") + header[16:])
        region.barrier()
        region.store_word(self.header_at, checkpointed + 1)
        region.barrier()
        for offset, data in stores:
            region.store(offset, data)
        for offset, data in words:
            self._store_words(offset, data)
        for offset, length in discards:
            # The transaction stands already: memory that cannot be given back is no reason to fail it.
            with suppress(OSError, FsError):
                region.discard(offset, length)
        region.barrier()
        region.store_word(self.header_at, checkpointed)
        self.whole = True

    def waiting(self) -> list[tuple[JournalRecord, bytes]]:
        """The records of the transaction that waits to be applied; none waits when there are none.

        Raises CorruptError when it cannot be trusted.
        """
        commit = self.region.word(self.header_at)
        if commit >> 1 > MAX_SEQUENCE:
            raise CorruptError(
                "the journal header", self.header_at, f"sequence {commit >> 1}, expected at most {MAX_SEQUENCE}"
            )
        return list(self.records(commit >> 1)) if commit & 1 else []

    def recover(self) -> int:
        """Finish a transaction that is committed and not checkpointed; how many records it has, 0 without one.

        Raises CorruptError when a committed transaction cannot be trusted: nothing has been applied then.
        """
        records = self.waiting()
        commit = self.region.word(self.header_at)
        if not commit & 1:
            return 0
        # A server that was killed may have left the commit record in the page cache only.
        self.region.barrier()
        for record, data in records:
            if record.kind == STORE:
                self.region.store(record.offset, data)
            elif record.kind == WORDS:
                self._store_words(record.offset, data)
            else:
                self.region.discard(record.offset, record.length * PAGE)
        self.region.barrier()
        self.region.store_word(self.header_at, commit - 1)
        self.sequence = commit >> 1
        self.whole = True
        return len(records)

    def _store_words(self, offset: int, data: bytes) -> None:
        for at, word in enumerate(memoryview(data).cast("Q")):
            self.region.store_word(offset + 8 * at, word)

    def records(self, sequence: int) -> Iterator[tuple[JournalRecord, bytes]]:
        """The checked records of the transaction ``sequence``.  Raises CorruptError."""
        region = self.region
        raw = region.read(self.header_at, JOURNAL_HEADER.size)
        header = JOURNAL_HEADER.unpack(raw)
        if header.magic != JOURNAL_MAGIC or header.sequence != sequence or header.length > self.capacity:
            wanted = f"magic {JOURNAL_MAGIC:#x}, sequence {sequence}, at most {self.capacity} bytes"
            found = f"magic {header.magic:#x}, sequence {header.sequence}, {header.length} bytes"
            raise CorruptError("the journal header", self.header_at, f"expected {wanted}, found {found}")
        body = region.read(self.body_at, header.length)
        crc = checksum(body, checksum(raw[JOURNAL_CHECKED_AT:]))
        if crc != header.checksum:
            raise CorruptError("the journal", self.header_at, f"checksum {header.checksum:#x}, expected {crc:#x}")
        at = 0
        for _ in range(header.records):
            if at + JOURNAL_RECORD.size > len(body):
                raise CorruptError("the journal", self.body_at + at, "a record beyond its end")
            record = JOURNAL_RECORD.unpack(body, at)
            at += JOURNAL_RECORD.size
            if not self._is_possible(record):
                found = f"kind {record.kind} of length {record.length} for region offset {record.offset:#x}"
                raise CorruptError("a journal record", self.body_at + at, f"{found}, which no transaction has")
            if record.kind == DISCARD:
                yield record, b""
            else:
                if at + record.length > len(body):
                    raise CorruptError("the journal", self.body_at + at, "data beyond its end")
                yield record, body[at : at + record.length]
                at += record.length

    def _is_possible(self, record: JournalRecord) -> bool:
        """Whether a transaction can have such a record.

        Nothing in the superblocks but the word ``reply_key``, nothing in the journal, or beyond the end, and no memory
        given back but whole pages behind the metadata.
        """
        start = record.offset
        if record.kind == DISCARD:
            return self.first_free <= start and start + record.length * PAGE <= self.far_copy and not start % PAGE
        end = start + record.length
        if record == REPLY_KEY:
            return True
        inode_or_table = SUPERBLOCK.size <= start and end <= self.header_at - PAGE
        behind = self.first_free <= start and end <= self.far_copy
        aligned = not start & 7 and not end & 7
        return aligned and ((record.kind == STORE and inode_or_table) or (record.kind in (STORE, WORDS) and behind))
