"""What `pkernfs iommu` shows, as replies of api.py: of a mount, and of a region that is not mounted."""

from __future__ import annotations

import errno
import os
import stat

from pkernfs import api
from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    ACCESS_NAMES,
    DEFERRED,
    PAGE,
    PERSISTENT,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    Attachment,
    IovaPage,
    Requester,
    TablePage,
)
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.audit import Audit
from pkernfs.iommu.audit import audit as run_audit
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import called, named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import ADDRESS, BY_NAME, DEVICES, FORMATS, LEAF_NAMES, span
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


def invalidations(fs: Filesystem, freed: int = 0) -> api.Invalidations:
    """The pending invalidations, and the token that names the list.  ``freed``: pages, by an acknowledgement."""
    token = generation(Records(fs.volume, ROOT_PGTABLES_INO))
    return api.Invalidations(invalidations=pending_facts(fs), token=token, freed=freed)


def paths(fs: Filesystem, inos: set[int]) -> dict[int, str]:
    """A path from the root of the filesystem on for each of the inodes that has one."""
    found: dict[int, str] = {}
    todo = [(ROOT_INO, b"")] if inos else []
    seen = set()
    while todo and len(found) < len(inos):
        directory, path = todo.pop()
        if directory in seen:
            continue
        seen.add(directory)
        for entry in fs.names.directory(directory).scan(0):
            if entry.ino in inos:
                found.setdefault(entry.ino, os.fsdecode(path + entry.name))
            if stat.S_ISDIR(entry.mode):
                todo.append((entry.ino, path + entry.name + b"/"))
    return found


