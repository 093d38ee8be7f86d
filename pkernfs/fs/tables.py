"""What users may do with files of page tables: make, name and remove domains, and give one its first block.

Everything else about them is for the API of the IOMMU alone: hardware reads them.
"""

from __future__ import annotations

import errno
import os
import stat

from pkernfs.errors import FsError
from pkernfs.format import (
    BLOCK,
    FLAG_DIR,
    FLAG_FILE,
    FLAG_IOMMU_DIR,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    PAGE,
    ROOT_PGTABLES_INO,
    Inode,
)
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.records import TABLES, Records, is_attached
from pkernfs.fs.volume import Volume


def flags_of_new(above: Inode, mode: int) -> int:
    """The flags of an inode that is made in a directory: in iommu/ a regular file is a domain.

    Raises FsError(EPERM) for anything else there.
    """
    flags = FLAG_DIR if stat.S_ISDIR(mode) else FLAG_FILE if stat.S_ISREG(mode) else 0
    if above.flags & FLAG_IOMMU_DIR:
        if not stat.S_ISREG(mode):
            raise FsError(errno.EPERM, "expected a regular file, a domain: there is nothing else in iommu/")
        flags |= FLAG_IOMMU_DOMAIN_PGTABLES
    return flags


def check_places(above: Inode, *others: Inode) -> None:
    """Raise FsError(EPERM) when one of several directories is iommu/: domains stay there, with one name."""
    if any(inode.flags & FLAG_IOMMU_DIR for inode in (above, *others)):
        raise FsError(errno.EPERM, "domains stay in iommu/, have one name, and are made there")


def check_unused(volume: Volume, ino: int, inode: Inode) -> None:
    """Raise FsError(EBUSY) when the inode is a domain and a device is attached to it."""
    if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES and is_attached(Records(volume, ROOT_PGTABLES_INO), ino):
        raise FsError(errno.EBUSY, f"inode {ino}: a device is attached to the domain: detach it first")


def check_open(inode: Inode, flags: int) -> None:
    """Raise FsError(EPERM) when page tables, or a file to be made in iommu/, are to be opened with ``flags`` so that a
    mapping can write to them."""
    if inode.flags & (TABLES | FLAG_IOMMU_DIR) and flags & os.O_ACCMODE == os.O_RDWR:
        raise FsError(errno.EPERM, "page tables can be read, or made with O_WRONLY, and are changed by the API only")


def check_size(ino: int, inode: Inode, size: int) -> None:
    """Raise FsError(EPERM) when a user may not give page tables this size."""
    first = inode.size == 0 and size == BLOCK and ino != ROOT_PGTABLES_INO
    if size != inode.size and not first:
        found = f"{size} bytes for {inode.size}"
        raise FsError(errno.EPERM, f"inode {ino}: page tables get {BLOCK} bytes and grow by themselves, found {found}")


def mark_bitmap(volume: Volume, ino: int, inode: Inode) -> None:
    """Mark, in the first block of page tables, which is new, the page of the bitmap itself as in use."""
    page, _ = FileMap(volume, ino, inode).find(0)
    volume.region.store(page * PAGE, (1).to_bytes(8, "little"))
