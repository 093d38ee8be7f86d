"""The lower half of the second reader: superblock, journal, block table and slabs."""

import mmap
import struct

from tests.reader.on_region import (
    BLOCK,
    CONTENT_AWAITS,
    DISCARD,
    FAR_COPY,
    FIRST_SLOT,
    FREE,
    HELD_FILES,
    INODE,
    JOURNAL_HEADER,
    META,
    P_FREE,
    P_HEADER,
    P_INODES,
    P_XATTR,
    PAGE,
    PAGE_HEADER,
    RECORD,
    SLAB,
    STORE,
    SUPERBLOCK,
    WORDS,
    Slab,
    crc32c,
)

Image = bytes | bytearray | memoryview | mmap.mmap


class Corrupt(Exception):
    """The image breaks a rule of the format."""


def expect(what: str, found: object, wanted: object) -> None:
    """Raise Corrupt when the two differ."""
    if found != wanted:
        raise Corrupt(f"{what}: found {found!r}, expected {wanted!r}")


class Space:
    """The blocks and pages of ``image``, as they are with a sealed journal applied.  Raises Corrupt from any method."""

    def __init__(self, image: Image) -> None:
        self.image = memoryview(image)
        self.overlay: dict[int, bytearray] = {}  #: page number: the page with the journal applied
        self.slabs: dict[int, Slab] = {}
        self._superblock()
        self.replayed = self._journal()  #: records of a sealed transaction that were applied
        self.kinds = b"".join(self._table_page(index) for index in range(self.table_pages))
        expect("blocks in use beyond the end", any(self.kinds[self.blocks :]), False)
        self.kinds = self.kinds[: self.blocks]
        if self.far_copy:
            expect("kind of the last block", self.kinds[-1], SLAB)
        metadata = [block for block, kind in enumerate(self.kinds) if kind == META]
        expect("metadata blocks", metadata, list(range(self.first_block)))

    def bytes_at(self, offset: int, length: int) -> bytes:
        """A copy of a range of the region, with the journal applied."""
        if offset + length > len(self.image):
            raise Corrupt(f"{length} bytes at {offset:#x} are beyond the end of the image")
        parts = []
        while length:
            page, at = divmod(offset, PAGE)
            step = min(length, PAGE - at) if self.overlay else length
            source = self.overlay.get(page)
            parts.append(bytes(self.image[offset : offset + step] if source is None else source[at : at + step]))
            offset, length = offset + step, length - step
        return b"".join(parts)

    def _superblock(self) -> None:
        first = bytes(self.image[:192])
        values = SUPERBLOCK.unpack(first)
        expect("superblock: magic and version", values[:2], (0x706B65726E6673, 1))
        expect("superblock: ro_compat", values[4] & ~(FAR_COPY | CONTENT_AWAITS | HELD_FILES), 0)
        expect("superblock: incompat, block_size, page_size, inode_size", values[5:9], (0, BLOCK, PAGE, 256))
        expect("superblock: checksum", crc32c(first[:12] + bytes(4) + first[16:]), values[2])
        self.ro_compat = values[4]
        self.uuid, label, self.seed = values[9:12]
        self.label = label.rstrip(b"\0").decode()
        self.blocks, self.phys_base, self.table_pages, self.journal, self.first_block, self.created = values[12:18]
        expect("superblock: blocks fit", self.blocks * BLOCK <= len(self.image), True)
        expect("superblock: table_pages", self.table_pages, -(-self.blocks // (PAGE - 32)))
        expect("superblock: journal_offset", self.journal, -(-(1 + self.table_pages) * PAGE // BLOCK) * BLOCK)
        expect("superblock: first_block", self.journal // BLOCK < self.first_block <= self.blocks, True)
        expect("copy of the superblock", bytes(self.image[self.journal : self.journal + 192]), first)
        self.far_copy = self.blocks * BLOCK - PAGE if values[4] & FAR_COPY else 0
        if self.far_copy:
            expect("far copy of the superblock", bytes(self.image[self.far_copy : self.far_copy + 192]), first)
        self.mounts, self.mounted, self.unmounted = struct.unpack_from("<Qqq", self.image, 192)

    def _journal(self) -> int:
        at = self.journal + PAGE
        header = bytes(self.image[at : at + 40])
        commit, magic, checksum, sequence, length, records = JOURNAL_HEADER.unpack(header)
        expect("journal: magic", magic, 0x6C6E726A)
        if commit % 2 == 0:
            return 0
        expect("journal: commit", commit, 2 * sequence + 1)
        expect("journal: length", length <= self.first_block * BLOCK - at - PAGE, True)
        body = bytes(self.image[at + PAGE : at + PAGE + length])
        expect("journal: checksum", crc32c(body, crc32c(header[16:])), checksum)
        position = 0
        for _ in range(records):
            offset, size, kind = RECORD.unpack_from(body, position)
            position += 16
            expect("journal: kind of record", kind in (STORE, DISCARD, WORDS), True)
            expect("journal: offset in words", offset % 8, 0)
            if kind != DISCARD:  # DISCARD leaves a range that nobody reads
                expect(
                    "journal: length in words, in the region", (size % 8, offset + size <= len(self.image)), (0, True)
                )
                self._overlay(offset, body[position : position + size])
                position += size
        expect("journal: end of the records", position, length)
        return int(records)

    def _overlay(self, offset: int, data: bytes) -> None:
        while data:
            page, at = divmod(offset, PAGE)
            step = min(len(data), PAGE - at)
            if page not in self.overlay:
                self.overlay[page] = bytearray(self.image[page * PAGE : (page + 1) * PAGE])
            self.overlay[page][at : at + step] = data[:step]
            offset, data = offset + step, data[step:]

    def page(self, page: int, magic: int, owner: int) -> tuple[bytes, int, int]:
        """A page with a header, checked: its bytes, count and level."""
        data = self.bytes_at(page * PAGE, PAGE)
        found, checksum, offset, found_owner, count, level, _ = PAGE_HEADER.unpack_from(data)
        expect(f"page {page}: magic, offset and owner", (found, offset, found_owner), (magic, page * PAGE, owner))
        expect(f"page {page}: checksum", crc32c(data[:4] + bytes(4) + data[8:]), checksum)
        return data, count, level

    def _table_page(self, index: int) -> bytes:
        return self.page(1 + index, 0x6C627462, index)[0][32:]

    def slab(self, block: int) -> Slab:
        """The header of the slab ``block``."""
        if block not in self.slabs:
            expect(f"block {block}: kind", self.kinds[block : block + 1], bytes([SLAB]))
            data = self.page(block * 512, 0x62616C73, block)[0]
            slab = Slab(data[32:544], struct.unpack_from("<512H", data, 544))
            expect(f"slab {block}: header pages", [i for i, kind in enumerate(slab.kinds) if kind == P_HEADER], [0])
            if block == self.far_copy // BLOCK:
                expect("kind of the page of the far copy", slab.kinds[511], P_XATTR)
            self.slabs[block] = slab
        return self.slabs[block]

    def free_pages(self) -> int:
        """Pages that nobody uses: those of free blocks, and the free ones of slabs."""
        slabs = [self.slab(block) for block, kind in enumerate(self.kinds) if kind == SLAB]
        return self.kinds.count(FREE) * 512 + sum(slab.kinds.count(P_FREE) for slab in slabs)

    def used_inodes(self) -> set[int]:
        """The numbers of all slots in use, reserved ones too."""
        used = {ino for ino in range(1, FIRST_SLOT) if INODE.unpack(self.bytes_at(ino * 256, 256))[5]}
        for block in (block for block, kind in enumerate(self.kinds) if kind == SLAB):
            slab = self.slab(block)
            for page in (page for page, kind in enumerate(slab.kinds) if kind == P_INODES):
                base = (block * 512 + page) * 16
                used.update(base + bit for bit in range(16) if slab.slots[page] >> bit & 1)
        return used
