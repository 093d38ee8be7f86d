"""Reading and checking the superblock: what a region must be before anything else in it is looked at.

Its features are the one thing in it that changes after mkfs: an extension of the format is switched on when it is first
used, so that a region which never used it still opens with a version that does not know it (ext4 does the same).  The
word with the features is stored, then the word with the checksum, then the copies.  A crash between the two leaves a
checksum of fewer features: that is accepted, and nothing else.  (In the journal it cannot be: the journal is found by
the superblock.)
"""

import shlex

from pkernfs.errors import FormatError
from pkernfs.format import (
    BLOCK,
    INCOMPAT_KNOWN,
    INODE_SIZE,
    MAGIC,
    MAX_BLOCKS,
    MIN_BLOCKS,
    PAGE,
    RO_COMPAT_FAR_COPY,
    RO_COMPAT_KNOWN,
    SUPERBLOCK,
    SUPERBLOCK_CHECKED,
    VERSION,
    MiB,
    Superblock,
    checksum,
    geometry,
)
from pkernfs.region.base import Region
from pkernfs.region.remains import Source, look_for_structures

CHECKSUM_AT = SUPERBLOCK.offsets["checksum"]
CHECKSUM_WORD, FEATURES_WORD = CHECKSUM_AT & ~7, SUPERBLOCK.offsets["ro_compat"] & ~7


def superblock_checksum(raw: bytes) -> int:
    """The checksum that the 256 bytes ``raw`` should carry."""
    return checksum(raw[:CHECKSUM_AT] + bytes(4) + raw[CHECKSUM_AT + 4 : SUPERBLOCK_CHECKED])


def encode_superblock(sb: Superblock) -> bytes:
    """Encode with the right checksum."""
    return SUPERBLOCK.pack(sb._replace(checksum=superblock_checksum(SUPERBLOCK.pack(sb))))


def _is_of_fewer_features(sb: Superblock) -> bool:
    """Whether the checksum is right but for known features that were being switched on."""
    fewer = known = sb.ro_compat & RO_COMPAT_KNOWN
    while fewer:
        fewer = (fewer - 1) & known
        if superblock_checksum(SUPERBLOCK.pack(sb._replace(ro_compat=sb.ro_compat & ~known | fewer))) == sb.checksum:
            return True
    return False


class DamagedSuperblockError(FormatError):
    """The bytes are no superblock, or one whose checksum is wrong: a copy may be sound."""


