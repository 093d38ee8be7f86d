"""What `pkernfs iommu` shows, as replies of api.py: of a mount, and of a region that is not mounted.

Files are given by their inodes; ``names`` adds what they are called.
"""

from __future__ import annotations

import errno
import os

from pkernfs import api
from pkernfs.errors import CorruptError, FsError, quoted
from pkernfs.format import (
    ACCESS_NAMES,
    DEFERRED,
    PAGE,
    PERSISTENT,
    ROOT_PGTABLES_INO,
    Attachment,
    Ino,
    Requester,
    TablePage,
)
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.audit import Audit
from pkernfs.iommu.audit import audit as run_audit
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import BY_NAME, DEVICES, FORMATS, span
from pkernfs.iommu.invalidations import Invalidation, generation, pending
from pkernfs.iommu.records import Records


def device_facts(requester: Requester, attachment: Attachment, domain: str) -> api.Device:
    """A device that is attached."""
    return api.Device(
        device=pci.text(requester),
        domain=domain,
        id=attachment.id,
        persistent=bool(attachment.flags & PERSISTENT),
        state="deferred" if attachment.flags & DEFERRED else "attached",
    )


def attachments_of(fs: Filesystem) -> dict[Requester, Attachment]:
    """By requester."""
    return dict(Records(fs.volume, ROOT_PGTABLES_INO).attachments())


def _invalidation(one: Invalidation) -> api.Invalidation:
    if one.requester is not None:
        return api.Invalidation(kind="context", id=one.id, device=pci.text(one.requester), iova=None, length=None)
    return api.Invalidation(kind="iotlb", id=one.id, device=None, iova=one.iova, length=one.length or None)


def pending_facts(fs: Filesystem, number: int | None = None) -> list[api.Invalidation]:
    """The pending invalidations; of one domain id, or all."""
    return [_invalidation(one) for one in pending(Records(fs.volume, ROOT_PGTABLES_INO)) if number in (None, one.id)]


def kept_bytes(fs: Filesystem) -> int:
    """Bytes that nobody uses and that await an invalidation, as far as damage lets them be told."""
    try:
        return fs.guard.kept_bytes()
    except CorruptError as error:
        fs.volume.damage.note(error)
        return 0


def invalidations(fs: Filesystem, freed: int = 0, before: int = 0) -> api.Invalidations:
    """The pending invalidations, and the token that names the list.

    Of an acknowledgement: ``freed``: pages of tables; ``before``: bytes that awaited it.
    """
    kept = kept_bytes(fs)
    return api.Invalidations(
        invalidations=pending_facts(fs),
        token=generation(Records(fs.volume, ROOT_PGTABLES_INO)),
        freed=freed,
        awaiting=kept,
        released=max(before - kept, 0),
    )


def domain_facts(fs: Filesystem, ino: Ino, name: str) -> api.Domain:
    """One domain, with its mappings and devices."""
    domain = Domain(fs.volume, ino)
    record = domain.record
    mappings = list(domain.records.mappings())
    used = domain.pages.used_count() if domain.pages.inode.size else 0
    return api.Domain(
        name=name,
        ino=ino,
        format=domain.form.name,
        levels=record.levels,
        aperture=domain.aperture,
        reserved=[(one.start, one.stop - 1) for one in domain.form.reserved if one.start < domain.aperture],
        id=record.id,
        leaf=span(record.leaf),
        root=domain.pages.physical(domain.root) if domain.root else None,
        size=domain.pages.inode.size,
        tables=used - record.awaiting,
        awaiting=record.awaiting,
        mappings=[
            api.DomainMapping(
                iova=at * PAGE,
                length=mapping.length * PAGE,
                ino=mapping.ino,
                file=None,
                offset=mapping.start * PAGE,
                access=ACCESS_NAMES[mapping.access],
            )
            for at, mapping in mappings
        ],
        devices=[
            device_facts(requester, attachment, name)
            for requester, attachment in attachments_of(fs).items()
            if attachment.domain == ino
        ],
    )


def list_all(fs: Filesystem) -> api.Domains:
    """Everything."""
    contexts = Contexts(fs.volume)
    domains = []
    damaged = []
    for name, ino in sorted(named_domains(fs.volume)):
        try:
            domains.append(domain_facts(fs, ino, os.fsdecode(name)))
        except CorruptError as error:
            damaged.append(api.DamagedDomain(name=os.fsdecode(name), ino=ino, text=str(error)))
    return api.Domains(
        phys_base=fs.volume.sb.phys_base,
        roots=[_root_facts(contexts, *table) for table in contexts.tables()],
        domains=domains,
        damaged=damaged,
        invalidations=pending_facts(fs),
    )


def _root_facts(contexts: Contexts, number: int, segment: int, page: TablePage) -> api.RootTable:
    device = DEVICES[number]
    return api.RootTable(
        format=FORMATS[number].name,
        segment=segment,
        physical=contexts.pages.physical(page),
        register=device.register,
        entries=device.devices,
    )


def root(fs: Filesystem, form: str, segment: int) -> api.RootTable:
    """A root table that is there.  Raises FsError(ENOENT)."""
    contexts = Contexts(fs.volume)
    if form not in BY_NAME:
        raise FsError(errno.EINVAL, f"expected vtd or amd, found {quoted(form)}")
    number = BY_NAME[form].number
    page = contexts.table(number, segment)
    if not page:
        raise FsError(errno.ENOENT, f"no device of PCI segment {segment:#x} was attached to a domain of format {form}")
    return _root_facts(contexts, number, segment, page)


# -- the audit ------------------------------------------------------------------------------------------------------


def audited(audit: Audit) -> api.Audited:
    """What an audit that has run has found."""
    return api.Audited(
        devices=len(audit.attachments),
        domains=audit.domains,
        mappings=audit.mappings,
        tables=audit.tables,
        bytes=audit.bytes,
        problems=[api.Problem(*problem) for problem in audit.problems],
    )


def audit(fs: Filesystem) -> api.Audited:
    """An audit, all at once."""
    return audited(run_audit(fs))
