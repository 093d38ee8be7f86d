"""What points devices to the tables of their domains, in /iommu/root-pgtables: root, context and device tables."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Container, Iterator

from pkernfs.format import (
    ATTACHMENT_KEY,
    PAGE,
    PAGES_PER_BLOCK,
    ROOT_PGTABLES_INO,
    ROOT_TABLE,
    ROOT_TABLE_KEY,
    Requester,
    RootTable,
    TablePage,
)
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.iommu import pci
from pkernfs.iommu.formats import DEVICES, ENTRIES, FORMATS
from pkernfs.iommu.pages import TablePages
from pkernfs.iommu.records import Records

log = logging.getLogger("pkernfs")

EMPTY = array("Q", bytes(PAGE))


class Contexts:
    """The tables of root-pgtables.  Changes end with ``finish``.

    ``records``: of root-pgtables, which the caller finishes after this.
    """

    def __init__(self, volume: Volume, records: Records | None = None) -> None:
        self.pages = TablePages(volume, ROOT_PGTABLES_INO)
        self.records = records or Records(volume, ROOT_PGTABLES_INO)
        #: Root tables, as they are when the open transaction commits.  Each is read once, for all of its 256 buses:
        #: with a read of the page for each bus an attach took 1,364 calls, most of them here.
        self.roots: dict[TablePage, array[int]] = {}

    # -- the tables -----------------------------------------------------------------------------------------------

    def tables(self) -> Iterator[tuple[int, int, TablePage]]:
        """(table format, PCI segment, page) of all root and device tables.  Raises CorruptError."""
        for key, value in self.records.scan(ROOT_TABLE_KEY, ATTACHMENT_KEY - 1):
            number, segment = key >> 16 & 0xFFFFFF, key & 0xFFFF
            if number not in FORMATS:
                raise self.pages.bad(f"record {key:#x}: a table of format {number}")
            yield number, segment, TablePage(self.records.decode(ROOT_TABLE, key, value).page)

    def table(self, number: int, segment: int) -> TablePage:
        """The page of a segment's root (or device) table; 0, which is a bitmap: there is none."""
        record = self.records.record(ROOT_TABLE, ROOT_TABLE_KEY + (number << 16) + segment)
        return TablePage(record.page if record else 0)

    def _check_used(self) -> None:
        """Raise CorruptError when a page of a table is marked as free: it could be given away."""
        for number, _, root in self.tables():
            self.pages.check_used(root)
            for _, page in self.context_tables(root) if DEVICES[number].root else ():
                self.pages.check_used(page)

    def make_table(self, tx: Transaction, number: int, segment: int) -> TablePage:
        """The page of a segment's root (or device) table, which is made if there is none.  Raises FsError(ENOSPC)."""
        page = self.table(number, segment)
        if page:
            return page
        self._check_used()
        device = DEVICES[number]
        if device.root:
            page = self.pages.allocate(tx)
            self.pages.store(page, EMPTY)
        else:
            page = self.pages.allocate_block(tx)
            blocked = array("Q", device.blocked * (ENTRIES // device.words))
            self.pages.store(page, blocked * PAGES_PER_BLOCK)
        self.records.put(tx, ROOT_TABLE_KEY + (number << 16) + segment, ROOT_TABLE.pack(RootTable(page)))
        return page

    # -- the entries of devices -----------------------------------------------------------------------------------

    def context_table(self, root: TablePage, bus: int) -> TablePage:
        """The page of a bus's context table; 0: there is none.  Raises CorruptError."""
        entry = self.root(root)[2 * bus]
        if not entry & 1:
            return TablePage(0)
        page = self.pages.target(entry)
        if page is None:
            raise self.pages.bad(f"the root entry of bus {bus:#x}, {entry:#x}, points out of the file")
        return page

    def context_tables(self, root: TablePage) -> list[tuple[int, TablePage]]:
        """(bus, page) of all context tables of a root table.  Raises CorruptError."""
        present = [bus for bus, entry in enumerate(self.root(root)[::2]) if entry & 1]
        return [(bus, self.context_table(root, bus)) for bus in present]

    def root(self, page: TablePage) -> array[int]:
        """The entries of a root table, two words for each bus."""
        if page not in self.roots:
            self.roots[page] = self.pages.read(page)
        return self.roots[page]

    def _store_root(self, tx: Transaction, root: TablePage, bus: int, word: int) -> None:
        """Let the first word of a bus's root entry be this."""
        self.root(root)[2 * bus] = word
        self.pages.words(tx, root, 2 * bus, [word])

    def place(self, number: int, requester: Requester) -> tuple[TablePage, int]:
        """(page, index of its first word) of a device's entry; page 0: there is none."""
        root = self.table(number, requester >> 16)
        return self._place(number, requester, root) if root else (root, 0)

    def _place(self, number: int, requester: Requester, root: TablePage) -> tuple[TablePage, int]:
        device = DEVICES[number]
        if device.root:
            return self.context_table(root, requester >> 8 & 0xFF), (requester & 0xFF) * device.words
        page, index = divmod((requester & 0xFFFF) * device.words, ENTRIES)
        return TablePage(root + page), index

    def entry(self, number: int, requester: Requester) -> tuple[int, ...]:
        """The words of a device's entry; those of a blocked one where it has none."""
        page, index = self.place(number, requester)
        device = DEVICES[number]
        return tuple(self.pages.read(page)[index : index + device.words]) if page else device.blocked

    def store(self, tx: Transaction, number: int, requester: Requester, words: tuple[int, ...]) -> None:
        """Let a device's entry say ``words``, with the first word as the last one stored.  Raises FsError(ENOSPC)."""
        root = self.make_table(tx, number, requester >> 16)
        page, index = self._place(number, requester, root)
        if page:
            self.pages.words(tx, page, index + 1, words[1:])
            self.pages.words(tx, page, index, words[:1])
            return
        self._check_used()
        bus = requester >> 8 & 0xFF
        page = self.pages.allocate(tx)
        entries = array("Q", EMPTY)
        entries[index : index + len(words)] = array("Q", words)
        self.pages.store(page, entries)
        self._store_root(tx, root, bus, self.pages.physical(page) | 1)

    def point(self, tx: Transaction, number: int, requester: Requester, word: int) -> None:
        """Point a device, which has an entry, to other tables: one store."""
        page, index = self.place(number, requester)
        if not page:
            raise self.pages.bad(f"{pci.text(requester)} is attached, and has no entry")
        self.pages.words(tx, page, index, [word])

    def block(self, tx: Transaction, number: int, requester: Requester) -> None:
        """Let nothing of a device pass; the first word is stored first."""
        page, index = self.place(number, requester)
        if page:
            blocked = DEVICES[number].blocked
            self.pages.words(tx, page, index, blocked[:1])
            self.pages.words(tx, page, index + 1, blocked[1:])

    def block_others(self, tx: Transaction, kept: Container[Requester], most: int) -> list[Requester]:
        """Block up to ``most`` devices that are not ``kept``, whatever their entries point to; which those were.

        Only words are stored, nothing is allocated.  Root entries that point out of the file go, with all of their bus.
        """
        found: list[Requester] = []
        for number, segment, root in self.tables():
            if DEVICES[number].root:
                for bus, entry in enumerate(self.root(root)[::2]):
                    if entry & 1 and self.pages.target(entry) is None:
                        log.error("the root entry of bus %#x, %#x, points out of the file: it is cleared", bus, entry)
                        self._store_root(tx, root, bus, 0)
                        self.pages.words(tx, root, 2 * bus + 1, [0])
            for requester, _ in self._entries(number, segment, root):
                if requester not in kept and len(found) < most:
                    self.block(tx, number, requester)
                    found.append(requester)
        return found

    def present(self) -> Iterator[tuple[int, Requester, tuple[int, ...]]]:
        """(table format, requester, words) of all entries that are not blocked.  Raises CorruptError."""
        for number, segment, root in self.tables():
            if DEVICES[number].root:
                self.context_tables(root)  # all of them are where they can be
            for requester, words in self._entries(number, segment, root):
                yield number, requester, words

    def _entries(self, number: int, segment: int, root: TablePage) -> Iterator[tuple[Requester, tuple[int, ...]]]:
        """(requester, words) of the entries below a root (or device) table that are not blocked."""
        device = DEVICES[number]
        step = ENTRIES // device.words
        if device.root:
            entries = self.root(root)[::2]
            tables = [(bus << 8, self.pages.target(entry)) for bus, entry in enumerate(entries) if entry & 1]
        else:
            tables = [(at * step, TablePage(root + at)) for at in range(PAGES_PER_BLOCK)]
        blocked = array("Q", device.blocked * step)
        for first, page in tables:
            entries = blocked if page is None else self.pages.read(page)
            if entries == blocked:
                continue
            for at in range(0, ENTRIES, device.words):
                words = tuple(entries[at : at + device.words])
                if words != device.blocked:
                    yield Requester(segment << 16 | first + at // device.words), words

    def mend_bitmap(self, tx: Transaction) -> None:
        """Mark just those pages as used that tables are in, within a transaction of its own."""
        used: set[TablePage] = set()
        for number, _, root in self.tables():
            if DEVICES[number].root:
                used |= {root, *(page for _, page in self.context_tables(root))}
            else:
                used |= {TablePage(page) for page in range(root, root + PAGES_PER_BLOCK)}
        if self.pages.inode.size:
            self.pages.use_only(tx, used, marked=False)
            self.finish(tx)

    def finish(self, tx: Transaction) -> None:
        """Put the file's inode and bitmaps into the transaction."""
        self.pages.finish(tx)
