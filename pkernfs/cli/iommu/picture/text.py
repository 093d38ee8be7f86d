"""An address space as lines of text, low addresses first: a block for what is mapped, a break for what is not."""

from __future__ import annotations

import math
from typing import NamedTuple

from pkernfs.cli.iommu.picture.merge import OTHERS
from pkernfs.cli.iommu.picture.space import Block, Space, short
from pkernfs.cli.iommu.replies import about
from pkernfs.cli.text import human, plural
from pkernfs.errors import printable
from pkernfs.format import PAGE, Ino

WIDTH = 16  #: of a block, in characters
NAME = 48  #: of a file's name


class Piece(NamedTuple):
    """Part of a line; ``ino``: of the file whose colour it has, None: none."""

    text: str
    ino: Ino | None = None


class Marks(NamedTuple):
    """What lines are drawn with.  ``fills``: for one file after the other; the last for several files together."""

    top: str
    between: str
    bottom: str
    side: str
    free: str
    fills: str


UNICODE = Marks("┌─┐", "├─┤", "└─┘", "│", "╎", "█▓▒░▞▚◆●■○□◇·")
#: For a terminal with colours, which tell files apart.
COLOURS = UNICODE._replace(fills="█" * len(UNICODE.fills))
ASCII = Marks("+-+", "+-+", "+-+", "|", ":", "#=%*o+x@$&~^.")


def picture(space: Space, marks: Marks) -> list[list[Piece]]:
    """The lines of the picture."""
    domain = space.domain
    fills = {ino: marks.fills[n % (len(marks.fills) - 1)] for n, ino in enumerate(space.usage()) if ino != OTHERS}
    fills[OTHERS] = marks.fills[-1]
    lines = [
        [Piece(f"{printable(domain.name or '(no name)')}: {about(domain)}; {space.summary()}")],
        [Piece(space.devices())],
        [],
    ]
    width = max(len(f"{domain.aperture:#x}"), *(len(f"{block.end:#x}") for block in space.blocks), 0)

    def edge(address: int, kind: str) -> list[Piece]:
        return [Piece(f"{address:#x}".rjust(width) + f" {kind[0]}{kind[1] * WIDTH}{kind[2]}")]

    at = 0
    started = False
    for block in space.blocks:
        if block.start > at or not started:
            if block.start > at:
                lines += [] if started else [edge(at, marks.top)]
                lines.append(_free(space, at, block.start, width, marks))
            lines.append(edge(block.start, marks.between if started or block.start > at else marks.top))
        lines += _block(space, block, width, marks, fills)
        at, started = block.end, True
        last = at == domain.aperture
        lines.append(edge(at, marks.bottom if last else marks.between))
    if at < domain.aperture:
        lines += [] if started else [edge(0, marks.top)]
        lines += [_free(space, at, domain.aperture, width, marks), edge(domain.aperture, marks.bottom)]
    lines.append([])
    for ino, size in space.usage().items():
        lines.append([Piece(fills[ino] * 2, ino), Piece(f" {printable(space.names[ino])}, {human(size)}")])
    return [*lines, *([Piece(note)] for note in space.notes())]


def _free(space: Space, start: int, end: int, width: int, marks: Marks) -> list[Piece]:
    return [Piece(f"{'':{width}} {marks.free}{'':{WIDTH}}{marks.free} {space.gap(start, end)}")]


def _block(space: Space, block: Block, width: int, marks: Marks, fills: dict[Ino, str]) -> list[list[Piece]]:
    names = {ino: short(printable(name), NAME) for ino, name in space.names.items()}
    texts = block.texts(names)
    # What it is, where in the file, how it is mapped; and where in memory.
    notes = ["  ".join(texts[:3]), "  ".join([*texts[3:], *_physical(space, block)])]
    notes = [note for note in notes if note]
    rows = max(len(notes), 1 + round(math.log2(max(block.length, PAGE) / PAGE) / 8))
    fill = fills.get(block.ino, fills[OTHERS])
    return [
        [
            Piece(f"{'':{width}} {marks.side}"),
            Piece(fill * WIDTH, block.ino),
            Piece(f"{marks.side} {notes[row] if row < len(notes) else ''}".rstrip()),
        ]
        for row in range(rows)
    ]


def _physical(space: Space, block: Block) -> list[str]:
    """Where the memory of a mapping is, if the block is one."""
    band = next((band for band in space.bands if band.block is block), None)
    runs = space.where(band) if band is not None and len(block.mappings) == 1 else []
    if not runs:
        return []
    pieces = f" in {plural(len(runs), 'piece')}" if len(runs) > 1 else ""
    return [f"physical {runs[0].physical:#x}{pieces}"]
