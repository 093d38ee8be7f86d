"""What `pkernfs iommu` shows, as JSON: lists, walks, audits; of a mount and of a region that is not mounted."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import ACCESS_NAMES, DEFERRED, PAGE, PERSISTENT, ROOT_INO, ROOT_PGTABLES_INO, Attachment
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.audit import audit
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import called, named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import ADDRESS, BY_NAME, DEVICES, FORMATS, LEAF_NAMES, span
from pkernfs.iommu.invalidations import generation, pending
from pkernfs.iommu.records import Records

__all__ = ["attachments_of", "audit", "domain_facts", "list_all", "pending_facts", "root", "walk"]


def device_facts(requester: int, attachment: Attachment, domain: str) -> dict[str, Any]:
    """A device that is attached."""
    return {
        "device": pci.text(requester),
        "domain": domain,
        "id": attachment.id,
        "persistent": bool(attachment.flags & PERSISTENT),
        "state": "deferred" if attachment.flags & DEFERRED else "attached",
    }


def attachments_of(fs: Filesystem) -> dict[int, Attachment]:
    """By requester."""
    return dict(Records(fs.volume, ROOT_PGTABLES_INO).attachments())


def pending_facts(fs: Filesystem, number: int | None = None) -> list[dict[str, Any]]:
    """The pending invalidations; of one domain id, or all."""
    return [one.facts() for one in pending(Records(fs.volume, ROOT_PGTABLES_INO)) if number in (None, one.id)]


def invalidations(fs: Filesystem) -> dict[str, Any]:
    """The pending invalidations, and the token that names the list."""
    token = generation(Records(fs.volume, ROOT_PGTABLES_INO))
    return {"stale": pending_facts(fs), "token": token, "freed": 0}


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


def domain_facts(fs: Filesystem, ino: int, name: str, names: dict[int, str] | None = None) -> dict[str, Any]:
    """One domain, with its mappings and devices."""
    domain = Domain(fs.volume, ino)
    record = domain.record
    mappings = list(domain.records.mappings())
    if names is None:
        names = paths(fs, {mapping.ino for _, mapping in mappings})
    used = domain.pages.used_count() if domain.pages.inode.size else 0
    return {
        "name": name,
        "ino": ino,
        "format": domain.form.name,
        "levels": record.levels,
        "aperture": domain.aperture,
        "reserved": [(one.start, one.stop - 1) for one in domain.form.reserved if one.start < domain.aperture],
        "id": record.id,
        "leaf": span(record.leaf),
        "root": domain.pages.physical(record.root) if record.root else None,
        "size": domain.pages.inode.size,
        "tables": used - record.awaiting,
        "stale": record.awaiting,
        "mappings": [
            {
                "iova": at * PAGE,
                "length": mapping.length * PAGE,
                "ino": mapping.ino,
                "file": names.get(mapping.ino),
                "offset": mapping.start * PAGE,
                "access": ACCESS_NAMES[mapping.access],
            }
            for at, mapping in mappings
        ],
        "devices": [
            device_facts(requester, attachment, name)
            for requester, attachment in attachments_of(fs).items()
            if attachment.domain == ino
        ],
    }


def list_all(fs: Filesystem) -> dict[str, Any]:
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
            damaged.append({"name": os.fsdecode(name), "ino": ino, "text": str(error)})
    names = paths(fs, inos)
    return {
        "phys_base": fs.volume.sb.phys_base,
        "roots": [_root_facts(contexts, *table) for table in contexts.tables()],
        "domains": [domain_facts(fs, ino, name, names) for name, ino in found.items()],
        "damaged": damaged,
        "stale": pending_facts(fs),
    }


def _root_facts(contexts: Contexts, number: int, segment: int, page: int) -> dict[str, Any]:
    device = DEVICES[number]
    return {
        "format": FORMATS[number].name,
        "segment": segment,
        "physical": contexts.pages.physical(page),
        "register": device.register,
        "entries": device.devices,
    }


def root(fs: Filesystem, form: str, segment: int) -> dict[str, Any]:
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


def walk(fs: Filesystem, requester: int | None, ino: int | None, iova: int) -> dict[str, Any]:
    """What the tables make of an IOVA of a device (or of domain ``ino``), step by step, as hardware does it.

    Raises FsError(ENOENT) for a device that is not attached, CorruptError.
    """
    steps: list[dict[str, Any]] = []
    fault = None
    if requester is not None:
        attachment = Records(fs.volume, ROOT_PGTABLES_INO).attachment(requester)
        if attachment is None:
            raise FsError(errno.ENOENT, f"{pci.text(requester)} is not attached")
        ino = attachment.domain
    assert ino is not None
    domain = Domain(fs.volume, ino)
    if requester is not None:
        fault = _walk_device(fs, domain, requester, steps)
    if not 0 <= iova < domain.aperture:
        fault = fault or f"the IOVA is beyond the {domain.aperture.bit_length() - 1} bits of the tables"
    result = {"physical": None, "page_size": None, "access": ""}
    for reserved in domain.form.reserved:
        if iova in reserved:
            fault = fault or f"{reserved.start:#x} to {reserved.stop - 1:#x} never reaches the tables"
    if fault is None:
        fault = _walk_tables(domain, iova, steps, result)
    wanted = file_at(domain, iova) if 0 <= iova < domain.aperture else None
    return {
        "device": None if requester is None else pci.text(requester),
        "domain": called(fs.volume, ino),
        "iova": iova,
        "steps": steps,
        **result,
        "fault": fault,
        "ino": wanted[0] if wanted else None,
        "file": paths(fs, {wanted[0]}).get(wanted[0]) if wanted else None,
        "offset": wanted[1] if wanted else None,
    }


def file_at(domain: Domain, iova: int) -> tuple[int, int] | None:
    """(inode, offset) of what a domain's mappings say of an IOVA."""
    page, skip = divmod(iova, PAGE)
    for at, mapping in domain.records.mappings(page, page):
        return mapping.ino, (mapping.start + page - at) * PAGE + skip
    return None


