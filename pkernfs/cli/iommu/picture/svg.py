"""An address space as SVG: on the left IOVAs, on the right the memory of files, and bands from one to the other.

Low addresses are at the top.  Tried instead: the picture of the terminal through rich's Console(record=True).export_svg
(rich 15).  It is a screenshot: it has no bands to the memory, and no tooltips, so that of mappings which share a block
nothing is left; 10,000 mappings make it 5,857 pixels high; its text depends on a font that is fetched from a CDN; and
its window is dark on every page.  It would do if the picture were a list.
"""

from __future__ import annotations

import math

from pkernfs.cli.iommu.picture.canvas import Canvas
from pkernfs.cli.iommu.picture.merge import OTHERS
from pkernfs.cli.iommu.picture.space import GREY, Band, Block, Memory, Space, short
from pkernfs.cli.iommu.replies import about
from pkernfs.cli.text import human, plural, span
from pkernfs.errors import printable
from pkernfs.format import PAGE

WIDTH = 1180
LABEL, LEFT, RIGHT = 170, 180, 700  #: x of the addresses' ends, of the IOVAs and of the memory
COLUMN = 280  #: width of both columns
LINE = 16  #: height of a line of text
MANY = 16  #: more blocks than this are drawn smaller
HEAD = 26  #: height of a file's name, which stands over its memory
CHAR = 7.25  #: width of a letter
LEGEND = 120  #: letters of a name in the legend


def svg(space: Space) -> str:
    """The picture as the text of an SVG file."""
    return _Drawing(space).text()


