"""What tables say, and what they should say, as ranges; and where the two differ."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pkernfs.format import PAGE, FilePage, GiB, Iova, IovaPage, Mapping, PhysAddr, TablePage
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.runs import joined
from pkernfs.fs.volume import Volume
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.edit import Piece
from pkernfs.iommu.formats import ADDRESS, ENTRIES, IOVA_END, IOVA_START, span
from pkernfs.iommu.records import LAST_MAPPING

#: No more than this is looked at without a look at anything else: 512 tables of leaves of 4 KiB take some
#: tens of milliseconds to read.
PORTION = GiB

#: kind, IOVA (None: it is about none), text
Note = Callable[[str, Iova | None, str], None]


class Tables:
    """A walk of all tables of a domain: ``pieces`` gives what they say, ``note`` hears of what cannot be.

    ``seen``: the pages that tables are in.
    """

    def __init__(self, domain: Domain, note: Note) -> None:
        self.form = domain.form
        self.pages = domain.pages
        self.levels = domain.record.levels
        self.root = domain.root
        self.note = note
        self.seen: set[TablePage] = set()

    def pieces(self, first: Iova = IOVA_START, end: Iova = IOVA_END) -> Iterator[Piece]:
        """The translations of IOVAs [first, end), by ascending IOVA."""
        if self.root:
            self.seen.add(self.root)
            yield from in_portions(self._table(self.levels, self.root, IOVA_START, first, end))

    def _table(self, level: int, page: TablePage, base: Iova, first: Iova, end: Iova) -> Iterator[Piece]:
        form, size = self.form, span(level)
        entries = self.pages.read(page)
        low, high = max(first - base, 0) // size, min(-(-(end - base) // size), ENTRIES)
        entry = entries[0]
        if entry & form.present and form.is_leaf(entry, level) and entry + ENTRIES * size <= 1 << 64:
            whole = array("Q", range(entry, entry + ENTRIES * size, size))
            if entries == whole and entries[-1] & ADDRESS > entry & ADDRESS:
                yield from self._leaves(level, base, entries, low, high)
                return
        while low < high:
            entry = entries[low]
            iova = Iova(base + low * size)
            if not entry & form.present:
                if entry:
                    self.note("reserved-bits", iova, f"entry {entry:#x} of level {level} is not present, and not zero")
                low += 1
            elif form.is_leaf(entry, level):
                last = low + 1
                while last < high and entries[last] == entries[last - 1] + size:
                    last += 1
                yield from self._leaves(level, base, entries, low, last)
                low = last
            else:
                yield from self._below(level, entry, iova, first, end)
                low += 1

    def _leaves(self, level: int, base: Iova, entries: array[int], low: int, high: int) -> Iterator[Piece]:
        """Leaves whose entries go up by the size of their pages."""
        form, size = self.form, span(level)
        entry = entries[low]
        for at in sorted({low, high - 1}):
            if form.odd_bits(entries[at], level):
                text = f"leaf {entries[at]:#x} of level {level} has bits {form.odd_bits(entries[at], level):#x} wrong"
                self.note("reserved-bits", Iova(base + at * size), text)
        iova, physical = Iova(base + low * size), PhysAddr(entry & ADDRESS & -size)
        yield Piece(iova, physical, (high - low) * size, form.access(entry))

    def _below(self, level: int, entry: int, iova: Iova, first: Iova, end: Iova) -> Iterator[Piece]:
        child = self.pages.target(entry)
        odd = self.form.odd_bits(entry, level)
        if odd:
            self.note("reserved-bits", iova, f"entry {entry:#x} of level {level} has bits {odd:#x} wrong")
        if child is None:
            self.note("dangling", iova, f"entry {entry:#x} of level {level} points to a table that is not in the file")
        elif child in self.seen:
            self.note("overlap", iova, f"entry {entry:#x} of level {level} points to a table that another entry has")
        else:
            self.seen.add(child)
            yield from self._table(level - 1, child, iova, first, end)


def pieces_of(volume: Volume, iova: Iova, mapping: Mapping, filemap: FileMap | None = None) -> Iterator[Piece]:
    """What a mapping translates to, in pieces.  Raises CorruptError when the file has no memory there."""
    filemap = filemap or FileMap(volume, mapping.ino, volume.inode(mapping.ino))
    at, end = mapping.start, mapping.start + mapping.length
    while at < end:
        page, run = filemap.find(at)
        if not page:
            found = f"no memory at {at * PAGE:#x}, which is mapped to IOVA {iova:#x}"
            raise corrupt_inode(mapping.ino, found)
        run = min(run, end - at)
        # Extents are in one piece of the file each; two of them can go on in memory.
        yield Piece(iova, PhysAddr(volume.sb.phys_base + page * PAGE), run * PAGE, mapping.access)
        at, iova = FilePage(at + run), Iova(iova + run * PAGE)


def _portions(piece: Piece) -> Iterator[Piece]:
    """A piece, cut where the IOVA is a multiple of PORTION."""
    first, end = piece.iova, piece.iova + piece.length
    while first < end:
        cut = Iova(min(end, (first // PORTION + 1) * PORTION))
        yield Piece(first, PhysAddr(piece.physical + first - piece.iova), cut - first, piece.access)
        first = cut


def goes_on(one: Piece, other: Piece) -> Piece | None:
    """Both as one piece, when the second goes on in memory where the first ends, and does not begin a PORTION."""
    if other.iova % PORTION and (other.iova, other.physical, other.access) == (
        one.iova + one.length,
        one.physical + one.length,
        one.access,
    ):
        return one._replace(length=one.length + other.length)
    return None


def in_portions(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same with what goes on in memory in one piece, cut where the IOVA is a multiple of PORTION."""
    return joined((portion for piece in pieces for portion in _portions(piece)), goes_on)


