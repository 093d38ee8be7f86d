"""Page tables: the records of what they say, the pins that these are for files, and the memory of the tables."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pkernfs.errors import CorruptError
from pkernfs.format import (
    ATTACHMENT,
    ATTACHMENT_KEY,
    BITMAP_PAGES,
    BLOCK_DATA,
    DOMAIN,
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
    ROOT_PGTABLES_INO,
    ROOT_TABLE,
    ROOT_TABLE_KEY,
    TABLES_AMD,
    TABLES_VTD,
    WRITE,
    Attachment,
    DomainRecord,
    Inode,
    Mapping,
)
from pkernfs.fs.filemap import FileMap
from pkernfs.fsck.check.trees import is_record, items, keep
from pkernfs.layout import Layout

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker

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
    Kind(range(GENERATION_KEY, GENERATION_KEY + 1), GENERATION, lambda *_: True),
    Kind(range(REQUEST_KEY, REQUEST_KEY + REQUEST_SLOTS), REQUEST, lambda *_: True),
)


def record(ino: int, key: int, value: bytes, pages: int) -> Any:
    """The record of inode ``ino``, whose tables have ``pages`` pages; None when it cannot be one."""
    for kind in OF_ROOT if ino == ROOT_PGTABLES_INO else OF_DOMAIN:
        if key in kind.keys and len(value) == kind.layout.size:
            found = kind.layout.unpack(value)
            return found if kind.sound(key, found, pages) else None
    return None


def whole_pages(checker: Checker, ino: int, inode: Inode) -> int:
    """How many pages from the start of a file on are in whole blocks.  Raises CorruptError."""
    pages = 0
    for extent in FileMap(checker.volume, ino, inode).extents():
        first, count = divmod(extent.page, PAGES_PER_BLOCK)[0], extent.length // PAGES_PER_BLOCK
        kinds = checker.ledger.table[first : first + count]
        if extent.start != pages or extent.length % PAGES_PER_BLOCK or kinds != bytes([BLOCK_DATA]) * count:
            break
        pages += extent.length
    return pages


def tables(checker: Checker, ino: int, inode: Inode) -> None:
    """Page tables are whole blocks, to their end, and the pages of their bitmaps are in use."""
    if not _holds_tables(inode) or not checker.ledger.tally.sound or "flags" in checker.fixes.get(ino, {}):
        return
    try:
        pages = whole_pages(checker, ino, inode)
    except CorruptError:
        return
    if inode.size != pages * PAGE:
        found = f"page tables {ino:#x}: expected the size of their {pages // PAGES_PER_BLOCK} blocks"
        checker.note("iommu-size", f"{found}, found {inode.size} bytes")
        checker.correct(ino, size=pages * PAGE)
        return
    filemap = FileMap(checker.volume, ino, inode)
    for at in range(0, pages, BITMAP_PAGES):
        page, _ = filemap.find(at)
        if not checker.region.view[page * PAGE] & 1:
            text = f"page {at} of page tables {ino:#x}: expected it in use, found it free"
            checker.note("iommu-bitmap", text, offset=page * PAGE)
            checker.bitmaps.append((ino, page))


def records(checker: Checker, ino: int, inode: Inode) -> None:
    """Each has a key and a form that are known, and mappings do not overlap; what files they pin is compared later."""
    if not _holds_tables(inode):
        if inode.iommu and stat.S_ISREG(inode.mode):
            checker.pinned[ino] = inode.iommu
        return
    if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES:
        checker.domains.add(ino)
    if not inode.iommu:
        return
    try:
        pages = whole_pages(checker, ino, inode)
    except CorruptError:
        pages = checker.volume.total_pages
    kept: list[tuple[int, bytes]] = []
    dropped: list[str] = []
    end = 0
    for key, value in items(checker, inode.iommu, is_record):
        found = record(ino, key, value, pages)
        if found is None:
            text = f"record {key:#x} of inode {ino:#x}: expected another form, found {value[:32].hex()}"
            checker.note("iommu-record", f"{text}, {len(value)} bytes")
        elif isinstance(found, Mapping) and key < end:
            text = f"domain {ino:#x}: expected a mapping from IOVA {end * PAGE:#x} on, found one at {key * PAGE:#x}"
            checker.note("iommu-overlap", text)
            found = None
        if found is None:
            dropped.append(f"record {key:#x}")
            continue
        if isinstance(found, Mapping):
            end = key + found.length
            checker.mappings.setdefault(found.ino, []).append((ino, key, found))
        elif isinstance(found, DomainRecord):
            checker.domain_ids.setdefault(found.id, []).append(ino)
        elif isinstance(found, Attachment):
            checker.attachments.append((key, found))
        if checker.ledger.salvage:
            kept.append((key, value))
    keep(checker, ino, "iommu", kept, dropped)


def _holds_tables(inode: Inode) -> bool:
    return bool(inode.flags & GUARDED) and stat.S_ISREG(inode.mode)


def mappings(checker: Checker) -> None:
    """A mapping names memory of a file, within its size, and a file counts the mappings that name it."""
    if checker.ledger.incomplete:
        return
    counts: Counter[int] = Counter()
    for file, found in checker.mappings.items():
        if _is_mappable(checker, file):
            counts[file] = len(found)
            _memory(checker, file, found)
            continue
        for domain, key, _ in found:
            _bad_mapping(checker, domain, key, f"inode {file:#x}, which is none")
    for ino in sorted({*counts, *checker.pinned}):
        pins = checker.pinned.get(ino, 0)
        if counts[ino] != pins:
            checker.note("iommu-pins", f"inode {ino:#x}: expected {counts[ino]} pins, found {pins}", ino=ino)
            checker.correct(ino, iommu=counts[ino])


def _is_mappable(checker: Checker, ino: int) -> bool:
    inode = checker.inode(ino) if ino >= FIRST_FREE_SLOT and checker.in_use(ino) and checker.reached(ino) else None
    return inode is not None and stat.S_ISREG(inode.mode) and not inode.flags & GUARDED


def _bad_mapping(checker: Checker, domain: int, key: int, found: str) -> None:
    text = f"IOVA {key * PAGE:#x} of domain {domain:#x}: expected memory of a file, found {found}"
    checker.note("iommu-mapping", text, ino=domain)
    checker.bad_records.setdefault(domain, []).append(key)


def _memory(checker: Checker, file: int, found: list[tuple[int, int, Mapping]]) -> None:
    """Compare the mappings of one file with its memory and its size."""
    inode = checker.inode(file)
    assert inode is not None
    try:
        extents = list(FileMap(checker.volume, file, inode).extents())
    except CorruptError:
        return  # noted where the extents were
    runs: list[list[int]] = []
    for extent in extents:
        if runs and runs[-1][1] == extent.start:
            runs[-1][1] += extent.length
        else:
            runs.append([extent.start, extent.start + extent.length])
    last = 0
    at = 0
    for domain, key, mapping in sorted(found, key=lambda item: item[2].start):
        end = mapping.start + mapping.length
        while at < len(runs) and runs[at][1] <= mapping.start:
            at += 1
        if at < len(runs) and runs[at][0] <= mapping.start and end <= runs[at][1]:
            last = max(last, end)
        else:
            _bad_mapping(checker, domain, key, f"a hole in inode {file:#x}")
    if last > -(-inode.size // PAGE):
        text = f"inode {file:#x}: expected {last} pages, as mapped, found {inode.size} bytes"
        checker.note("iommu-end", text, ino=file)
        checker.correct(file, size=last * PAGE)


def attachments(checker: Checker) -> None:
    """An attachment names a domain, and no two domains have one id."""
    if checker.ledger.incomplete:
        return
    attached = set()
    for key, attachment in checker.attachments:
        attached.add(attachment.domain)
        if attachment.domain not in checker.domains:
            found = f"inode {attachment.domain:#x}"
            text = f"device {key - ATTACHMENT_KEY:#x}: expected an attachment to a domain, found one to {found}"
            checker.note("iommu-attachment", text, ino=ROOT_PGTABLES_INO)
            checker.bad_records.setdefault(ROOT_PGTABLES_INO, []).append(key)
    free = (number for number in IDS if number not in checker.domain_ids)
    for number, inos in checker.domain_ids.items():
        # One that no device is attached to can have another.
        for ino in sorted(inos, key=lambda ino: (ino not in attached, ino))[1:]:
            checker.note("iommu-domain-id", f"domain {ino:#x}: expected an id of its own, found {number}", ino=ino)
            checker.new_ids[ino] = next(free, 0)