def domain_facts(fs: Filesystem, ino: int, name: str, names: dict[int, str] | None = None) -> api.Domain:
    """One domain, with its mappings and devices."""
    domain = Domain(fs.volume, ino)
    record = domain.record
    mappings = list(domain.records.mappings())
    if names is None:
        names = paths(fs, {mapping.ino for _, mapping in mappings})
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
                file=names.get(mapping.ino),
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
    found: dict[str, int] = {}
    damaged = []
    inos: set[int] = set()
    for name, ino in sorted(named_domains(fs.volume)):
        try:
            inos |= {mapping.ino for _, mapping in Domain(fs.volume, ino).records.mappings()}
            found[os.fsdecode(name)] = ino
        except CorruptError as error:
            damaged.append(api.DamagedDomain(name=os.fsdecode(name), ino=ino, text=str(error)))
    names = paths(fs, inos)
    return api.Domains(
        phys_base=fs.volume.sb.phys_base,
        roots=[_root_facts(contexts, *table) for table in contexts.tables()],
        domains=[domain_facts(fs, ino, name, names) for name, ino in found.items()],
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
        raise FsError(errno.EINVAL, f"expected vtd or amd, found {form!r}")
    number = BY_NAME[form].number
    page = contexts.table(number, segment)
    if not page:
        raise FsError(errno.ENOENT, f"no device of PCI segment {segment:#x} was attached to a domain of format {form}")
    return _root_facts(contexts, number, segment, page)


# -- walking --------------------------------------------------------------------------------------------------------


def walk(fs: Filesystem, requester: Requester | None, ino: int | None, iova: int) -> api.Walk:
    """What the tables make of an IOVA of a device (or of domain ``ino``), step by step, as hardware does it.

    Raises FsError(ENOENT) for a device that is not attached, CorruptError.
    """
    if requester is not None:
        attachment = Records(fs.volume, ROOT_PGTABLES_INO).attachment(requester)
        if attachment is None:
            raise FsError(errno.ENOENT, f"{pci.text(requester)} is not attached")
        ino = attachment.domain
    assert ino is not None
    domain = Domain(fs.volume, ino)
    result = api.Walk(
        device=None if requester is None else pci.text(requester),
        domain=called(fs.volume, ino),
        iova=iova,
        steps=[],
        physical=None,
        page_size=None,
        access="",
        fault=None,
        ino=None,
        file=None,
        offset=None,
    )
    if requester is not None:
        result.fault = _walk_device(fs, domain, requester, result.steps)
    if not 0 <= iova < domain.aperture:
        result.fault = result.fault or f"the IOVA is beyond the {domain.aperture.bit_length() - 1} bits of the tables"
    for reserved in domain.form.reserved:
        if iova in reserved:
            never = f"{reserved.start:#x} to {reserved.stop - 1:#x} never reaches the tables"
            result.fault = result.fault or never
    if result.fault is None:
        result.fault = _walk_tables(domain, iova, result)
    wanted = file_at(domain, iova) if 0 <= iova < domain.aperture else None
    if wanted:
        result.ino, result.offset = wanted
        result.file = paths(fs, {result.ino}).get(result.ino)
    return result


def file_at(domain: Domain, iova: int) -> tuple[int, int] | None:
    """(inode, offset) of what a domain's mappings say of an IOVA."""
    page, skip = divmod(iova, PAGE)
    for at, mapping in domain.records.mappings(IovaPage(page), IovaPage(page)):
        return mapping.ino, (mapping.start + page - at) * PAGE + skip
    return None


def _step(level: str | int, table: int, index: int, entry: int, means: str, *, size: int = 8) -> api.Step:
    return api.Step(level=level, table=table, index=index, address=table + index * size, entry=entry, means=means)


def _walk_device(fs: Filesystem, domain: Domain, requester: Requester, steps: list[api.Step]) -> str | None:
    """The steps to the domain's tables; why it ends there, or None."""
    contexts = Contexts(fs.volume)
    number = domain.record.tables
    device = DEVICES[number]
    bus = requester >> 8 & 0xFF
    top = contexts.table(number, requester >> 16)
    if not top:
        return f"PCI segment {requester >> 16:#x} has no table"
    table, index = contexts.pages.physical(top), requester & 0xFFFF
    if device.root:
        entry = contexts.root(top)[2 * bus]
        page = contexts.context_table(top, bus)
        means = f"context table of bus {bus:#04x}" if page else "not present"
        steps.append(_step("root", table, bus, entry, means, size=16))
        if not page:
            return f"bus {bus:#04x} has no context table"
        table, index = contexts.pages.physical(page), requester & 0xFF
    words = contexts.entry(number, requester)
    blocked = words == device.blocked
    means = "blocked" if blocked else f"domain id {domain.record.id}, {domain.record.levels} levels"
    level = "context" if device.root else "device"
    steps.append(_step(level, table, index, words[0], means, size=8 * device.words))
    if blocked:
        return f"{pci.text(requester)} is blocked"
    return None if words == domain.entry else "the entry does not point to the domain's tables: see pkernfs iommu audit"


def _walk_tables(domain: Domain, iova: int, result: api.Walk) -> str | None:
    form, pages = domain.form, domain.pages
    page = domain.root
    if not page:
        return "nothing was ever mapped"
    for level in range(domain.record.levels, 0, -1):
        index = iova // span(level) % 512
        entry = pages.read(page)[index]
        here = pages.physical(page)
        if not entry & form.present:
            result.steps.append(_step(level, here, index, entry, "not present"))
            return f"not present at level {level}"
        odd = form.odd_bits(entry, level)
        if odd:
            result.steps.append(_step(level, here, index, entry, f"bits {odd:#x} are wrong"))
            return f"reserved bits at level {level}"
        if form.is_leaf(entry, level):
            access = ACCESS_NAMES[form.access(entry)]
            result.physical = (entry & ADDRESS & -span(level)) + iova % span(level)
            result.page_size = span(level)
            result.access = access
            means = f"leaf of {LEAF_NAMES[level]} at {entry & ADDRESS & -span(level):#x}, {access}"
            result.steps.append(_step(level, here, index, entry, means))
            return None
        child = pages.page_at(entry & ADDRESS)
        result.steps.append(_step(level, here, index, entry, f"table of level {level - 1} at {entry & ADDRESS:#x}"))
        if child is None:
            return f"the table of level {level - 1} is not one of the domain's"
        page = child
    raise AssertionError("a table of level 1 has leaves only")


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
