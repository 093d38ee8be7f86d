"""Making a filesystem in a region."""

from __future__ import annotations

import os
import stat
import time
import uuid as uuid_module

from pkernfs.errors import FormatError, UsageError
from pkernfs.format import (
    BLOCK,
    BLOCK_FREE,
    BLOCK_META,
    INODE_SIZE,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    MAGIC,
    MAX_BLOCKS,
    MAX_PHYSICAL,
    MIN_BLOCKS,
    ORPHANS_INO,
    PAGE,
    PAGE_FAR_COPY,
    RO_COMPAT_FAR_COPY,
    ROOT_INO,
    TABLE_FANOUT,
    TABLE_MAGIC,
    VERSION,
    Geometry,
    Ino,
    Inode,
    JournalHeader,
    Superblock,
    geometry,
)
from pkernfs.fs.mkfs_iommu import add_iommu
from pkernfs.fs.pages import encode_inode, encode_page, new_inode
from pkernfs.fs.volume import Volume
from pkernfs.region import Region, far_copy_at
from pkernfs.region.superblock import encode_superblock

ROOT_MODE = 0o700  #: of a new root directory: guests' memory is for nobody else until somebody says so


def check_parameters(size: int, label: str, phys_base: int) -> Geometry:
    """The geometry of a region of ``size`` bytes.  Raises FormatError (size), UsageError (label, phys_base)."""
    blocks = size // BLOCK
    if size % BLOCK or not MIN_BLOCKS <= blocks <= MAX_BLOCKS:
        raise FormatError(f"expected a multiple of 2 MiB, at least {MIN_BLOCKS * BLOCK} bytes, found {size}")
    if phys_base % BLOCK or phys_base + size > MAX_PHYSICAL:
        raise UsageError(f"--phys-base: expected a multiple of 2 MiB, and all below 2^52, found {phys_base:#x}")
    if len(label.encode()) > 64:
        raise UsageError(f"--label: expected at most 64 bytes, found {len(label.encode())}")
    geo = geometry(blocks)
    if geo.first_block >= blocks:
        raise FormatError(f"expected more than {geo.first_block} blocks of 2 MiB, found {blocks}")
    return geo


def mkfs(
    region: Region,
    *,
    label: str = "",
    uuid: uuid_module.UUID | None = None,
    phys_base: int = 0,
    hash_seed: bytes | None = None,
    owner: int | None = None,
    group: int | None = None,
    mode: int = ROOT_MODE,
) -> Superblock:
    """Make an empty filesystem: a root directory, ``iommu/`` and an empty ``iommu/root-pgtables``.

    What the region held is lost.  The superblock is stored last, so that a half-made region is not taken for one.
    ``phys_base``: physical address of offset 0, a multiple of 2 MiB.  ``owner``, ``group``, ``mode``: of the root
    directory (default: this process's).  Raises FormatError, UsageError, FsError(ENOSPC).
    """
    geo = check_parameters(region.size, label, phys_base)
    blocks = geo.blocks
    now = time.time_ns()
    sb = Superblock(
        magic=MAGIC,
        version=VERSION,
        checksum=0,
        compat=0,
        ro_compat=RO_COMPAT_FAR_COPY,
        incompat=0,
        block_size=BLOCK,
        page_size=PAGE,
        inode_size=INODE_SIZE,
        uuid=(uuid or uuid_module.uuid4()).bytes,
        label=label.encode(),
        hash_seed=os.urandom(16) if hash_seed is None else hash_seed,
        blocks=blocks,
        phys_base=phys_base,
        table_pages=geo.table_pages,
        journal_offset=geo.journal_offset,
        first_block=geo.first_block,
        created=now,
    )
    raw = encode_superblock(sb)
    region.store_word(0, 0)
    region.flush()
    if geo.first_block < blocks:
        region.discard(geo.first_block * BLOCK, (blocks - geo.first_block) * BLOCK)
    region.reserve(0, geo.first_block * BLOCK)
    for index in range(geo.table_pages):
        first = index * TABLE_FANOUT
        count = min(TABLE_FANOUT, blocks - first)
        kinds = bytes(BLOCK_META if first + n < geo.first_block else BLOCK_FREE for n in range(count))
        region.store(PAGE + index * PAGE, encode_page(TABLE_MAGIC, PAGE + index * PAGE, index, 0, 0, kinds))
    region.store(geo.journal_offset + PAGE, JOURNAL_HEADER.pack(JournalHeader(0, JOURNAL_MAGIC, 0, 0, 0, 0)))
    uid = os.getuid() if owner is None else owner
    gid = os.getgid() if group is None else group
    for ino, inode in _first_inodes(now, uid, gid, mode).items():
        region.store(ino * INODE_SIZE, encode_inode(ino, inode))
    region.store(geo.journal_offset, raw)
    region.store(8, raw[8:])
    volume = Volume(region, sb)
    _add_far_copy(volume, raw)
    add_iommu(volume)
    region.flush()
    region.store_word(0, MAGIC)
    region.flush()
    return sb


def _add_far_copy(volume: Volume, raw: bytes) -> None:
    """The superblock ``raw`` in the last page of the last block, whose other pages are for everybody.

    In a slab, and not in a block of its own: that would cost 2 MiB, half of what the least region has for files.  The
    first slab is made in the last block in any case.
    """
    region, sb = volume.region, volume.sb
    with volume.transaction() as tx:
        slab = volume.allocator.new_slab(tx)
        slab.kinds[-1] = PAGE_FAR_COPY
        slab.free -= 1
    assert slab.block == sb.blocks - 1
    region.store(far_copy_at(sb.blocks), raw)


def _first_inodes(now: int, uid: int, gid: int, mode: int) -> dict[Ino, Inode]:
    """The root directory and the list of orphans."""
    orphans = new_inode(stat.S_IFREG, now, uid, gid)
    return {
        ROOT_INO: new_inode(stat.S_IFDIR | mode, now, uid, gid, parent=ROOT_INO),
        ORPHANS_INO: orphans._replace(orphan_next=ORPHANS_INO, orphan_prev=ORPHANS_INO),
    }
