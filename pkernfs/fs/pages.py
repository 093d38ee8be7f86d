"""Pages and inode slots as bytes: headers, checksums, and the checks that every reader begins with."""

import stat
import struct
from typing import Protocol

from pkernfs.errors import CorruptError, mode_text
from pkernfs.format import (
    FLAG_DIR,
    FLAG_FILE,
    INLINE_SIZE,
    INODE,
    INODE_CHECKED_AT,
    INODE_SIZE,
    MAX_FILE_SIZE,
    PAGE,
    PAGE_HEADER_LAYOUT,
    SYMLINK_MAX,
    Ino,
    Inode,
    PageHeader,
    checksum,
)
from pkernfs.fs.damage import NO_INO, corrupt_inode
from pkernfs.region import Region

_CHECKSUM = struct.Struct("<I")
NO_CHECKSUM = bytes(_CHECKSUM.size)  #: what stands in the place of a checksum while it is computed
#: type -> largest size, bytes; of a directory it is the number of its entries
SIZE_LIMITS = {
    stat.S_IFREG: MAX_FILE_SIZE,
    stat.S_IFLNK: SYMLINK_MAX,
    stat.S_IFIFO: 0,
    stat.S_IFSOCK: 0,
    stat.S_IFCHR: 0,
    stat.S_IFBLK: 0,
}


class Page(Protocol):
    """A decoded page: a tree node, a slab header, a page of the block table."""

    offset: int  #: in the region, bytes
    fresh: bool  #: free in the committed state, so it may be stored before the commit record

    def encode(self) -> bytes:
        """The 4096 bytes, with checksum."""


def encode_page(magic: int, offset: int, owner: int, keys: int, level: int, *body: bytes | bytearray) -> bytes:
    """The 4096 bytes of a page with a header; ``body``, one part after the other, is padded with zeros.

    ``owner`` is a plain int: of a node it is an Ino, of a slab a BlockNo, of the block table the number of its page.
    """
    page = b"".join((PAGE_HEADER_LAYOUT.pack_values(magic, 0, offset, owner, keys, level, 0), *body))
    page += bytes(PAGE - len(page))
    return page[:4] + _CHECKSUM.pack(checksum(page)) + page[8:]


def check_page(
    raw: bytes, magic: int, offset: int, owner: int, what: str, *, ino: Ino = NO_INO, verify: bool = True
) -> PageHeader:
    """Check the header of a page that was read at ``offset`` and, if ``verify``, the checksum.

    ``owner`` as for ``encode_page``.  Raises CorruptError (of ``ino``).
    """
    header = PAGE_HEADER_LAYOUT.unpack(raw)
    expected = (magic, offset, owner)
    if (header.magic, header.offset, header.owner) != expected:
        found = (header.magic, header.offset, header.owner)
        raise CorruptError(what, offset, f"expected magic, offset, owner {expected}, found {found}", ino=ino)
    if verify and (crc := checksum(raw[:4] + bytes(4) + raw[8:])) != header.checksum:
        raise CorruptError(what, offset, f"checksum {header.checksum:#x}, expected {crc:#x}", ino=ino)
    return header


def has_extents(inode: Inode) -> bool:
    """Whether the content stands in extents: of regular files, and of long symbolic links."""
    return stat.S_ISREG(inode.mode) or (stat.S_ISLNK(inode.mode) and inode.size > INLINE_SIZE)


def raw_inode(region: Region, ino: Ino) -> Inode:
    """The fields of a slot, damaged or not."""
    return INODE.unpack(region.read(ino * INODE_SIZE, INODE_SIZE))


def read_inode(region: Region, ino: Ino) -> Inode:
    """Decode and check a slot, in use or free.  Raises CorruptError."""
    offset = ino * INODE_SIZE
    raw = region.read(offset, INODE_SIZE)
    inode = INODE.unpack(raw)
    if inode.mode or inode.checksum:
        crc = checksum(bytes(4) + raw[INODE_CHECKED_AT + 4 :], ino & 0xFFFFFFFF)
        if crc != inode.checksum:
            raise corrupt_inode(ino, f"checksum {inode.checksum:#x}, expected {crc:#x}")
    return inode


def new_inode(
    mode: int,
    now: int,
    uid: int,
    gid: int,
    *,
    rdev: int = 0,
    flags: int = 0,
    generation: int = 0,
    parent: Ino = NO_INO,
    project: Ino = NO_INO,
) -> Inode:
    """An inode that was made ``now``, with one name and without content; ``parent`` is for directories."""
    is_dir = stat.S_ISDIR(mode)
    return Inode(
        atime=now,
        mtime=now,
        ctime=now,
        mode=mode,
        nlink=2 if is_dir else 1,
        generation=generation & 0xFFFFFFFF,
        uid=uid,
        gid=gid,
        rdev=rdev,
        flags=flags | (FLAG_DIR if is_dir else FLAG_FILE if stat.S_ISREG(mode) else 0),
        btime=now,
        parent=parent if is_dir else NO_INO,
        project=project,
    )


def check_inode(ino: Ino, inode: Inode, total_pages: int) -> None:
    """Check the fields of an inode in use that would send a reader astray, whatever their checksum says.

    Raises CorruptError for a type that does not exist, a size beyond what the type can have (of a directory: entries),
    more pages than the region has.
    """
    kind = stat.S_IFMT(inode.mode)
    limit = total_pages * PAGE if kind == stat.S_IFDIR else SIZE_LIMITS.get(kind, -1)
    if limit < 0 or inode.mode >> 16:
        found = f"{mode_text(inode.mode)}, expected a type and permissions"
    elif inode.size > limit:
        found = f"a size of {inode.size}, expected at most {limit}"
    elif inode.pages > total_pages:
        found = f"a count of {inode.pages} pages, the region has {total_pages}"
    else:
        return
    raise corrupt_inode(ino, found)


def encode_inode(ino: Ino, inode: Inode) -> bytes:
    """The 256 bytes of a slot, with checksum.  Raises CorruptError when a count (of a damaged region) does not fit."""
    try:
        raw = INODE.pack(inode)
    except struct.error:
        raise corrupt_inode(ino, "counts that do not add up") from None
    behind = raw[INODE_CHECKED_AT + 4 :]
    crc = checksum(behind, checksum(NO_CHECKSUM, ino & 0xFFFFFFFF))
    return raw[:INODE_CHECKED_AT] + _CHECKSUM.pack(crc) + behind