def expected(domain: Domain, first: Iova = IOVA_START, end: Iova = IOVA_END) -> Iterator[Piece]:
    """What the mappings say for IOVAs [first, end), by ascending IOVA.  Raises CorruptError."""

    def each() -> Iterator[Piece]:
        last = IovaPage(min(end // PAGE - 1, LAST_MAPPING))
        for at, mapping in domain.records.mappings(IovaPage(first // PAGE), last):
            for piece in pieces_of(domain.volume, Iova(at * PAGE), mapping):
                yield from clipped(piece, first, end)

    return in_portions(each())


def clipped(piece: Piece, first: Iova, end: Iova) -> Iterator[Piece]:
    """The part of a piece that is within [first, end), if there is one."""
    low, high = max(piece.iova, first), min(piece.iova + piece.length, end)
    if low < high:
        yield Piece(Iova(low), PhysAddr(piece.physical + low - piece.iova), high - low, piece.access)


class Difference(NamedTuple):
    """A range of IOVAs for which two sides differ; a side is (physical address, access), or None."""

    iova: Iova
    length: int
    left: tuple[int, int] | None
    right: tuple[int, int] | None


def compare(left: Iterator[Piece], right: Iterator[Piece]) -> Iterator[Difference | None]:
    """Where two series of pieces, by ascending IOVA, do not say the same; None now and then, to do something else."""
    one, other = next(left, None), next(right, None)
    while one or other:
        yield None
        if one == other:
            one, other = next(left, None), next(right, None)
            continue
        starts = [piece.iova for piece in (one, other) if piece]
        ends = [piece.iova + piece.length for piece in (one, other) if piece]
        low = min(starts)
        high = Iova(min([start for start in starts if start > low] + ends))
        sides = [
            (piece.physical + low - piece.iova, piece.access) if piece and piece.iova == low else None
            for piece in (one, other)
        ]
        if sides[0] != sides[1]:
            yield Difference(low, high - low, sides[0], sides[1])
        one = _rest(one, high) or next(left, None)
        other = _rest(other, high) or next(right, None)


def _rest(piece: Piece | None, first: Iova) -> Piece | None:
    if piece is None or piece.iova >= first:
        return piece
    return next(clipped(piece, first, IOVA_END), None)


def differences(domain: Domain, first: Iova, end: Iova) -> Iterator[str]:
    """What is wrong with the tables for IOVAs [first, end), in words."""
    notes: list[str] = []
    tables = Tables(domain, lambda _kind, iova, text: notes.append(f"IOVA {iova:#x}: {text}"))
    actual = (part for piece in tables.pieces(first, end) for part in clipped(piece, first, end))
    for found in filter(None, compare(expected(domain, first, end), actual)):
        yield f"IOVA {found.iova:#x} translates to {found.right}, expected {found.left}"
    yield from notes
