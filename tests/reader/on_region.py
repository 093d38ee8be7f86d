"""The structures of a region, stated a second time: from the documentation in pkernfs/format.py, not from its code."""

import struct
from typing import NamedTuple

PAGE, BLOCK = 4096, 2 << 20
FREE, META, DATA, SLAB = range(4)  #: kinds of blocks
P_FREE, P_HEADER, P_INODES, P_NODE, P_DATA, P_XATTR = range(6)  #: kinds of pages in a slab
CONTENT_AWAITS = 2  #: the ro_compat feature: content awaits invalidations
FAR_COPY = 1  #: the ro_compat feature: the last page of the region is a copy of the superblock
STORE, DISCARD, WORDS = range(3)  #: kinds of journal records
ROOT, ORPHANS, IOMMU, ROOT_TABLES, FIRST_SLOT = 1, 2, 3, 4, 16
F_ROOT_TABLES, F_DOMAIN, F_HELD = 8, 16, 64  #: flags of inodes
HELD_FILES = 4  #: the feature of a region that has them, of those that a writer must know

SUPERBLOCK = struct.Struct("<QIIIIIIII16s64s16sQQQQQqQ")  #: the 192 bytes under the checksum
PAGE_HEADER = struct.Struct("<IIQQHHI")
INODE = struct.Struct("<QqqqIIIIIIIIqQQQQQQQQ120s")
EXTENT, EXTENT_VALUE = struct.Struct("<QQQ"), struct.Struct("<QQ")
DIRENT, XATTR = struct.Struct("<QII"), struct.Struct("<BBHIII")
MAPPING, DOMAIN = struct.Struct("<QQQII"), struct.Struct("<BBBBIQQ")
ATTACHMENT = struct.Struct("<QII")
PENDING, AWAITING = struct.Struct("<QQ"), struct.Struct("<QQ")
JOURNAL_HEADER, RECORD = struct.Struct("<QIIQQQ"), struct.Struct("<QII")


class Inode(NamedTuple):
    """An inode's fields, as they stand in the slot."""

    size: int
    atime: int
    mtime: int
    ctime: int
    checksum: int
    mode: int
    nlink: int
    generation: int
    uid: int
    gid: int
    rdev: int
    flags: int
    btime: int
    parent: int
    pages: int
    root: int
    xattrs: int
    project: int
    iommu: int
    orphan_next: int
    orphan_prev: int
    inline: bytes


class Slab(NamedTuple):
    """The header of a slab: for each of its 512 pages the kind, and the slots in use of a page of inodes."""

    kinds: bytes
    slots: tuple[int, ...]


def _crc_table() -> list[int]:
    """What two bytes do to a crc32c: one step for each value of its low 16 bits."""
    one = list(range(256))
    for _ in range(8):
        one = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in one]
    half = [one[value & 255] ^ value >> 8 for value in range(65536)]
    return [one[value & 255] ^ value >> 8 for value in half]


CRC_TABLE = _crc_table()


def crc32c(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The Castagnoli CRC of ``data``, continuing from the CRC ``start``."""
    crc = start ^ 0xFFFFFFFF
    for pair in struct.unpack_from(f"<{len(data) // 2}H", data):
        crc = CRC_TABLE[(crc ^ pair) & 0xFFFF] ^ crc >> 16
    if len(data) % 2:
        crc ^= data[-1]
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
