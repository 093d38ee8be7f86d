"""Page tables: the records of what they say, the pins that these are for files, and the memory of the tables."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from pkernfs.errors import CorruptError
from pkernfs.format import (
    ATTACHMENT,
    ATTACHMENT_KEY,
    AWAITING,
    AWAITING_KEY,
    BITMAP_PAGES,
    BLOCK_DATA,
    DOMAIN,
    DOMAIN_ID_BITS,
    DOMAIN_KEY,
    FIRST_FREE_SLOT,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    GENERATION,
    GENERATION_KEY,
    GUARDED,
    IOVA_PAGE_BITS,
    MAPPING,
    MAX_FILE_SIZE,
    PAGE,
    PAGES_PER_BLOCK,
    PENDING,
    PENDING_CONTEXT_KEY,
    PENDING_IOTLB_KEY,
    READ,
    REQUEST,
    REQUEST_KEY,
    REQUEST_SLOTS,
    RO_COMPAT_AWAITING,
    ROOT_PGTABLES_INO,
    ROOT_TABLE,
    ROOT_TABLE_KEY,
    TABLES_AMD,
    TABLES_VTD,
    WRITE,
    Attachment,
    AwaitingContent,
    DomainRecord,
    FilePage,
    Ino,
    Inode,
    IovaPage,
    Mapping,
    PageNo,
    PendingInvalidation,
)
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.runs import joined_runs
from pkernfs.fsck.check.rules import holds_tables
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.check.trees import is_record, items
from pkernfs.fsck.findings import BadRecord, FeatureOff, Fields, FreeBitmap, NewId, NotPending
from pkernfs.fsck.problems import Code
from pkernfs.layout import Layout

IDS = range(1, 0xFFFF)
IOVA_PAGES = 1 << IOVA_PAGE_BITS
Sound = Callable[[int, Any, int], bool]  #: key, record, pages of the tables


class Kind(NamedTuple):
    """A kind of records."""

    keys: range
    layout: Layout[Any]
    sound: Sound  #: whether the fields can be


def _mapping(key: int, mapping: Mapping, _: int) -> bool:
    fits = 0 < mapping.length <= IOVA_PAGES - key and mapping.start + mapping.length <= MAX_FILE_SIZE // PAGE
    return fits and 0 < mapping.access <= READ | WRITE and not mapping.reserved


def _domain(_: int, domain: DomainRecord, pages: int) -> bool:
    form = domain.tables in (TABLES_VTD, TABLES_AMD) and 3 <= domain.levels <= 5 and 1 <= domain.leaf <= 3
    return form and not domain.reserved and domain.id in IDS and max(domain.root, domain.awaiting) <= pages


def _awaiting(key: int, content: AwaitingContent, _: int) -> bool:
    domain_id = key & (1 << DOMAIN_ID_BITS) - 1
    return domain_id in IDS and 0 < content.length <= MAX_FILE_SIZE // PAGE - content.start


OF_DOMAIN = (
    Kind(range(IOVA_PAGES), MAPPING, _mapping),
    Kind(range(DOMAIN_KEY, DOMAIN_KEY + 1), DOMAIN, _domain),
)
OF_ROOT = (
    Kind(range(ROOT_TABLE_KEY, ROOT_TABLE_KEY + (2 << 16)), ROOT_TABLE, lambda _, record, pages: record.page < pages),
    Kind(range(ATTACHMENT_KEY, ATTACHMENT_KEY + (1 << 32)), ATTACHMENT, lambda _, record, __: record.id in IDS),
    Kind(
        range(PENDING_CONTEXT_KEY, PENDING_CONTEXT_KEY + (1 << 32)), PENDING, lambda _, record, __: record.length == 0
    ),
    Kind(
        range(PENDING_IOTLB_KEY, PENDING_IOTLB_KEY + (1 << 16 + IOVA_PAGE_BITS)),
        PENDING,
        lambda key, record, _: record.id == key - PENDING_IOTLB_KEY >> IOVA_PAGE_BITS and record.length <= IOVA_PAGES,
    ),
    Kind(range(AWAITING_KEY, AWAITING_KEY + (1 << 60)), AWAITING, _awaiting),
    Kind(range(GENERATION_KEY, GENERATION_KEY + 1), GENERATION, lambda *_: True),
    Kind(range(REQUEST_KEY, REQUEST_KEY + REQUEST_SLOTS), REQUEST, lambda *_: True),
)


def record(ino: Ino, key: int, value: bytes, pages: int) -> Any:
    """The record of inode ``ino``, whose tables have ``pages`` pages; None when it cannot be one."""
    for kind in OF_ROOT if ino == ROOT_PGTABLES_INO else OF_DOMAIN:
        if key in kind.keys and len(value) == kind.layout.size:
            found = kind.layout.unpack(value)
            return found if kind.sound(key, found, pages) else None
    return None


def whole_pages(check: Check, ino: Ino, inode: Inode) -> int:
    """How many pages from the start of a file on are in whole blocks.  Raises CorruptError."""
    pages = 0
    for extent in FileMap(check.volume, ino, inode).extents():
        first, count = divmod(extent.page, PAGES_PER_BLOCK)[0], extent.length // PAGES_PER_BLOCK
        kinds = check.memory.table[first : first + count]
        if extent.start != pages or extent.length % PAGES_PER_BLOCK or kinds != bytes([BLOCK_DATA]) * count:
            break
        pages += extent.length
    return pages


def tables(check: Check, ino: Ino, inode: Inode) -> None:
    """Page tables are whole blocks, to their end, and the pages of their bitmaps are in use."""
    if not holds_tables(inode) or not check.findings.tally.sound or ino in check.reached.wrong_flags:
        return
    try:
        pages = whole_pages(check, ino, inode)
    except CorruptError:
        return
    if inode.size != pages * PAGE:
        found = f"page tables {ino}: expected the size of their {pages // PAGES_PER_BLOCK} blocks"
        text = f"{found}, found {inode.size} bytes"
        check.note(Code.IOMMU_SIZE, text, data=Fields(ino, {"size": pages * PAGE}))
        return
    filemap = FileMap(check.volume, ino, inode)
    for at in range(0, pages, BITMAP_PAGES):
        page, _ = filemap.find(FilePage(at))
        if not check.region.read(page * PAGE, 1)[0] & 1:
            text = f"page {at} of page tables {ino}: expected it in use, found it free"
            check.note(Code.IOMMU_BITMAP, text, offset=page * PAGE, data=FreeBitmap(ino, PageNo(page)))


def records(check: Check, ino: Ino, inode: Inode) -> None:
    """Each has a key and a form that are known, and mappings do not overlap; what files they pin is compared later."""
    named = check.records
    if not holds_tables(inode):
        if inode.iommu and stat.S_ISREG(inode.mode):
            named.pinned[ino] = inode.iommu
        return
    if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES:
        named.domains.add(ino)
    if not inode.iommu:
        return
    try:
        pages = whole_pages(check, ino, inode)
    except CorruptError:
        pages = check.volume.total_pages
    structure = check.structure("iommu", is_record)
    end = 0
    for key, value in items(check, structure, PageNo(inode.iommu)):
        found = record(ino, key, value, pages)
        if found is None:
            text = f"record {key:#x} of inode {ino}: expected another form, found {value[:32].hex()}"
            check.note(Code.IOMMU_RECORD, f"{text}, {len(value)} bytes")
        elif isinstance(found, Mapping) and key < end:
            text = f"domain {ino}: expected a mapping from IOVA {end * PAGE:#x} on, found one at {key * PAGE:#x}"
            check.note(Code.IOMMU_OVERLAP, text)
            found = None
        if found is None:
            structure.dropped.append(f"record {key:#x}")
            continue
        if isinstance(found, Mapping):
            end = key + found.length
            named.mappings.setdefault(Ino(found.ino), []).append((ino, IovaPage(key), found))
        elif isinstance(found, DomainRecord):
            named.ids.setdefault(found.id, []).append(ino)
        elif isinstance(found, Attachment):
            named.attachments.append((key, found))
        elif isinstance(found, AwaitingContent):
            file, domain_id = divmod(key - AWAITING_KEY, 1 << DOMAIN_ID_BITS)
            named.awaiting.append((key, Ino(file), domain_id))
        elif isinstance(found, PendingInvalidation):
            named.pending.add(found.id)
        structure.keep(key, value)
    check.close(structure)


def mappings(check: Check) -> None:
    """A mapping names memory of a file, within its size; a file counts the mappings, and what awaits, that name it."""
    if check.findings.incomplete:
        return
    counts: Counter[Ino] = Counter()
    for file, found in check.records.mappings.items():
        if _is_mappable(check, file):
            counts[file] = len(found)
            _memory(check, file, found)
            continue
        for domain, key, _ in found:
            _bad_mapping(check, domain, key, f"inode {file}, which is none")
    for record_key, file, _ in check.records.awaiting:
        if _is_mappable(check, file):
            counts[file] += 1
            continue
        text = f"record {record_key:#x}: expected content of a file that awaits an invalidation, found inode {file}"
        data = BadRecord(ROOT_PGTABLES_INO, record_key)
        check.note(Code.IOMMU_AWAITING, f"{text}, which is none", ino=ROOT_PGTABLES_INO, data=data)
    pinned = check.records.pinned
    for ino in sorted({*counts, *pinned}):
        pins = pinned.get(ino, 0)
        if counts[ino] != pins:
            text = f"inode {ino}: expected {counts[ino]} pins, found {pins}"
            check.note(Code.IOMMU_PINS, text, ino=ino, data=Fields(ino, {"iommu": counts[ino]}))


def _is_mappable(check: Check, ino: Ino) -> bool:
    inode = check.inode(ino) if ino >= FIRST_FREE_SLOT and check.memory.in_use(ino) and ino in check.reached else None
    return inode is not None and stat.S_ISREG(inode.mode) and not inode.flags & GUARDED


def _bad_mapping(check: Check, domain: Ino, key: int, found: str) -> None:
    text = f"IOVA {key * PAGE:#x} of domain {domain}: expected memory of a file, found {found}"
    check.note(Code.IOMMU_MAPPING, text, ino=domain, data=BadRecord(domain, key))


def _memory(check: Check, file: Ino, found: list[tuple[Ino, IovaPage, Mapping]]) -> None:
    """Compare the mappings of one file with its memory and its size."""
    inode = check.inode(file)
    assert inode is not None
    try:
        extents = list(FileMap(check.volume, file, inode).extents())
    except CorruptError:
        return  # noted where the extents were
    runs = [(first, first + count) for first, count in joined_runs((e.start, e.length) for e in extents)]
    last = 0
    at = 0
    for domain, key, mapping in sorted(found, key=lambda item: item[2].start):
        end = mapping.start + mapping.length
        while at < len(runs) and runs[at][1] <= mapping.start:
            at += 1
        if at < len(runs) and runs[at][0] <= mapping.start and end <= runs[at][1]:
            last = max(last, end)
        else:
            _bad_mapping(check, domain, key, f"a hole in inode {file}")
    if last > -(-inode.size // PAGE):
        text = f"inode {file}: expected {last} pages, as mapped, found {inode.size} bytes"
        check.note(Code.IOMMU_END, text, ino=file, data=Fields(file, {"size": last * PAGE}))


def awaiting(check: Check) -> None:
    """What content awaits is pending, and who does not know of it may not write."""
    if check.findings.incomplete or not check.records.awaiting:
        return
    for domain_id in sorted({domain_id for _, _, domain_id in check.records.awaiting} - check.records.pending):
        text = f"content awaits an invalidation of domain id {domain_id}: expected it to be pending, found none"
        check.note(Code.IOMMU_PENDING, text, ino=ROOT_PGTABLES_INO, data=NotPending(domain_id))
    if not check.volume.sb.ro_compat & RO_COMPAT_AWAITING:
        text = f"content awaits invalidations: expected feature {RO_COMPAT_AWAITING:#x} (ro_compat), found it off"
        check.note(Code.FEATURE, text, data=FeatureOff(RO_COMPAT_AWAITING))


def attachments(check: Check) -> None:
    """An attachment names a domain, and no two domains have one id."""
    if check.findings.incomplete:
        return
    attached = set()
    for key, attachment in check.records.attachments:
        attached.add(attachment.domain)
        if attachment.domain not in check.records.domains:
            found = f"inode {attachment.domain}"
            text = f"device {key - ATTACHMENT_KEY:#x}: expected an attachment to a domain, found one to {found}"
            data = BadRecord(ROOT_PGTABLES_INO, key)
            check.note(Code.IOMMU_ATTACHMENT, text, ino=ROOT_PGTABLES_INO, data=data)
    free = (number for number in IDS if number not in check.records.ids)
    for number, inos in check.records.ids.items():
        # One that no device is attached to can have another.
        for ino in sorted(inos, key=lambda ino: (ino not in attached, ino))[1:]:
            text = f"domain {ino}: expected an id of its own, found {number}"
            check.note(Code.IOMMU_DOMAIN_ID, text, ino=ino, data=NewId(ino, next(free, 0)))
