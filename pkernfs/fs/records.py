"""The records of the IOMMU: trees in the inodes of page tables, and the pins that mappings are for files."""

from __future__ import annotations

import errno
from collections.abc import Iterator

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

    def mappings(self, first: int = 0, last: int = LAST_MAPPING) -> Iterator[tuple[int, Mapping]]:
        """(IOVA page, mapping) of a domain that touch pages ``first`` to ``last``.  Raises CorruptError."""
        below = self.floor(first)
        for key, value in self.scan(below[0] if below else first, min(last, LAST_MAPPING)):
            if len(value) != MAPPING.size:
                raise self._bad_record(key, f"{len(value)} bytes, expected a mapping")
            mapping = MAPPING.unpack(value)
            if not 0 < mapping.length <= LAST_MAPPING + 1 - key or not 0 < mapping.access <= 3:
                raise self._bad_record(key, f"{mapping}")
            if key + mapping.length > first:
                yield key, mapping

    def attachments(self) -> Iterator[tuple[int, Attachment]]:
        """(requester, attachment) of root-pgtables.  Raises CorruptError."""
        for key, value in self.scan(ATTACHMENT_KEY, STALE_CONTEXT_KEY - 1):
            if len(value) != ATTACHMENT.size:
                raise self._bad_record(key, f"{len(value)} bytes, expected an attachment")
            yield key - ATTACHMENT_KEY, ATTACHMENT.unpack(value)

    def finish(self) -> Inode:
        """The inode with the changes, which is put into the transaction."""
        inode = self.volume.inode(self.owner)
        inode = inode._replace(iommu=self.root, pages=inode.pages + self.pages)
        self.pages = 0
        self.volume.put_inode(self.owner, inode)
        return inode


def pin(volume: Volume, ino: int, count: int) -> None:
    """Count ``count`` more (or less) mappings that name a file, within the open transaction."""
    inode = volume.inode(ino)
    if inode.iommu + count < 0:
        raise CorruptError(f"inode {ino}", ino * INODE_SIZE, "fewer pins than mappings", ino=ino)
    volume.put_inode(ino, inode._replace(iommu=inode.iommu + count))


def is_attached(volume: Volume, ino: int) -> bool:
    """Whether a device is attached to domain ``ino``."""
    return any(attachment.domain == ino for _, attachment in Records(volume, ROOT_PGTABLES_INO).attachments())
