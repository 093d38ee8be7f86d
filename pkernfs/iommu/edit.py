"""Changing tables that hardware may be walking at the same time.

A walker sees a translation that stays at every moment: tables are complete before an entry points to them; a large leaf
is split, and a full table merged into a leaf, by one store; and pages that were given up keep what they held.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.format import Iova, PhysAddr, TablePage
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.formats import ADDRESS, ENTRIES, TableFormat, span
from pkernfs.iommu.pages import TablePages


class Piece(NamedTuple):
    """A range of IOVAs that translates to memory in one piece; multiples of 4 KiB."""

    iova: Iova
    physical: PhysAddr
    length: int  #: bytes
    access: int  #: READ | WRITE


class Editor:
    """Changes to the tables of a domain, within one transaction.

    ``leaf``: the largest level of leaves that are made.
    """

    def __init__(self, tx: Transaction, form: TableFormat, pages: TablePages, leaf: int) -> None:
        self.tx = tx
        self.form = form
        self.pages = pages
        self.leaf = leaf
        self.given_up: dict[TablePage, None] = {}  #: pages that nothing points to any more
        self.made = 0  #: tables
        self.stored = 0  #: leaves
        self.first = self.end = Iova(0)  #: the range of IOVAs whose translations hardware is to invalidate

    def _touch(self, first: Iova, end: Iova) -> None:
        self.first = min(self.first, first) if self.end else first
        self.end = max(self.end, end)

    def _child(self, entry: int) -> TablePage:
        page = self.pages.target(entry)
        if page is None:
            raise self.pages.bad(f"an entry {entry:#x} points out of the file")
        return self.pages.check_used(page)

    def _drop(self, page: TablePage) -> None:
        if page in self.given_up:
            raise self.pages.bad(f"two entries point to page {page}")
        self.given_up[page] = None

    # -- making ---------------------------------------------------------------------------------------------------

    def build(self, level: int, base: Iova, pieces: list[Piece]) -> TablePage:
        """A new table for IOVAs from ``base`` on, with all below it; its page."""
        entries = array("Q", bytes(8 * ENTRIES))
        self._fill(level, base, entries, pieces)
        page = self.pages.allocate(self.tx)
        self.pages.store(page, entries)
        self.made += 1
        return page

    def _to_new_table(self, level: int, base: Iova, pieces: list[Piece]) -> int:
        """An entry of a table of ``level`` that points to a new table."""
        return self.pages.physical(self.build(level - 1, base, pieces)) | self.form.table[level]

    def _fill(self, level: int, base: Iova, entries: array[int], pieces: list[Piece]) -> dict[int, list[Piece]]:
        """Enter what goes into leaves here, and new tables; by index what goes into tables that are there already."""
        size = span(level)
        form = self.form
        below: dict[int, list[Piece]] = {}
        for piece in pieces:
            iova, physical, length, access = piece
            if not base <= iova < iova + length <= base + ENTRIES * size:
                raise self.pages.bad(f"a mapping of IOVA {iova:#x}, beyond the tables")
            while length:
                index, skip = divmod(iova - base, size)
                if level <= self.leaf and not skip and not physical % size and length >= size:
                    count = length // size
                    first = physical | form.leaf[level] | form.access_bits(access)
                    if any(entries[index : index + count]):
                        raise self.pages.bad(f"an entry for IOVA {iova:#x} where no mapping is")
                    entries[index : index + count] = array("Q", range(first, first + count * size, size))
                    self.stored += count
                    step = count * size
                else:
                    step = min(length, size - skip)
                    below.setdefault(index, []).append(Piece(iova, physical, step, access))
                iova, physical, length = Iova(iova + step), PhysAddr(physical + step), length - step
        for index in [index for index in below if not entries[index]]:
            entries[index] = self._to_new_table(level, Iova(base + index * size), below.pop(index))
        return below

    def enter(self, level: int, page: TablePage, base: Iova, pieces: list[Piece]) -> int:
        """Enter pieces into a table that is reachable.

        The leaf that says the same as all of the table, to be stored in its place; else 0.
        """
        old = self.pages.read(page)
        new = array("Q", old)
        size = span(level)
        for index, parts in self._fill(level, base, new, pieces).items():
            if self.form.is_leaf(new[index], level):
                raise self.pages.bad(f"a leaf for IOVA {parts[0].iova:#x} where no mapping is")
            child = self._child(new[index])
            start = Iova(base + index * size)
            leaf = self.enter(level - 1, child, start, parts)
            if leaf:
                new[index] = leaf
                self._drop(child)
                self._touch(start, Iova(start + size))
        leaf = self._merged(level, new)
        if not leaf:
            self._store(page, old, new)
        return leaf

    def _merged(self, level: int, entries: array[int]) -> int:
        """The leaf, a level higher, that says the same as a table; 0: there is none."""
        form = self.form
        first = entries[0]
        if level >= self.leaf or not first & form.present or not form.is_leaf(first, level):
            return 0
        if first & ADDRESS & span(level + 1) - 1:
            return 0
        size = span(level)
        if entries != array("Q", range(first, first + ENTRIES * size, size)):
            return 0
        return first & ADDRESS | form.leaf[level + 1] | form.access_bits(form.access(first))

    def _store(self, page: TablePage, old: array[int], new: array[int]) -> None:
        """Store the entries that differ, in runs."""
        if old == new:
            return
        at = 0
        while at < ENTRIES:
            if old[at] == new[at]:
                at += 1
                continue
            end = at
            while end < ENTRIES and old[end] != new[end]:
                end += 1
            self.pages.words(self.tx, page, at, new[at:end])
            at = end

    # -- taking away ----------------------------------------------------------------------------------------------

    def clear(self, level: int, page: TablePage, first: Iova, end: Iova, base: Iova | None = None) -> bool:
        """Take IOVAs [first, end) from a table that is reachable; whether nothing is left in it.

        Then it stays as it is, for the entry that points to it is to be cleared; but for a root (``base`` None).
        """
        is_root, base = base is None, base or Iova(0)
        old = self.pages.read(page)
        new = array("Q", old)
        form, size = self.form, span(level)
        for index in range(max(first - base, 0) // size, min(-(-(end - base) // size), ENTRIES)):
            entry = new[index]
            if not entry & form.present:
                continue
            start = Iova(base + index * size)
            whole = first <= start and start + size <= end
            leaf = form.is_leaf(entry, level)
            if leaf:
                self._touch(start, Iova(start + size))
            if whole:
                new[index] = 0
                if not leaf:
                    self._give_up(level - 1, self._child(entry), start)
            elif leaf:
                new[index] = self._split(level, start, entry, first, end)
            else:
                child = self._child(entry)
                if self.clear(level - 1, child, first, end, start):
                    new[index] = 0
                    self._drop(child)
        if not any(new) and not is_root:
            return True
        self._store(page, old, new)
        return False

    def _split(self, level: int, start: Iova, entry: int, first: Iova, end: Iova) -> int:
        """An entry that points to a table with what a leaf says, but for IOVAs [first, end)."""
        size = span(level)
        physical = entry & ADDRESS & -size
        access = self.form.access(entry)
        pieces = []
        if start < first:
            pieces.append(Piece(start, PhysAddr(physical), first - start, access))
        if end < start + size:
            pieces.append(Piece(end, PhysAddr(physical + end - start), start + size - end, access))
        return self._to_new_table(level, start, pieces)

    def _give_up(self, level: int, page: TablePage, base: Iova) -> None:
        """Give up a table and all tables below it."""
        for table in tables_below(self.form, self.pages, level, page):
            self._drop(table)
        self._touch(base, Iova(base + ENTRIES * span(level)))


def tables_below(form: TableFormat, pages: TablePages, level: int, page: TablePage) -> Iterator[TablePage]:
    """The pages of a table and of all tables below it.  Raises CorruptError when they are not a tree."""
    todo = [(level, page)]
    seen: set[TablePage] = set()
    while todo:
        level, page = todo.pop()
        if page in seen:
            raise pages.bad(f"two entries point to page {page}")
        seen.add(page)
        yield pages.check_used(page)
        if level > 1:
            for entry in pages.read(page):
                if entry & form.present and not form.is_leaf(entry, level):
                    child = pages.target(entry)
                    if child is None:
                        raise pages.bad(f"an entry {entry:#x} points out of the file")
                    todo.append((level - 1, child))