class _Drawing:
    def __init__(self, space: Space) -> None:
        self.space = space
        self.colours = space.colours()
        self.full = {ino: printable(name) for ino, name in space.names.items()}
        room = int((COLUMN - 16) / CHAR)
        self.names = {ino: short(name, room) for ino, name in self.full.items()}
        self.title = printable(space.domain.name or "without a name")
        self.canvas = Canvas(
            f"Address space of the IOMMU domain {self.title}", f"{space.summary()}. {' '.join(space.notes())}"
        )
        self.top: dict[int, tuple[float, float]] = {}  #: id of a block or memory -> its top and height
        self.gap = 30 if max(len(space.blocks), len(space.memory)) <= MANY else 22  #: height of a break

    def text(self) -> str:
        """Draw all of it."""
        y = self._head()
        bottom = max(self._blocks(y), self._memory(y))
        if len(self.space.bands) > 8 * MANY:
            self.canvas.below.set("opacity", ".5")
        for band in self.space.bands:
            self._band(band)
        return self.canvas.text(WIDTH, math.ceil(self._legend(bottom + 34) + 12))

    def _head(self) -> float:
        write = self.canvas.write
        write(20, 32, "title", f"{self.title}: IOMMU address space")
        write(20, 54, "dim", f"{about(self.space.domain)}; {self.space.summary()}")
        write(20, 72, "dim", self.space.devices())
        write(LEFT, 104, "head", "IOVA: what the device addresses")
        write(RIGHT, 104, "head", "memory of files")
        write(RIGHT + COLUMN + 10, 104, "dim", "physical")
        return 116

    def _box(self, shown: Block | Memory, x: float, y: float, most: int, lines: list[str]) -> float:
        """A block of one of ``most`` with its text; its height, by the logarithm of its length."""
        least, step = (24, 1.0) if most > MANY else (2 * LINE + 8, 2.5 if most > MANY // 2 else 5.0)
        height = least + step * math.log2(max(shown.length, PAGE) / PAGE)
        self.top[id(shown)] = (y, height)
        where = {"x": x, "y": y, "width": COLUMN, "height": height, "rx": 3}
        self.canvas.box(shown.tip(self.full), self.colours.get(shown.ino, GREY), shown.access, **where)
        self._lines(x, y, height, lines)
        return height

    def _lines(self, x: float, y: float, height: float, lines: list[str]) -> None:
        """As many lines as there is room for, the last taking what would not fit."""
        rows = max(1, min(len(lines), int((height - 6) // LINE)))
        rest = lines[rows - 1 :]
        while len(" · ".join(rest)) > int((COLUMN - 16) / CHAR) and len(rest) > 1:
            rest.pop()
        shown = [*lines[: rows - 1], " · ".join(rest)]
        first = y + height / 2 - (len(shown) - 1) * LINE / 2 + 4
        for n, line in enumerate(shown):
            self.canvas.write(x + 8, first + n * LINE, "on", line)

    def _break(self, x: float, y: float, text: str) -> float:
        """Two jagged lines with what they leave out; where they end."""
        inset = self.gap / 4
        for line in (y + inset, y + self.gap - inset):
            points = " ".join(f"{x + n * COLUMN / 28:.1f},{line + 2.5 * (-1) ** n:.1f}" for n in range(29))
            self.canvas.add("polyline", kind="line", points=points, stroke_opacity=".55")
        width = len(text) * 6.7 + 10
        self.canvas.add("rect", kind="page", x=x + (COLUMN - width) / 2, y=y + 2, width=width, height=self.gap - 4)
        self.canvas.write(x + COLUMN / 2, y + self.gap / 2 + 4, "small dim middle", text)
        return y + self.gap

    def _blocks(self, y: float) -> float:
        """The left column; where it ends."""
        write, blocks = self.canvas.write, self.space.blocks
        at, aperture = 0, self.space.domain.aperture
        if not blocks or blocks[0].start:
            write(LABEL, y + 8, "right dim", "0x0")
        for n, block in enumerate(blocks):
            if block.start > at:
                y = self._break(LEFT, y, self.space.gap(at, block.start))
            if block.start > at or n == 0:
                write(LABEL, y + 8, "right", f"{block.start:#x}")
            y += self._box(block, LEFT, y, len(blocks), block.texts(self.names))
            at = block.end
            write(LABEL, y + 4, "right", f"{at:#x}")
        if at < aperture:
            y = self._break(LEFT, y, self.space.gap(at, aperture))
            write(LABEL, y + 4, "right dim", f"{aperture:#x}")
        return y

    def _memory(self, y: float) -> float:
        """The right column; where it ends."""
        last: Memory | None = None
        for part in self.space.memory:
            if last is None or last.ino != part.ino:
                y += 10 if last is not None else 0
                self.canvas.write(RIGHT, y + 15, "head", self.names[part.ino])
                y += HEAD
            elif part.start > last.end:
                y = self._break(RIGHT, y, f"{human(part.start - last.end)} not mapped")
            height = self._box(part, RIGHT, y, len(self.space.memory), part.texts())
            self._physical(part, y, height)
            y += height
            last = part
        return y

    def _physical(self, part: Memory, y: float, height: float) -> None:
        """Where each run begins, beside it; of runs that are too thin only how many they are."""
        x, runs = RIGHT + COLUMN + 10, part.runs
        tops = [y + height * (run.offset - part.start) / (part.end - part.start) for run in runs]
        if len(runs) > 1 and min(b - a for a, b in zip(tops, [*tops[1:], y + height], strict=True)) < 14:
            if height >= 30:
                self.canvas.write(x, y + 12 + LINE, "small dim", f"… {plural(len(runs), 'piece')}")
            runs = runs[:1]
        for run, top in zip(runs, tops, strict=False):
            self.canvas.write(x, top + 12, "", f"{run.physical:#x}")
            if top > y:
                self.canvas.add("line", kind="run", x1=RIGHT, x2=RIGHT + COLUMN, y1=top, y2=top)

    def _band(self, band: Band) -> None:
        (y1, height1), (y2, height2) = self.top[id(band.block)], self.top[id(band.memory)]
        a, b = (y1 + height1 * part for part in band.left)
        c, d = (y2 + height2 * part for part in band.right)
        b, d = max(b, a + 1.5), max(d, c + 1.5)
        x1, x2 = LEFT + COLUMN, RIGHT
        middle = (x1 + x2) // 2
        path = (
            f"M{x1},{a:.1f} C{middle},{a:.1f} {middle},{c:.1f} {x2},{c:.1f} "
            f"L{x2},{d:.1f} C{middle},{d:.1f} {middle},{b:.1f} {x1},{b:.1f} Z"
        )
        shape = self.canvas.add("path", self.canvas.below, "band", d=path, fill=self.colours[band.memory.ino])
        where = span(band.block.start, band.block.end - band.block.start)
        self.canvas.tip(shape, f"{where} → {self.full[band.memory.ino]}, {band.access}")

    def _legend(self, y: float) -> float:
        """Files by colour, stripes, and what must be known; where it ends."""
        use = self.space.usage()
        entries = [
            (self.colours[ino], "", f"{short(self.full[ino], LEGEND)}, {human(size)}") for ino, size in use.items()
        ]
        accesses = {block.access for block in self.space.blocks}
        meanings = {"ro": "read only", "wo": "write only"}
        entries += [(GREY, access, text) for access, text in meanings.items() if access in accesses]
        if any(block.ino == OTHERS for block in self.space.blocks) and OTHERS not in use:
            entries.append((GREY, "", "of several files"))
        x = 20.0
        for colour, access, label in entries:
            width = 34 + len(label) * CHAR
            if x > 20 and x + width > WIDTH - 20:
                x, y = 20.0, y + 22
            self.canvas.box("", colour, access, x=x, y=y - 11, width=14, height=14, rx=2)
            self.canvas.write(x + 20, y, "", label)
            x += width + 12
        y += 26
        for note in self.space.notes():
            self.canvas.write(20, y, "dim small", note)
            y += LINE
        return y
