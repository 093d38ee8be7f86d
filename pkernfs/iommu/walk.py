"""A walk of the tables for one IOVA, as a reply of api.py."""

from __future__ import annotations

import errno

from pkernfs import api
from pkernfs.errors import FsError
from pkernfs.format import ACCESS_NAMES, PAGE, ROOT_PGTABLES_INO, Ino, Iova, IovaPage, PhysAddr, Requester
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import called
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import ADDRESS, DEVICES, LEAF_NAMES, span
from pkernfs.iommu.records import Records


def walk_device(fs: Filesystem, requester: Requester, iova: int) -> api.Walk:
    """What the tables make of an IOVA of a device, as ``walk``.  Raises FsError(ENOENT): it is not attached."""
    attachment = Records(fs.volume, ROOT_PGTABLES_INO).attachment(requester)
    if attachment is None:
        raise FsError(errno.ENOENT, f"{pci.text(requester)} is not attached")
    return walk(fs, attachment.domain, iova, requester)


def walk(fs: Filesystem, ino: Ino, iova: int, requester: Requester | None = None) -> api.Walk:
    """What the tables make of an IOVA of domain ``ino``, step by step, as hardware does it for a device of it.

    ``iova`` is any number that somebody asks for: beyond what tables can hold it has a fault.  What the file there is
    called is not looked up: see ``names``.  Raises CorruptError.
    """
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
        result.fault = _walk_contexts(fs, domain, requester, result.steps)
    if not 0 <= iova < domain.aperture:
        result.fault = result.fault or f"the IOVA is beyond the {domain.aperture.bit_length() - 1} bits of the tables"
    for reserved in domain.form.reserved:
        if iova in reserved:
            never = f"{reserved.start:#x} to {reserved.stop - 1:#x} never reaches the tables"
            result.fault = result.fault or never
    if result.fault is None:
        result.fault = _walk_tables(domain, Iova(iova), result)
    wanted = file_at(domain, Iova(iova)) if 0 <= iova < domain.aperture else None
    if wanted:
        result.ino, result.offset = wanted
    return result


def file_at(domain: Domain, iova: Iova) -> tuple[Ino, int] | None:
    """(inode, offset) of what a domain's mappings say of an IOVA."""
    page, skip = divmod(iova, PAGE)
    for at, mapping in domain.records.mappings(IovaPage(page), IovaPage(page)):
        return mapping.ino, (mapping.start + page - at) * PAGE + skip
    return None


def _step(level: str | int, table: PhysAddr, index: int, entry: int, means: str, *, size: int = 8) -> api.Step:
    return api.Step(level=level, table=table, index=index, address=table + index * size, entry=entry, means=means)


def _walk_contexts(fs: Filesystem, domain: Domain, requester: Requester, steps: list[api.Step]) -> str | None:
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


def _walk_tables(domain: Domain, iova: Iova, result: api.Walk) -> str | None:
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
        child = pages.target(entry)
        result.steps.append(_step(level, here, index, entry, f"table of level {level - 1} at {entry & ADDRESS:#x}"))
        if child is None:
            return f"the table of level {level - 1} is not one of the domain's"
        page = child
    raise AssertionError("a table of level 1 has leaves only")
