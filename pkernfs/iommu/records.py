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
    GUARDED,
    IOVA_PAGE_BITS,
    LAST_DOMAIN_ID,
    MAPPING,
    MAX_FILE_SIZE,
    PAGE,
    PENDING_CONTEXT_KEY,
    Attachment,
    Ino,
    Inode,
    IovaPage,
    Mapping,
    PageNo,
    Requester,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.layout import Layout

R = TypeVar("R", bound=NamedTuple)

FIRST_MAPPING = IovaPage(0)
LAST_MAPPING = IovaPage((1 << IOVA_PAGE_BITS) - 1)


class Records(Tree):
    """The records of inode ``ino``, which holds page tables.  Changes end with ``finish``.

    Raises FsError(EINVAL) for other inodes.
    """

    def __init__(self, volume: Volume, ino: Ino) -> None:
        inode = volume.inode(ino)
        if not inode.flags & GUARDED:
            raise FsError(errno.EINVAL, f"inode {ino} holds no page tables")
        super().__init__(volume, ino, PageNo(inode.iommu))

    def bad_record(self, key: int, found: str) -> CorruptError:
        """A record is not what it should be."""
        return corrupt_inode(self.owner, found, f"record {key:#x} of inode {self.owner}")

    def decode(self, layout: Layout[R], key: int, value: bytes) -> R:
        """A value as the record that it should be.  Raises CorruptError."""
        if len(value) != layout.size:
            name = layout.record.__name__
            raise self.bad_record(key, f"{len(value)} bytes, expected {layout.size}, of a record {name}")
        return layout.unpack(value)

    def record(self, layout: Layout[R], key: int) -> R | None:
        """The record of a key, if there is one.  Raises CorruptError."""
        value = self.get(key)
        return None if value is None else self.decode(layout, key, value)

    def mappings(
        self, first: IovaPage = FIRST_MAPPING, last: IovaPage = LAST_MAPPING
    ) -> Iterator[tuple[IovaPage, Mapping]]:
        """(IOVA page, mapping) of a domain that touch pages ``first`` to ``last``.  Raises CorruptError."""
        below = self.floor(first)
        for key, value in self.scan(below[0] if below else first, min(last, LAST_MAPPING)):
            mapping = self.mapping(key, value)
            if key + mapping.length > first:
                yield IovaPage(key), mapping

    def mapping(self, key: int, value: bytes) -> Mapping:
        """The mapping that a record is.  Raises CorruptError."""
        mapping = self.decode(MAPPING, key, value)
        start, length = mapping.start, mapping.length
        if start + length > MAX_FILE_SIZE // PAGE:
            raise self.bad_record(key, f"a mapping to pages {start} to {start + length - 1}, which no file can have")
        if not 0 < length <= LAST_MAPPING + 1 - key:
            raise self.bad_record(key, f"a mapping of {length} pages, expected 1 to {LAST_MAPPING + 1 - key}")
        if not 0 < mapping.access <= 3:
            raise self.bad_record(key, f"a mapping with access {mapping.access}, expected 1 to 3")
        return mapping

    def attachments(self) -> Iterator[tuple[Requester, Attachment]]:
        """(requester, attachment) of root-pgtables.  Raises CorruptError."""
        for key, value in self.scan(ATTACHMENT_KEY, PENDING_CONTEXT_KEY - 1):
            yield Requester(key - ATTACHMENT_KEY), self._attachment(key, value)

    def attachment(self, requester: Requester) -> Attachment | None:
        """What a device is attached to, as root-pgtables has it.  Raises CorruptError."""
        key = ATTACHMENT_KEY + requester
        value = self.get(key)
        return None if value is None else self._attachment(key, value)

    def _attachment(self, key: int, value: bytes) -> Attachment:
        attachment = self.decode(ATTACHMENT, key, value)
        if not 0 < attachment.id <= LAST_DOMAIN_ID:
            raise self.bad_record(key, f"domain id {attachment.id}, expected 1 to {LAST_DOMAIN_ID}")
        return attachment

    def finish(self, tx: Transaction) -> Inode:
        """The inode with the changes, which is put into the transaction."""
        inode = self.volume.inode(self.owner)
        inode = inode._replace(iommu=self.root, pages=inode.pages + self.pages)
        self.pages = 0
        tx.put_inode(self.owner, inode)
        return inode


def has_mappings(volume: Volume, ino: Ino) -> bool:
    """Whether the records of a domain, or of root-pgtables, begin with a mapping."""
    return any(True for _ in Records(volume, ino).scan(FIRST_MAPPING, LAST_MAPPING))


def drop_mappings(tx: Transaction, volume: Volume, ino: Ino, most: int) -> list[Mapping]:
    """Drop the first ``most`` mappings of a domain, and their pins; which those were.  Raises CorruptError."""
    records = Records(volume, ino)
    dropped = []
    for key, value in list(islice(records.scan(FIRST_MAPPING, LAST_MAPPING), most)):
        records.delete(tx, key)
        mapping = records.mapping(key, value)
        volume.inode_named_by(ino, mapping.ino)
        tx.pin(mapping.ino, -1)
        dropped.append(mapping)
    records.finish(tx)
    return dropped


def drop_records(tx: Transaction, volume: Volume, ino: Ino) -> None:
    """Drop the few records of a domain beside its mappings, which are gone."""
    records = Records(volume, ino)
    for key, _ in list(records.scan()):
        records.delete(tx, key)
    records.finish(tx)


def is_attached(roots: Records, ino: Ino) -> bool:
    """Whether a device is attached to domain ``ino``.  ``roots``: the records of root-pgtables."""
    return any(attachment.domain == ino for _, attachment in roots.attachments())
