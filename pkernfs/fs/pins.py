"""Which mappings of which domains name a file: what its pins are for."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import FsError
from pkernfs.format import FLAG_IOMMU_DOMAIN_PGTABLES, IOMMU_INO, PAGE, Inode, Mapping
from pkernfs.fs.directory import Directory
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.records import TABLES, Records
from pkernfs.fs.volume import Volume


class Pin(NamedTuple):
    """One mapping of a file."""

    domain: int  #: inode
    name: str | None  #: of the domain, in iommu/; None: it is about to be freed
    iova: int  #: bytes
    mapping: Mapping


def named_domains(volume: Volume) -> Iterator[tuple[bytes, int]]:
    """(name, inode) of the domains in iommu/.  Raises CorruptError."""
    directory = Directory(volume, IOMMU_INO, volume.inode(IOMMU_INO))
    for entry in list(directory.scan()):
        if directory.target(entry).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            yield entry.name, entry.ino


def domains(fs: Orphans) -> Iterator[tuple[str | None, int]]:
    """(name, inode) of all domains; without a name those that are about to be freed.  Raises CorruptError."""
    for name, ino in named_domains(fs.volume):
        yield os.fsdecode(name), ino
    for ino in fs.orphans():
        if fs.volume.inode(ino).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            yield None, ino


def mappings_of(fs: Orphans, ino: int) -> Iterator[Pin]:
    """The mappings that name file ``ino``, by domain and IOVA.  Raises CorruptError."""
    inode = fs.volume.inode(ino)
    left = 0 if inode.flags & TABLES else inode.iommu
    if not left:
        return
    for name, domain in domains(fs):
        for page, mapping in Records(fs.volume, domain).mappings():
            if mapping.ino == ino:
                yield Pin(domain, name, page * PAGE, mapping)
                left -= 1
                if not left:
                    return


def check_cut(fs: Orphans, ino: int, inode: Inode, end: int) -> None:
    """Raise FsError(EBUSY) when a mapping names a page of the file from page ``end`` on."""
    if inode.flags & TABLES or not inode.iommu:
        return
    for pin in mappings_of(fs, ino):
        if pin.mapping.start + pin.mapping.length > end:
            domain = f"domain {pin.name!r}" if pin.name else f"the domain of inode {pin.domain}"
            raise FsError(errno.EBUSY, f"inode {ino}: its memory is mapped by {domain} at IOVA {pin.iova:#x}")