def check_superblock(raw: bytes, size: int, name: str, *, readonly: bool = False) -> Superblock:
    """Decode and check the 256 bytes of a superblock of the region ``name`` of ``size`` bytes.

    Raises FormatError with one line for a wrong magic, version, checksum, feature, size or geometry.
    """
    sb = SUPERBLOCK.unpack(raw)
    if sb.magic != MAGIC:
        found = "zeros" if not any(raw) else f"magic {sb.magic:#x}"
        raise DamagedSuperblockError(f"{name}: not a pkernfs region: expected magic {MAGIC:#x}, found {found}")
    if sb.version != VERSION:
        raise FormatError(
            f"{name}: expected format version {VERSION}, found {sb.version}", hint="use the pkernfs that made it"
        )
    if sb.checksum != superblock_checksum(raw) and not _is_of_fewer_features(sb):
        raise DamagedSuperblockError(
            f"{name}: superblock checksum: expected {superblock_checksum(raw):#010x}, found {sb.checksum:#010x}"
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
            hint=f"truncate -s {sb.blocks * BLOCK} keeps what is left; then run fsck.pkernfs",
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
    """The checked superblock of ``region``.  Raises FormatError, which says what is there where it is damaged."""
    name = region.path or "region"
    try:
        return check_superblock(region.read(0, SUPERBLOCK.size), region.size, name, readonly=readonly)
    except DamagedSuperblockError as error:
        raise _what_is_there(region, name, error) from None


def _what_is_there(region: Region, name: str, error: FormatError) -> FormatError:
    """The error of a superblock that cannot be used, and what else there is: no hint may cost anybody a region."""
    why = error.text.removeprefix(f"{name}: ").removeprefix("not a pkernfs region: ")
    fsck = f"fsck.pkernfs {shlex.quote(name)}"
    if found := find_copies(region):
        text = (
            f"{name}: looks like a pkernfs region whose superblock is damaged ({why}); its copy at {found[0][0]:#x} is"
        )
        return FormatError(f"{text} sound", hint=fsck)
    left = look_for_structures(region)
    if left.structures or error.text.startswith(f"{name}: superblock checksum"):
        text = f"{name}: looks like a pkernfs region of which no superblock is sound ({why})"
        return FormatError(f"{text}; {left}", hint="keep it as it is, and restore it from a copy")
    hint = "is it the right file?" if left.content else "mkfs.pkernfs makes one"
    return FormatError(f"{name}: not a pkernfs region: {why}, {left}", hint=hint)


def error_of_size(source: Source, name: str) -> FormatError:
    """The error of a region, or what is taken for one, whose size no region has."""
    try:
        check_superblock(source.peek(0, SUPERBLOCK.size).ljust(SUPERBLOCK.size, b"\0"), source.size, name)
    except DamagedSuperblockError:
        hint = "is it the right file?" if look_for_structures(source).content else "mkfs.pkernfs --size makes a region"
    except FormatError as error:
        return error
    else:
        hint = "the region in it is whole: who has made the file longer?"
    found = f"expected a multiple of 2 MiB, at least {MIN_BLOCKS * BLOCK // MiB} MiB, found {source.size} bytes"
    return FormatError(f"{name}: {found}", hint=hint)


def copies_of(sb: Superblock) -> tuple[int, ...]:
    """Where copies of the superblock ``sb`` stand: offsets, bytes."""
    far = (far_copy_at(sb.blocks),) if sb.ro_compat & RO_COMPAT_FAR_COPY else ()
    return (geometry(sb.blocks).journal_offset, *far)


def far_copy_at(blocks: int) -> int:
    """Where the far copy of the superblock stands in a region of ``blocks`` blocks: offset, bytes."""
    return blocks * BLOCK - PAGE


#: Ends of blocks at which a far copy is looked for, from the last one back: a region may be in a longer file.
LOOKED_BACK = 1 << 16


def find_copies(source: Source) -> list[tuple[int, Superblock]]:
    """Offset and content of each sound copy that is where it says; the size allows journals to begin up to block 1024.

    The nearest first.  Found without the first superblock, so that nothing is known of the region but its size.
    """
    blocks = source.size // BLOCK
    last = geometry(min(max(blocks, 1), MAX_BLOCKS)).journal_offset // BLOCK
    places = [block * BLOCK for block in range(1, min(last, blocks - 1) + 1)]
    places += [far_copy_at(end) for end in range(blocks, max(blocks - LOOKED_BACK, last), -1)]
    magic = MAGIC.to_bytes(8, "little")
    found = []
    for at in places:
        raw = source.peek(at, SUPERBLOCK.size)
        if not raw.startswith(magic) or len(raw) < SUPERBLOCK.size:
            continue
        try:
            sb = check_superblock(raw, source.size, "copy", readonly=True)
        except FormatError:
            continue
        if at in copies_of(sb):
            found.append((at, sb))
    return found


def _store_features(region: Region, sb: Superblock, at: int) -> None:
    raw = encode_superblock(sb)
    for word in (FEATURES_WORD, CHECKSUM_WORD):
        region.store_word(at + word, int.from_bytes(raw[word : word + 8], "little"))
        region.barrier()


def enable_features(region: Region, sb: Superblock, ro_compat: int) -> Superblock:
    """Switch features on; the superblock as it is then.  Raises FsError when the medium fails."""
    sb = sb._replace(ro_compat=sb.ro_compat | ro_compat)
    for at in (0, *copies_of(sb)):
        _store_features(region, sb, at)
    return sb


def recover_superblock(region: Region, sb: Superblock) -> None:
    """Finish what a crash within ``enable_features`` has left: all copies have the features of the first, ``sb``.

    What differs in anything else is damage, and stays for fsck.
    """
    raw = encode_superblock(sb)[:SUPERBLOCK_CHECKED]
    for at in (0, *copies_of(sb)):
        found = region.read(at, SUPERBLOCK.size)
        if found[:SUPERBLOCK_CHECKED] != raw and _is_older(SUPERBLOCK.unpack(found), sb):
            _store_features(region, sb, at)


def _is_older(found: Superblock, sb: Superblock) -> bool:
    """Whether ``found`` is ``sb`` but for features that were switched on since, or its checksum is still of those."""
    right = superblock_checksum(SUPERBLOCK.pack(found)) == found.checksum or _is_of_fewer_features(found)
    checked = slice(0, sb._fields.index("mounts"))
    same = found._replace(checksum=0, ro_compat=sb.ro_compat)[checked] == sb._replace(checksum=0)[checked]
    return right and same and not found.ro_compat & ~sb.ro_compat
