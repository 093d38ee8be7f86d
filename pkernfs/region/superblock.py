"""Reading and checking the superblock: what a region must be before anything else in it is looked at."""

from pkernfs.errors import FormatError
from pkernfs.format import (
    BLOCK,
    INCOMPAT_KNOWN,
    INODE_SIZE,
    MAGIC,
    MAX_BLOCKS,
    MIN_BLOCKS,
    PAGE,
    RO_COMPAT_KNOWN,
    SUPERBLOCK,
    SUPERBLOCK_CHECKED,
    VERSION,
    Superblock,
    checksum,
    geometry,
)
from pkernfs.region.base import Region

CHECKSUM_AT = SUPERBLOCK.offsets["checksum"]


def superblock_checksum(raw: bytes) -> int:
    """The checksum that the 256 bytes ``raw`` should carry."""
    return checksum(raw[:CHECKSUM_AT] + bytes(4) + raw[CHECKSUM_AT + 4 : SUPERBLOCK_CHECKED])


def encode_superblock(sb: Superblock) -> bytes:
    """Encode with the right checksum."""
    return SUPERBLOCK.pack(sb._replace(checksum=superblock_checksum(SUPERBLOCK.pack(sb))))


def check_superblock(raw: bytes, size: int, name: str, *, readonly: bool = False) -> Superblock:
    """Decode and check the 256 bytes of a superblock of the region ``name`` of ``size`` bytes.

    Raises FormatError with one line for a wrong magic, version, checksum, feature, size or geometry.
    """
    sb = SUPERBLOCK.unpack(raw)
    if sb.magic != MAGIC:
        found = "zeros" if not any(raw) else f"magic {sb.magic:#x}"
        raise FormatError(
            f"{name}: not a pkernfs region: expected magic {MAGIC:#x}, found {found}", hint="mkfs.pkernfs makes one"
        )
    if sb.version != VERSION:
        raise FormatError(
            f"{name}: expected format version {VERSION}, found {sb.version}", hint="use the pkernfs that made it"
        )
    if sb.checksum != superblock_checksum(raw):
        raise FormatError(
            f"{name}: superblock checksum: expected {superblock_checksum(raw):#010x}, found {sb.checksum:#010x}",
            hint="fsck.pkernfs can restore it from its copy",
        )
    if sb.incompat & ~INCOMPAT_KNOWN:
        raise FormatError(
            f"{name}: unknown incompatible features {sb.incompat & ~INCOMPAT_KNOWN:#x}", hint="use a newer pkernfs"
        )
    if sb.ro_compat & ~RO_COMPAT_KNOWN and not readonly:
        raise FormatError(
            f"{name}: features {sb.ro_compat & ~RO_COMPAT_KNOWN:#x} allow reading only", hint="mount with -o ro"
        )
    if (sb.block_size, sb.page_size, sb.inode_size) != (BLOCK, PAGE, INODE_SIZE):
        raise FormatError(
            f"{name}: expected blocks/pages/inodes of {BLOCK}/{PAGE}/{INODE_SIZE} bytes, "
            f"found {sb.block_size}/{sb.page_size}/{sb.inode_size}"
        )
    if not MIN_BLOCKS <= sb.blocks <= MAX_BLOCKS:
        raise FormatError(f"{name}: expected {MIN_BLOCKS} to {MAX_BLOCKS} blocks, found {sb.blocks}")
    if sb.blocks * BLOCK > size:
        raise FormatError(
            f"{name}: the region is truncated: expected {sb.blocks * BLOCK} bytes, found {size}",
            hint="restore the file to its full size",
        )
    geo = geometry(sb.blocks)
    if (sb.table_pages, sb.journal_offset, sb.first_block) != (geo.table_pages, geo.journal_offset, geo.first_block):
        raise FormatError(
            f"{name}: expected table_pages/journal_offset/first_block {geo.table_pages}/{geo.journal_offset:#x}/"
            f"{geo.first_block}, found {sb.table_pages}/{sb.journal_offset:#x}/{sb.first_block}"
        )
    if geo.first_block >= sb.blocks:
        raise FormatError(f"{name}: expected more than {geo.first_block} blocks, found {sb.blocks}")
    if sb.phys_base % BLOCK or sb.phys_base + sb.blocks * BLOCK > 1 << 64:
        raise FormatError(f"{name}: expected a physical address that fits, found {sb.phys_base:#x}")
    return sb


def read_superblock(region: Region, *, readonly: bool = False) -> Superblock:
    """The checked superblock of ``region``.  Raises FormatError."""
    return check_superblock(region.read(0, SUPERBLOCK.size), region.size, region.path or "region", readonly=readonly)
