"""The proof that each IOVA of each device translates to the memory that its mapping names, with no more rights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from pkernfs.errors import CorruptError, PkernfsError
from pkernfs.format import (
    ACCESS_NAMES,
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_SLAB,
    PAGE,
    PAGE_FREE,
    PAGES_PER_BLOCK,
    Attachment,
    Iova,
    PageNo,
    PhysAddr,
    Requester,
    TablePage,
)
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.space import block_of
from pkernfs.fs.volume import Volume
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import ADDRESS, DEVICES
from pkernfs.iommu.pages import TablePages
from pkernfs.iommu.translations import Difference, Tables, compare, expected

#: What can be wrong: the name that a Problem gives, and the statement that does not hold then.
KINDS = {
    "dangling": "what entries point to is in use",
    "foreign": "a translation is to the file that its mapping names, and to no other memory",
    "over-permissive": "a translation gives no more rights than its mapping",
    "under-mapped": "a translation is there, with all rights, wherever a mapping is",
    "reserved-bits": "entries have no bits that hardware refuses",
    "overlap": "one entry points to each table, and to none that belongs to another domain",
    "unreachable": "pages that are marked as used are tables, or await an invalidation",
    "bitmap": "pages of tables are marked as used",
    "context": "only devices that are attached have entries, and these point to the tables of their domains",
    "attachment": "a device that is attached has an entry, and a domain that exists",
    "record": "the records of mappings, domains and attachments can be read",
}

#: Format of the table that it is in, words.
Entry = tuple[int, tuple[int, ...]]


class Problem(NamedTuple):
    """One finding."""

    kind: str
    domain: str | None
    device: str | None
    iova: Iova | None
    text: str


class Audit:
    """One audit of all domains: ``run``, step by step; then ``problems`` has what was found."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.volume = fs.volume
        self.problems: list[Problem] = []
        self.domains = self.mappings = self.tables = self.bytes = 0
        self.attachments: dict[Requester, Attachment] = {}
        self.name: str | None = None  #: of the domain at work
        self.device: str | None = None  #: that is attached to it

    def note(self, kind: str, iova: Iova | None, text: str) -> None:
        """Add a finding.  ``iova`` None: it is about none."""
        self.problems.append(Problem(kind, self.name, self.device, iova, text))

    def run(self) -> Iterator[None]:
        """All of it, in steps of some milliseconds.  Between them nothing may change."""
        domains: dict[int, Domain] = {}
        try:
            contexts = Contexts(self.volume)
            self.attachments = dict(contexts.records.attachments())
        except PkernfsError as error:
            self.note("record", None, str(error))
            return
        for name, ino in named_domains(self.volume):
            self.name = os.fsdecode(name)
            self.device = next((pci.text(of) for of, one in self.attachments.items() if one.domain == ino), None)
            self.domains += 1
            try:
                domains[ino] = Domain(self.volume, ino)
                yield from self._domain(domains[ino])
            except PkernfsError as error:
                self.note("record", None, str(error))
        self.name = None
        try:
            self._devices(contexts, domains)
        except PkernfsError as error:
            self.note("context", None, str(error))
        yield

    # -- one domain -----------------------------------------------------------------------------------------------

    def _domain(self, domain: Domain) -> Iterator[None]:
        tables = Tables(domain, self.note)
        self.mappings += sum(1 for _ in domain.records.mappings())
        actual = tables.pieces()
        wanted = expected(domain)

        def counted() -> Iterator[Any]:
            for piece in actual:
                self.bytes += piece.length
                yield piece

        for found in compare(wanted, counted()):
            if found:
                self._differs(found)
            yield
        self.tables += len(tables.seen)
        self._pages(domain.pages, tables.seen, domain.record.awaiting)
        yield

    def _differs(self, found: Difference) -> None:
        """A range for which the mappings say ``left`` and the tables ``right``."""
        where = f"IOVAs {found.iova:#x} to {found.iova + found.length - 1:#x}"
        if found.right is None:
            self.note("under-mapped", found.iova, f"{where}: mapped, and not in the tables")
            return
        physical, access = found.right
        if found.left is None or found.left[0] != physical:
            belongs = owner(self.volume, PhysAddr(physical))
            to = f"to physical address {physical:#x}, which is {belongs or 'not in use'}"
            wanted = "nothing is mapped there" if found.left is None else f"expected {found.left[0]:#x}"
            self.note("foreign" if belongs else "dangling", found.iova, f"{where} translate {to}: {wanted}")
        elif access & ~found.left[1]:
            rights = f"{ACCESS_NAMES[access]}, the mapping {ACCESS_NAMES[found.left[1]]}"
            self.note("over-permissive", found.iova, f"{where}: the tables give {rights}")
        else:
            rights = f"{ACCESS_NAMES[access]}, the mapping {ACCESS_NAMES[found.left[1]]}"
            self.note("under-mapped", found.iova, f"{where}: the tables give {rights}")

    def _pages(self, pages: TablePages, seen: set[TablePage], awaiting: int) -> None:
        """Compare the pages that are tables with those that are marked as used."""
        unmarked = sorted(page for page in seen if not pages.in_use(page))
        if unmarked:
            self.note("bitmap", None, f"{len(unmarked)} pages of tables are marked as free, the first is {unmarked[0]}")
        extra = pages.used_count() - (len(seen) - len(unmarked))
        if extra != awaiting:
            text = f"{extra} pages are in use and nothing points to them; {awaiting} await an invalidation"
            self.note("unreachable", None, text)

    # -- devices --------------------------------------------------------------------------------------------------

    def _devices(self, contexts: Contexts, domains: dict[int, Domain]) -> None:
        seen: set[TablePage] = set()
        for number, _, page in contexts.tables():
            if DEVICES[number].root:
                seen |= {page, *self._root_table(contexts, page)}
            else:
                seen |= {TablePage(one) for one in range(page, page + PAGES_PER_BLOCK)}
        entries: dict[Requester, list[Entry]] = {}
        for number, requester, words in contexts.present():
            if requester not in self.attachments or words[0] != DEVICES[number].blocked[0]:
                entries.setdefault(requester, []).append((number, words))
        for requester in sorted(entries.keys() | self.attachments.keys()):
            self.device = pci.text(requester)
            self._device(requester, entries.get(requester, []), domains)
        self.device = None
        if contexts.pages.inode.size:
            self._pages(contexts.pages, seen, 0)

    def _root_table(self, contexts: Contexts, root: TablePage) -> Iterator[TablePage]:
        entries = contexts.root(root)
        for bus, (low, high) in enumerate(zip(entries[::2], entries[1::2], strict=True)):
            if high or (low and (low & ~ADDRESS) != 1):
                self.note("reserved-bits", None, f"the root entry of bus {bus:#x}, {low:#x} {high:#x}")
        for _, page in contexts.context_tables(root):
            yield page

    def _device(
        self, requester: Requester, entries: list[tuple[int, tuple[int, ...]]], domains: dict[int, Domain]
    ) -> None:
        attachment = self.attachments.get(requester)
        domain = domains.get(attachment.domain) if attachment else None
        if attachment and domain is None:
            self.note("attachment", None, f"{self.device} is attached to inode {attachment.domain}, which is no domain")
        elif attachment and not entries:
            self.note("attachment", None, f"{self.device} is attached, and has no entry")
        for number, words in entries:
            text = f"the entry of {self.device}, {' '.join(f'{word:#x}' for word in words)}"
            if attachment is None:
                self.note("context", None, f"{text}: it is not attached")
            elif domain and (number != domain.record.tables or words != domain.entry or attachment.id != domain.id):
                wanted = " ".join(f"{word:#x}" for word in domain.entry)
                self.note("context", None, f"{text}: expected {wanted}, which points to the tables of its domain")


def owner(volume: Volume, physical: PhysAddr) -> str:
    """Whether memory is in use, and for what; "": it is not."""
    offset = physical - volume.sb.phys_base
    block, page = block_of(PageNo(offset // PAGE))
    if not 0 <= offset < volume.sb.blocks * BLOCK:
        return ""
    kind = volume.space.table[block]
    if kind == BLOCK_SLAB:
        try:
            return "" if volume.space.slab(block).kinds[page] == PAGE_FREE else "a page of something else"
        except CorruptError:
            return "in a damaged slab"
    return {BLOCK_FREE: "", BLOCK_DATA: "a block of another file, or of another part of it"}.get(kind, "metadata")


def audit(fs: Filesystem) -> Audit:
    """One that has run."""
    one = Audit(fs)
    for _ in one.run():
        pass
    return one
