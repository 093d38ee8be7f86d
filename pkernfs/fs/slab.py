"""A slab: a block that is cut into pages, and pages of it into inode slots."""

from __future__ import annotations

from array import array

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK,
    INODES_PER_PAGE,
    PAGE_FREE,
    PAGE_HEADER,
    PAGE_INODES,
    PAGE_KINDS,
    PAGES_PER_BLOCK,
    SLAB_KINDS_AT,
    SLAB_MAGIC,
    SLAB_SLOTS_AT,
    BlockNo,
)
from pkernfs.fs.pages import check_page, encode_page

ALL_SLOTS = (1 << INODES_PER_PAGE) - 1
SLOTS_END = SLAB_SLOTS_AT + 2 * PAGES_PER_BLOCK


class Slab:
    """The header of a block that is cut into pages.

    ``kinds``: a kind for each page.  ``slots``: for a page of inodes, the bitmap of its 16 slots in use.
    """

    def __init__(self, block: BlockNo, kinds: bytearray, slots: array[int], *, fresh: bool) -> None:
        self.block = block
        self.offset = block * BLOCK
        self.kinds = kinds
        self.slots = slots
        self.fresh = fresh
        self.free = kinds.count(PAGE_FREE)
        self.inodes = sum(map(int.bit_count, slots))
        self.first_with_slots = 0  #: no page of inodes before this index has a free slot

    @classmethod
    def empty(cls, block: BlockNo) -> Slab:
        """A new slab: everything free but the header."""
        kinds = bytearray(PAGES_PER_BLOCK)
        kinds[0] = PAGE_HEADER
        return cls(block, kinds, array("H", bytes(2 * PAGES_PER_BLOCK)), fresh=True)

    @classmethod
    def decode(cls, raw: bytes, block: BlockNo, *, verify: bool = True) -> Slab:
        """Check and decode the header of the slab in ``block``; without ``verify`` whatever its checksum.

        Raises CorruptError.
        """
        offset = block * BLOCK
        check_page(raw, SLAB_MAGIC, offset, block, f"the header of slab {block}", verify=verify)
        kinds = bytearray(raw[SLAB_KINDS_AT : SLAB_KINDS_AT + PAGES_PER_BLOCK])
        if kinds[0] != PAGE_HEADER or max(kinds) not in PAGE_KINDS or kinds.count(PAGE_HEADER) != 1:
            raise CorruptError(f"the header of slab {block}", offset, "kinds of pages that do not exist")
        slots = array("H", raw[SLAB_SLOTS_AT:SLOTS_END])
        return cls(block, kinds, slots, fresh=False)

    def encode(self) -> bytes:
        """The page as it goes to the region."""
        return encode_page(SLAB_MAGIC, self.offset, self.block, 0, 0, self.kinds, self.slots.tobytes())

    def page_with_slots(self) -> int:
        """The index of a page of inodes with a free slot, or -1."""
        at = self.kinds.find(PAGE_INODES, self.first_with_slots)
        while at >= 0 and self.slots[at] == ALL_SLOTS:
            at = self.kinds.find(PAGE_INODES, at + 1)
        self.first_with_slots = at if at >= 0 else PAGES_PER_BLOCK
        return at