def _step(level: str | int, table: int, index: int, entry: int, means: str, *, size: int = 8) -> dict[str, Any]:
    address = table + index * size
    return {"level": level, "table": table, "index": index, "address": address, "entry": entry, "means": means}


def _walk_device(fs: Filesystem, domain: Domain, requester: int, steps: list[dict[str, Any]]) -> str | None:
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


def _walk_tables(domain: Domain, iova: int, steps: list[dict[str, Any]], result: dict[str, Any]) -> str | None:
    form, pages = domain.form, domain.pages
    page = domain.record.root
    if not page:
        return "nothing was ever mapped"
    for level in range(domain.record.levels, 0, -1):
        index = iova // span(level) % 512
        entry = pages.read(page)[index]
        here = pages.physical(page)
        if not entry & form.present:
            steps.append(_step(level, here, index, entry, "not present"))
            return f"not present at level {level}"
        odd = form.odd_bits(entry, level)
        if odd:
            steps.append(_step(level, here, index, entry, f"bits {odd:#x} are wrong"))
            return f"reserved bits at level {level}"
        if form.is_leaf(entry, level):
            access = ACCESS_NAMES[form.access(entry)]
            result["physical"] = (entry & ADDRESS & -span(level)) + iova % span(level)
            result["page_size"] = span(level)
            result["access"] = access
            means = f"leaf of {LEAF_NAMES[level]} at {entry & ADDRESS & -span(level):#x}, {access}"
            steps.append(_step(level, here, index, entry, means))
            return None
        page = pages.page_at(entry & ADDRESS)
        steps.append(_step(level, here, index, entry, f"table of level {level - 1} at {entry & ADDRESS:#x}"))
        if page < 0:
            return f"the table of level {level - 1} is not one of the domain's"
    raise AssertionError("a table of level 1 has leaves only")
