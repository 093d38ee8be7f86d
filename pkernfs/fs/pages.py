"""Pages and inode slots as bytes: headers, checksums, and the checks that every reader begins with."""

import struct
from typing import Protocol

from pkernfs.errors import CorruptError
from pkernfs.format import (
    INODE,
    INODE_CHECKED_AT,
    INODE_SIZE,
    PAGE,
    PAGE_HEADER_LAYOUT,
    Inode,
    PageHeader,
    checksum,
)
from pkernfs.region import Region

_CHECKSUM = struct.Struct("<I")


class Page(Protocol):
    """A decoded page: a tree node, a slab header, a page of the block table."""

    offset: int  #: in the region, bytes
    fresh: bool  #: free in the committed state, so it may be stored before the seal

    def encode(self) -> bytes:
        """The 4096 bytes, with checksum."""


def seal_page(magic: int, offset: int, owner: int, count: int, level: int, body: bytes) -> bytes:
    """The 4096 bytes of a page with a header: ``body`` is padded with zeros."""
    page = PAGE_HEADER_LAYOUT.pack(PageHeader(magic, 0, offset, owner, count, level, 0)) + body
    page += bytes(PAGE - len(page))
    return page[:4] + _CHECKSUM.pack(checksum(page)) + page[8:]


def check_page(raw: bytes, magic: int, offset: int, owner: int, what: str) -> PageHeader:
    """Check the header and the checksum of a page that was read at ``offset``.  Raises CorruptError."""
    header = PAGE_HEADER_LAYOUT.unpack(raw)
    expected = (magic, offset, owner)
    if (header.magic, header.offset, header.owner) != expected:
        found = (header.magic, header.offset, header.owner)
        raise CorruptError(what, offset, f"expected magic, offset, owner {expected}, found {found}")
    crc = checksum(raw[:4] + bytes(4) + raw[8:])
    if crc != header.checksum:
        raise CorruptError(what, offset, f"checksum {header.checksum:#x}, expected {crc:#x}")
    return header


def read_inode(region: Region, ino: int) -> Inode:
    """Decode and check a slot, in use or free.  Raises CorruptError."""
    offset = ino * INODE_SIZE
    raw = region.read(offset, INODE_SIZE)
    inode = INODE.unpack(raw)
    if inode.mode or inode.checksum:
        crc = checksum(bytes(4) + raw[INODE_CHECKED_AT + 4 :], ino & 0xFFFFFFFF)
        if crc != inode.checksum:
            raise CorruptError(f"inode {ino}", offset, f"checksum {inode.checksum:#x}, expected {crc:#x}")
    return inode


def seal_inode(ino: int, inode: Inode) -> bytes:
    """The 256 bytes of a slot, with checksum.  Raises CorruptError when a count (of a damaged region) does not fit."""
    try:
        raw = INODE.pack(inode)
    except struct.error:
        raise CorruptError(f"inode {ino}", ino * INODE_SIZE, "counts that do not add up") from None
    checked = raw[INODE_CHECKED_AT:]
    crc = checksum(bytes(4) + checked[4:], ino & 0xFFFFFFFF)
    return raw[:INODE_CHECKED_AT] + _CHECKSUM.pack(crc) + checked[4:]
