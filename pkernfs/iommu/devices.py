"""Devices: attaching them to domains, and detaching them.

Raises FsError with the errno that VFIO gives: EBUSY, ENOENT, ENOSPC, EINVAL.
"""

from __future__ import annotations

import errno

from pkernfs.errors import FsError, quoted
from pkernfs.format import (
    ATTACHMENT,
    ATTACHMENT_KEY,
    DEFERRED,
    PERSISTENT,
    ROOT_PGTABLES_INO,
    Attachment,
    DomainId,
    Ino,
    Requester,
)
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import called
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import BY_NAME, DEVICES, FORMATS
from pkernfs.iommu.invalidations import Invalidation, add
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import commit, replayed


def attach(fs: Filesystem, ino: Ino, requester: Requester, *, persistent: bool = False, key: int = 0) -> None:
    """Attach a device to a domain; or claim it, when it is deferred since the last mount, or declare it persistent."""
    volume = fs.volume
    Domain(volume, ino).check_named()
    if replayed(fs, key) is not None:
        return
    before = Records(volume, ROOT_PGTABLES_INO).attachment(requester)
    declared = before and persistent and not before.flags & PERSISTENT
    if before and (before.domain != ino or not (before.flags & DEFERRED or declared)):
        text = f"{pci.text(requester)} is attached to {called(volume, before.domain)}: detach it first"
        raise FsError(errno.EBUSY, text)

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        domain = Domain(volume, ino)
        domain.prepare(tx, roots)
        number = domain.record.tables
        contexts = Contexts(volume, roots)
        if contexts.entry(number, requester) != domain.entry:
            contexts.store(tx, number, requester, domain.entry)
            if before or not DEVICES[number].root:
                # It had another entry, or one that lets nothing pass, which hardware may have cached.
                add(tx, roots, Invalidation(domain.id, requester=requester))
            contexts.finish(tx)
        flags = PERSISTENT if persistent or (before and before.flags & PERSISTENT) else 0
        roots.put(tx, ATTACHMENT_KEY + requester, ATTACHMENT.pack(Attachment(ino, domain.id, flags)))
        domain.save(tx)
        return 0

    commit(fs, key, change)


def detach(fs: Filesystem, requester: Requester, key: int = 0) -> None:
    """Let nothing of a device pass any more."""
    volume = fs.volume
    if replayed(fs, key) is not None:
        return
    attachment = Records(volume, ROOT_PGTABLES_INO).attachment(requester)
    if attachment is None:
        raise FsError(errno.ENOENT, f"{pci.text(requester)} is not attached")

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        contexts = Contexts(volume, roots)
        detach_within(tx, contexts, requester, DomainId(attachment.id))
        contexts.finish(tx)
        return 0

    commit(fs, key, change)


def detach_within(tx: Transaction, contexts: Contexts, requester: Requester, domain_id: DomainId) -> None:
    """Detach a device from the domain with an id, within a transaction."""
    for number in FORMATS:
        if contexts.entry(number, requester) != DEVICES[number].blocked:
            contexts.block(tx, number, requester)
    drop_attachment(tx, contexts.records, requester, domain_id)


def drop_attachment(tx: Transaction, roots: Records, requester: Requester, domain_id: DomainId) -> None:
    """Drop the attachment of a device, which is blocked, to a domain id; hardware may have cached something of both."""
    roots.delete(tx, ATTACHMENT_KEY + requester)
    add(tx, roots, Invalidation(domain_id, requester=requester))
    add(tx, roots, Invalidation(domain_id))


def root_table(fs: Filesystem, form: str, segment: int, key: int = 0) -> int:
    """The physical address of a segment's root table (device table), which is made if there is none."""
    if form not in BY_NAME or not 0 <= segment <= 0xFFFF:
        raise FsError(errno.EINVAL, f"expected vtd or amd and a PCI segment, found {quoted(form)} and {segment:#x}")
    number = BY_NAME[form].number
    contexts = Contexts(fs.volume)
    page = contexts.table(number, segment)
    if page:
        return contexts.pages.physical(page)

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        contexts = Contexts(fs.volume, roots)
        physical = contexts.pages.physical(contexts.make_table(tx, number, segment))
        contexts.finish(tx)
        return physical

    return commit(fs, key, change)
