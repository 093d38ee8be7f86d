"""What is left of a region whose superblocks are gone: so that nobody takes one for free memory.

It is looked at with ``peek`` and ``next_data``, which take no memory for holes of a file; a read through a mapping of
tmpfs would (Linux: a read fault of a hole allocates a page; read(2) does not).
"""

import mmap
import os
import stat
from typing import NamedTuple, Protocol

from pkernfs.format import (
    BLOCK,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    PAGE,
    PAGE_HEADER_LAYOUT,
    SLAB_MAGIC,
    TABLE_MAGIC,
)

#: Blocks that are looked at, at most: spread over the region, so that 4 PiB take as long as 8 GiB (some 10 ms).
SAMPLE = 4096


class Source(Protocol):
    """What can be looked at."""

    size: int  #: bytes

    def peek(self, offset: int, length: int) -> bytes:
        """A copy of the range, as far as there is one."""

    def next_data(self, offset: int) -> int:
        """The first offset from ``offset`` on that is not in a hole; ``size``: there is none."""


class Descriptor:
    """A Source: a file or device that is open, of any size."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._map: mmap.mmap | None = None

    def peek(self, offset: int, length: int) -> bytes:
        """By read(2), which device DAX has not.  Raises OSError."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        if self._is_file:
            return os.pread(self.fd, length, offset)
        if self._map is None:
            # All of it: a device maps multiples of its alignment only, and what is not looked at costs nothing.
            self._map = mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ)
        return self._map[offset : offset + length]

    def next_data(self, offset: int) -> int:
        """By SEEK_DATA, where there is one."""
        if not self._is_file or offset >= self.size:
            return min(offset, self.size)
        try:
            return min(os.lseek(self.fd, offset, os.SEEK_DATA), self.size)
        except OSError:  # ENXIO: a hole to the end
            return self.size


class Remains(NamedTuple):
    """What was found in a sample of the blocks."""

    slabs: int
    journal: bool
    table: bool  #: a page of the block table
    content: bool  #: anything but zeros

    @property
    def structures(self) -> bool:
        """Whether it looks like a region."""
        return bool(self.slabs or self.journal or self.table)

    def __str__(self) -> str:
        found = [f"{self.slabs} slab{'s' * (self.slabs != 1)}"] * (self.slabs > 0)
        found += ["a journal"] * self.journal + ["a block table"] * self.table
        return f"found {', '.join(found) or 'other data' if self.content else 'zeros only'}"


def _anything(data: bytes) -> bool:
    return bool(data.strip(b"\0"))


def look_for_structures(source: Source) -> Remains:
    """Look at all of the first block; then at the beginnings of blocks, SAMPLE of them, and their first data."""
    slabs, journal, table, content = 0, False, False, _anything(source.peek(0, BLOCK))
    step = max(1, source.size // BLOCK // SAMPLE)
    at = source.next_data(0)
    while at < source.size:
        block = at // BLOCK
        head = source.peek(block * BLOCK, 2 * PAGE).ljust(2 * PAGE, b"\0")
        first, second = PAGE_HEADER_LAYOUT.unpack(head), PAGE_HEADER_LAYOUT.unpack(head, PAGE)
        slabs += first.magic == SLAB_MAGIC and (first.offset, first.owner) == (block * BLOCK, block)
        table |= second.magic == TABLE_MAGIC and second.offset == block * BLOCK + PAGE
        journal |= JOURNAL_HEADER.unpack(head, PAGE).magic == JOURNAL_MAGIC
        content = content or _anything(head) or _anything(source.peek(at, PAGE))
        at = source.next_data((block + step) * BLOCK)
    return Remains(slabs, journal, table, content)
