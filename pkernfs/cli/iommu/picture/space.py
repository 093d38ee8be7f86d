"""An address space as a picture shows it: blocks of IOVAs, blocks of files' memory, and what translates to what.

What is too small to be seen is merged with its neighbours, so that 10,000 mappings become a picture, too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from pkernfs.cli.iommu.picture.merge import OTHERS, Mapping, Span, merge
from pkernfs.cli.text import human, plural, span
from pkernfs.format import Ino, Iova, PhysAddr

if TYPE_CHECKING:
    from pkernfs import api

FILES = 12  #: that are told apart; the smallest of more become one
DEVICES = 6  #: that are named
LISTED = 20  #: mappings, or runs, that a tooltip lists
#: Light enough for dark text on them, dark enough to be seen on white.
PALETTE = (
    "#7cb7e8",
    "#f2a65a",
    "#8fcf9a",
    "#e58fb1",
    "#b9a3e3",
    "#e6cf5c",
    "#6fcac5",
    "#d99a7c",
    "#a9bd6a",
    "#e87f78",
    "#93a8f0",
    "#c48fd0",
)
GREY = "#b4bac2"


class Run(NamedTuple):
    """A part of a file that is contiguous in memory; bytes."""

    offset: int
    physical: PhysAddr
    length: int


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
    return "\n".join([*lines[:LISTED], *more])


class Block(Span):
    """IOVAs.  ``leaves``: sizes of those that were looked at, in bytes; 0: one that is missing."""

    leaves: tuple[int, ...] = ()

    def leaf_sizes(self) -> str:
        """The sizes of its leaves, for people."""
        return f"leaves {', '.join(human(leaf) if leaf else 'missing' for leaf in self.leaves)}"

    def texts(self, names: dict[Ino, str]) -> list[str]:
        """What to write on it, the most important first; ``names`` of files, as they are to be shown."""
        inos = {mapping.ino for mapping in self.mappings}
        size, first = human(self.length), self.mappings[0]
        if len(self.mappings) == 1:
            line = f"offset {first.offset:#x}"
        else:
            size = f"{len(self.mappings):,} mappings, {size}"
            line = f"in a range of {human(self.end - self.start)}" if self.length != self.end - self.start else ""
        what = names[first.ino] if len(inos) == 1 else f"{len(inos):,} files"
        leaves = self.leaf_sizes() if self.leaves else ""
        return [text for text in (f"{size} {self.access}", what, line, leaves) if text]

    def tip(self, names: dict[Ino, str]) -> str:
        """Every mapping of it, as far as a tooltip can, and its leaves."""
        lines = [
            f"{span(m.iova, m.length)} ({human(m.length)}, {m.access}): {names[m.ino]}, offset {m.offset:#x}"
            for m in self.mappings
        ]
        return "\n".join([_listed(lines), *([self.leaf_sizes()] if self.leaves else [])])


class Memory(Span):
    """A range of a file; for OTHERS start and end say nothing."""

    runs: tuple[Run, ...] = ()  #: where what is mapped of it is, in the order of the file

    def __init__(self, start: int, end: int, mappings: list[Mapping], ino: Ino) -> None:
        super().__init__(start, end, mappings, ino)
        self.parts = [(start, end)]  #: what is mapped of it

    def joined(self, other: Self) -> Self:
        """With its parts."""
        both = super().joined(other)
        both.parts = self.parts + other.parts
        return both

    def texts(self) -> list[str]:
        """What to write on it, the most important first."""
        size = human(self.length)
        if self.ino == OTHERS:
            return [f"{plural(len(self.mappings), 'mapping')}, {size}"]
        in_parts = "" if self.length == self.end - self.start else " in parts of it"
        return [f"offset {self.start:#x} to {self.end - 1:#x}", size + in_parts]

    def tip(self, names: dict[Ino, str]) -> str:
        """Where it is."""
        if self.ino == OTHERS:
            return f"{names[OTHERS]}: {plural(len(self.mappings), 'mapping')}"
        runs = [
            f"offset {run.offset:#x}: physical {span(run.physical, run.length)} ({human(run.length)})"
            for run in self.runs
        ]
        return f"{names[self.ino]}\n{_listed(runs) or 'not known where'}"


class Band(NamedTuple):
    """A part of a block and the part of memory that it translates to, both from 0 to 1."""

    block: Block
    left: tuple[float, float]
    memory: Memory
    right: tuple[float, float]
    access: str


class Space(NamedTuple):
    """All of the picture."""

    domain: api.Domain
    names: dict[Ino, str]  #: of files, by inode; of OTHERS how many they are
    blocks: list[Block]
    memory: list[Memory]  #: by file, then offset
    bands: list[Band]

    def where(self, band: Band) -> list[Run]:
        """The memory that one mapping, which has a block of its own, translates to."""
        first = band.block.mappings[0]
        return _runs(band.memory.runs, [(first.offset, first.offset + first.length)])

    def colours(self) -> dict[Ino, str]:
        """One for each file, by inode."""
        kept = [ino for ino in dict.fromkeys(part.ino for part in self.memory) if ino != OTHERS]
        return {ino: PALETTE[n % len(PALETTE)] for n, ino in enumerate(kept)} | {OTHERS: GREY}

    def usage(self) -> dict[Ino, int]:
        """What is mapped of each file, in bytes."""
        use: dict[Ino, int] = {}
        for part in self.memory:
            use[part.ino] = use.get(part.ino, 0) + part.length
        return use

    def devices(self) -> str:
        """Those that are attached, in a line."""
        names = [f"{one.device}{' persistent' * bool(one.persistent)}" for one in self.domain.devices]
        more = f" and {len(names) - DEVICES} more" if len(names) > DEVICES else ""
        return f"devices: {', '.join(names[:DEVICES]) or 'none attached'}{more}"

    def notes(self) -> list[str]:
        """What a reader must know to trust the picture."""
        count = sum(len(block.mappings) for block in self.blocks)
        merged = sum(len(block.mappings) for block in self.blocks if len(block.mappings) > 1)
        lines = ["Sizes are drawn by their logarithm; gaps are not to scale."]
        if merged:
            into = sum(len(block.mappings) > 1 for block in self.blocks)
            lines.append(f"{merged:,} of {count:,} mappings are too small to be seen alone: {plural(into, 'block')}.")
        return lines

    def gap(self, start: int, end: int) -> str:
        """What to say about IOVAs that are not mapped."""
        reserved = sum(max(0, min(last + 1, end) - max(first, start)) for first, last in self.domain.reserved)
        free = f"{human(end - start - reserved)} free"
        return f"{free}, {human(reserved)} reserved" if reserved else free

    def summary(self) -> str:
        """The picture in a line."""
        mapped = sum(block.length for block in self.blocks)
        count = sum(len(block.mappings) for block in self.blocks)
        return f"{plural(count, 'mapping')}, {human(mapped)} mapped"


def space(
    domain: api.Domain,
    extents: Callable[[Ino], list[api.Extent]],
    most: int,
) -> Space:
    """The picture of a domain with at most ``most`` blocks of IOVAs, and fewer of memory.

    ``domain``: as `list` tells it; ``extents`` gives those of an inode, in order, or none where they are not known.
    """
    mappings = sorted(
        Mapping(Iova(one.iova), one.length, Ino(one.ino), one.offset, one.access) for one in domain.mappings
    )
    names = {Ino(one.ino): one.file if one.file is not None else f"inode {one.ino}" for one in domain.mappings}
    use: dict[Ino, int] = {}
    for mapping in mappings:
        use[mapping.ino] = use.get(mapping.ino, 0) + mapping.length
    largest = sorted(use, key=lambda ino: -use[ino])
    keep = set(largest if len(largest) <= FILES else largest[: FILES - 1])
    if len(use) > len(keep):
        names[OTHERS] = f"{len(use) - len(keep):,} other files"
    shown = {ino: ino if ino in keep else OTHERS for ino in use}

    blocks = merge([Block(m.iova, m.iova + m.length, [m], shown[m.ino]) for m in mappings], most)
    memory = _memory(mappings, shown, max(FILES + 1, most * 3 // 4))
    known = {
        ino: [Run(one.file_offset, PhysAddr(one.physical), one.length) for one in extents(ino)]
        for ino in sorted({part.ino for part in memory} - {OTHERS})
    }
    for part in memory:
        part.runs = tuple(_runs(known.get(part.ino, []), part.parts))
    return Space(domain, names, blocks, memory, _bands(blocks, memory, shown))


def _memory(mappings: list[Mapping], shown: dict[Ino, Ino], most: int) -> list[Memory]:
    """What is mapped of each file, the files in the order in which the address space comes to them."""
    first: dict[Ino, int] = {}
    for mapping in mappings:
        first.setdefault(shown[mapping.ino], len(first))
    parts: list[Memory] = []
    for mapping in sorted(mappings, key=lambda m: (first[shown[m.ino]], m.offset)):
        ino, end = shown[mapping.ino], mapping.offset + mapping.length
        last = parts[-1] if parts else None
        if last is not None and last.ino == ino and (ino == OTHERS or mapping.offset < last.end):
            last.end = max(last.end, end)
            last.mappings.append(mapping)
            last.length = last.length + mapping.length if ino == OTHERS else last.end - last.start
            last.parts = [(last.start, last.end)]
        else:
            parts.append(Memory(mapping.offset, end, [mapping], ino))
    return merge(parts, most, across_files=False)


def _runs(extents: Sequence[Run], parts: list[tuple[int, int]]) -> list[Run]:
    """Where parts of a file are; both in the order of the file."""
    from pkernfs.fs.runs import joined

    return list(joined(_pieces(extents, parts), _goes_on))


def _goes_on(one: Run, other: Run) -> Run | None:
    """Both as one run, when the second goes on where the first ends, in the file and in memory."""
    if (other.offset, other.physical) == (one.offset + one.length, one.physical + one.length):
        return one._replace(length=one.length + other.length)
    return None


def _pieces(extents: Sequence[Run], parts: list[tuple[int, int]]) -> Iterator[Run]:
    at = 0
    for start, end in parts:
        while at < len(extents) and extents[at].offset + extents[at].length <= start:
            at += 1
        n = at
        while n < len(extents) and extents[n].offset < end:
            extent = extents[n]
            first, last = max(extent.offset, start), min(extent.offset + extent.length, end)
            yield Run(first, PhysAddr(extent.physical + first - extent.offset), last - first)
            n += 1


def _bands(blocks: list[Block], memory: list[Memory], shown: dict[Ino, Ino]) -> list[Band]:
    """One for each block and each memory that something in it translates to."""
    by_file: dict[Ino, list[Memory]] = {}
    for part in memory:
        by_file.setdefault(part.ino, []).append(part)
    starts = {ino: [part.start for part in parts] for ino, parts in by_file.items()}
    bands = []
    for block in blocks:
        found: dict[int, tuple[Memory, list[Mapping]]] = {}
        for mapping in block.mappings:
            ino = shown[mapping.ino]
            at = 0 if ino == OTHERS else bisect_right(starts[ino], mapping.offset) - 1
            part = by_file[ino][at]
            found.setdefault(id(part), (part, []))[1].append(mapping)
        done = 0
        for part, some in found.values():
            length = sum(mapping.length for mapping in some)
            left = (done / block.length, (done + length) / block.length)
            done += length
            size = part.end - part.start
            first = min(mapping.offset for mapping in some) - part.start
            last = max(mapping.offset + mapping.length for mapping in some) - part.start
            right = (0.0, 1.0) if part.ino == OTHERS else (first / size, last / size)
            access = {mapping.access for mapping in some}
            bands.append(Band(block, left, part, right, access.pop() if len(access) == 1 else "mixed"))
    return bands


def short(name: str, room: int) -> str:
    """The end of a name that is too long, as the part that tells files apart."""
    return name if len(name) <= room else f"…{name[len(name) - room + 1 :]}"
