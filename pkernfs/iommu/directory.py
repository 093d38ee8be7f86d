"""The directory iommu/: which domains there are, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pkernfs.format import FLAG_IOMMU_DOMAIN_PGTABLES, IOMMU_INO, Ino
from pkernfs.fs.directory import Directory
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.volume import Volume


def named_domains(volume: Volume) -> Iterator[tuple[bytes, Ino]]:
    """(name, inode) of the domains in iommu/.  Raises CorruptError."""
    directory = Directory(volume, IOMMU_INO, volume.inode(IOMMU_INO))
    for entry in list(directory.scan()):
        if directory.target(entry).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            yield entry.name, entry.ino


def domains(volume: Volume) -> Iterator[tuple[str | None, Ino]]:
    """(name, inode) of all domains; without a name those that are about to be freed.  Raises CorruptError."""
    for name, ino in named_domains(volume):
        yield os.fsdecode(name), ino
    for ino in Orphans(volume).inos():
        if volume.inode(ino).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            yield None, ino


def name_of(volume: Volume, ino: Ino) -> bytes | None:
    """The name of a domain; None: it has none (any more).  Reads no more of the directory than up to it."""
    directory = Directory(volume, IOMMU_INO, volume.inode(IOMMU_INO))
    return next((entry.name for entry in directory.scan() if entry.ino == ino), None)


def called(volume: Volume, ino: Ino) -> str:
    """What a domain is called in messages."""
    name = name_of(volume, ino)
    return f"inode {ino}" if name is None else os.fsdecode(name)
