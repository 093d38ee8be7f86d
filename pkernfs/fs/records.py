"""The records of the IOMMU: trees in the inodes of page tables, and the pins that mappings are for files."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    ATTACHMENT,
    ATTACHMENT_KEY,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    FLAG_IOMMU_ROOT_PGTABLES,
    INODE_SIZE,
    IOVA_PAGE_BITS,
    MAPPING,
    ROOT_PGTABLES_INO,
    STALE_CONTEXT_KEY,
    Attachment,
    Inode,
    Mapping,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.volume import Volume
from pkernfs.layout import Layout

R = TypeVar("R", bound=NamedTuple)

#: flags of inodes whose content are page tables
TABLES = FLAG_IOMMU_DOMAIN_PGTABLES | FLAG_IOMMU_ROOT_PGTABLES
LAST_MAPPING = (1 << IOVA_PAGE_BITS) - 1


class Records(Tree):
    """The records of inode ``ino``, which holds page tables.  Changes need an open transaction and end with ``finish``.

    Raises FsError(EINVAL) for other inodes.
    """

    def __init__(self, volume: Volume, ino: int) -> None:
        inode = volume.inode(ino)
        if not inode.flags & TABLES:
            raise FsError(errno.EINVAL, f"inode {ino} holds no page tables")
        super().__init__(volume, ino, inode.iommu)

    def _bad_record(self, key: int, found: str) -> CorruptError:
        return CorruptError(f"record {key:#x} of inode {self.owner}", self.owner * INODE_SIZE, found, ino=self.owner)

    def decode(self, layout: Layout[R], key: int, value: bytes) -> R:
        """A value as the record that it should be.  Raises CorruptError."""
        if len(value) != layout.size:
            name = layout.record.__name__
            raise self._bad_record(key, f"{len(value)} bytes, expected {layout.size}, of a record {name}")
        return layout.unpack(value)

    def record(self, layout: Layout[R], key: int) -> R | None:
        """The record of a key, if there is one.  Raises CorruptError."""
        value = self.get(key)
        return None if value is None else self.decode(layout, key, value)

    def mappings(self, first: int = 0, last: int = LAST_MAPPING) -> Iterator[tuple[int, Mapping]]:
        """(IOVA page, mapping) of a domain that touch pages ``first`` to ``last``.  Raises CorruptError."""
        below = self.floor(first)
        for key, value in self.scan(below[0] if below else first, min(last, LAST_MAPPING)):
            mapping = self.mapping(key, value)
            if key + mapping.length > first:
                yield key, mapping

    def mapping(self, key: int, value: bytes) -> Mapping:
        """The mapping that a record is.  Raises CorruptError."""
        mapping = self.decode(MAPPING, key, value)
        if not 0 < mapping.length <= LAST_MAPPING + 1 - key or not 0 < mapping.access <= 3:
            raise self._bad_record(key, f"{mapping}")
        return mapping

    def attachments(self) -> Iterator[tuple[int, Attachment]]:
        """(requester, attachment) of root-pgtables.  Raises CorruptError."""
        for key, value in self.scan(ATTACHMENT_KEY, STALE_CONTEXT_KEY - 1):
            yield key - ATTACHMENT_KEY, self.decode(ATTACHMENT, key, value)

    def finish(self) -> Inode:
        """The inode with the changes, which is put into the transaction."""
        inode = self.volume.inode(self.owner)
        inode = inode._replace(iommu=self.root, pages=inode.pages + self.pages)
        self.pages = 0
        self.volume.put_inode(self.owner, inode)
        return inode


def pin(volume: Volume, ino: int, count: int) -> None:
    """Count ``count`` more (or less) mappings that name a file, within the open transaction.  Raises CorruptError."""
    inode = volume.inode(ino)
    if inode.flags & TABLES or inode.iommu + count < 0:
        found = "page tables that are mapped" if inode.flags & TABLES else "fewer pins than mappings"
        raise CorruptError(f"inode {ino}", ino * INODE_SIZE, found, ino=ino)
    volume.put_inode(ino, inode._replace(iommu=inode.iommu + count))


def is_pinned(inode: Inode) -> bool:
    """Whether mappings of domains name the file."""
    return inode.iommu > 0 and not inode.flags & TABLES


def has_records(inode: Inode) -> bool:
    """Whether the inode holds page tables, and there is anything that they are to say."""
    return inode.iommu > 0 and bool(inode.flags & TABLES)


def drop_records(volume: Volume, ino: int, most: int) -> list[int]:
    """Drop the first ``most`` records of a domain, and the pins of its mappings, within the open transaction.

    The files that have no pins any more.  Raises CorruptError.
    """
    records = Records(volume, ino)
    unpinned = []
    for key, value in list(islice(records.scan(), most)):
        records.delete(key)
        if key <= LAST_MAPPING:
            file = records.mapping(key, value).ino
            volume.inode_named_by(ino, file)
            pin(volume, file, -1)
            if not volume.inode(file).iommu:
                unpinned.append(file)
    records.finish()
    return unpinned


def is_attached(volume: Volume, ino: int) -> bool:
    """Whether a device is attached to domain ``ino``."""
    return any(attachment.domain == ino for _, attachment in Records(volume, ROOT_PGTABLES_INO).attachments())
