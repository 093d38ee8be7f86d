"""An address space as SVG: on the left IOVAs, on the right the memory of files, and bands from one to the other.

One file without scripts, fonts or links; its colours suit light and dark pages.  Low addresses are at the top.
"""

from __future__ import annotations

import math
from xml.etree import ElementTree as xml

from pkernfs.cli.iommu.ask import about
from pkernfs.cli.iommu.picture.merge import OTHERS, Span
from pkernfs.cli.iommu.picture.space import GREY, Band, Block, Memory, Space, short
from pkernfs.cli.text import human, plural, printable, span
from pkernfs.format import PAGE

STYLE = """
text { font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #24292f }
.page { fill: #ffffff } .title { font-size: 17px; font-weight: bold } .dim { fill: #5b6570 } .on { fill: #10151b }
.small { font-size: 11px } .right { text-anchor: end } .middle { text-anchor: middle } .head { font-weight: bold }
.line { stroke: #8a939d; fill: none } .band { fill-opacity: .38 } .band:hover { fill-opacity: .7 }
.box { stroke: #4a525b; stroke-width: 1 } .run { stroke: #10151b; stroke-opacity: .45; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #dfe5ec } .page { fill: #14181e } .dim { fill: #98a3af } .on { fill: #10151b } .line { stroke: #6b7580 }
}
"""
WIDTH = 1180
LABEL, LEFT, RIGHT = 170, 180, 700  #: x of the addresses' ends, of the IOVAs and of the memory
COLUMN = 280  #: width of both columns
LINE = 16  #: height of a line of text
MANY = 16  #: more blocks than this are drawn smaller
HEAD = 26  #: height of a file's name above its memory
CHAR = 7.25  #: width of a letter
LEGEND = 120  #: letters of a name in the legend
LISTED = 20  #: mappings, or runs, that a tooltip lists


def svg(space: Space) -> str:
    """The picture as the text of an SVG file."""
    return _Drawing(space).text()


class _Drawing:
    def __init__(self, space: Space) -> None:
        self.space = space
        self.colours = space.colours()
        room = int((COLUMN - 16) / CHAR)
        self.names = {ino: short(printable(name), room) for ino, name in space.names.items()}
        self.top: dict[int, tuple[float, float]] = {}  #: id of a span -> its top and height
        self.root = xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        self.parent = self.root
        self.gap = 30 if max(len(space.blocks), len(space.memory)) <= MANY else 22  #: height of a break

    def text(self) -> str:
        """Draw all of it."""
        name = printable(self.space.domain["name"] or "without a name")
        self._add("title", text=f"Address space of the IOMMU domain {name}")
        self._add("desc", text=f"{self.space.summary()}. {' '.join(self.space.notes())}")
        self._add("style", text=STYLE)
        self._patterns()
        page = self._add("rect", {"class": "page", "x": 0, "y": 0})
        y = self._head(name)
        crowd = len(self.space.bands) > 8 * MANY
        bands = self._add("g", {"opacity": ".5"} if crowd else None)  # below everything else
        bottom = max(self._blocks(y), self._memory(y))
        self.parent = bands
        for band in self.space.bands:
            self._band(band)
        self.parent = self.root
        height = math.ceil(self._legend(bottom + 34) + 12)
        for element, keys in ((self.root, ("width", "height")), (page, ("width", "height"))):
            for key, value in zip(keys, (WIDTH, height), strict=True):
                element.set(key, str(value))
        self.root.set("viewBox", f"0 0 {WIDTH} {height}")
        xml.indent(self.root, " ")
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(self.root, encoding="unicode") + "\n"

    def _add(self, tag: str, attributes: dict[str, object] | None = None, text: str | None = None) -> xml.Element:
        shown = {
            key: f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
            for key, value in (attributes or {}).items()
        }
        element = xml.SubElement(self.parent, tag, shown)
        element.text = text
        return element

    def _write(self, x: float, y: float, kind: str, text: str) -> None:
        self._add("text", {"x": x, "y": y, "class": kind}, text)

    def _tip(self, element: xml.Element, text: str) -> None:
        xml.SubElement(element, "title").text = text

    def _patterns(self) -> None:
        """Stripes over what is not read and written: up for read only, down for write only."""
        keep, self.parent = self.parent, self._add("defs")
        for name, path in (
            ("ro", "M-2,2 l4,-4 M0,10 l10,-10 M8,12 l4,-4"),
            ("wo", "M-2,8 l4,4 M0,0 l10,10 M8,-2 l4,4"),
        ):
            pattern = self._add("pattern", {"id": name, "width": 10, "height": 10, "patternUnits": "userSpaceOnUse"})
            xml.SubElement(
                pattern, "path", {"d": path, "stroke": "#ffffff", "stroke-opacity": ".45", "stroke-width": "3"}
            )
        self.parent = keep

    def _head(self, name: str) -> float:
        domain = self.space.domain
        self._write(20, 32, "title", f"{name}: IOMMU address space")
        self._write(20, 54, "dim", f"{about(domain)}; {self.space.summary()}")
        self._write(20, 72, "dim", self.space.devices())
        self._write(LEFT, 104, "head", "IOVA: what the device addresses")
        self._write(RIGHT, 104, "head", "memory of files")
        self._write(RIGHT + COLUMN + 10, 104, "dim", "physical")
        return 116

    def _height(self, length: int, most: int) -> float:
        """Of a block: by the logarithm of its length, less where there are many."""
        least, step = (2 * LINE + 8, 5.0) if most <= MANY // 2 else (2 * LINE + 8, 2.5) if most <= MANY else (24, 1.0)
        return least + step * math.log2(max(length, PAGE) / PAGE)

    def _box(self, span: Span, x: float, y: float, height: float, tip: str) -> None:
        self.top[id(span)] = (y, height)
        where = {"x": x, "y": y, "width": COLUMN, "height": height, "rx": 3}
        group = self._add("g")
        keep, self.parent = self.parent, group
        self._tip(group, tip)
        self._add("rect", {**where, "class": "box", "fill": self.colours.get(span.ino, GREY)})
        if span.access in ("ro", "wo"):
            self._add("rect", {**where, "fill": f"url(#{span.access})"})
        self.parent = keep

    def _break(self, x: float, y: float, text: str) -> None:
        """Two jagged lines with what they leave out."""
        inset = self.gap / 4
        for line in (y + inset, y + self.gap - inset):
            points = (f"{x + n * COLUMN / 28:.1f},{line + 2.5 * (-1) ** n:.1f}" for n in range(29))
            self._add("polyline", {"points": " ".join(points), "class": "line", "stroke-opacity": ".55"})
        width = len(text) * 6.7 + 10
        where = {"x": x + (COLUMN - width) / 2, "y": y + 2, "width": width, "height": self.gap - 4}
        self._add("rect", {**where, "class": "page"})
        self._write(x + COLUMN / 2, y + self.gap / 2 + 4, "small dim middle", text)

    def _blocks(self, y: float) -> float:
        """The left column; where it ends."""
        at = 0
        if not self.space.blocks or self.space.blocks[0].start:
            self._write(LABEL, y + 8, "right dim", "0x0")
        for block in self.space.blocks:
            if block.start > at:
                self._break(LEFT, y, self.space.gap(at, block.start))
                y += self.gap
            if block.start > at or at == 0:
                self._write(LABEL, y + 8, "right", f"{block.start:#x}")
            height = self._height(block.length, len(self.space.blocks))
            self._box(block, LEFT, y, height, _block_tip(block, self.space.names))
            self._lines(LEFT, y, height, block.texts(self.names))
            y += height
            at = block.end
            self._write(LABEL, y + 4, "right", f"{at:#x}")
        aperture = self.space.domain["aperture"]
        if at < aperture:
            self._break(LEFT, y, self.space.gap(at, aperture))
            y += self.gap
            self._write(LABEL, y + 4, "right dim", f"{aperture:#x}")
        return y

    def _lines(self, x: float, y: float, height: float, lines: list[str]) -> None:
        """As many lines as there is room for, the last taking what would not fit."""
        rows = max(1, min(len(lines), int((height - 6) // LINE)))
        room = int((COLUMN - 16) / CHAR)
        rest = lines[rows - 1 :]
        while len(" · ".join(rest)) > room and len(rest) > 1:
            rest.pop()
        shown = [*lines[: rows - 1], " · ".join(rest)]
        first = y + height / 2 - (len(shown) - 1) * LINE / 2 + 4
        for n, line in enumerate(shown):
            self._write(x + 8, first + n * LINE, "on", line)

    def _memory(self, y: float) -> float:
        """The right column; where it ends."""
        last: Memory | None = None
        for part in self.space.memory:
            if last is None or last.ino != part.ino:
                y += 10 if last is not None else 0
                self._write(RIGHT, y + 15, "head", self.names[part.ino])
                y += HEAD
            elif part.start > last.end:
                self._break(RIGHT, y, f"{human(part.start - last.end)} not mapped")
                y += self.gap
            height = self._height(part.length, len(self.space.memory))
            self._box(part, RIGHT, y, height, _memory_tip(part, self.space.names))
            self._lines(RIGHT, y, height, _memory_lines(part))
            self._physical(part, y, height)
            y += height
            last = part
        return y

    def _physical(self, part: Memory, y: float, height: float) -> None:
        """Where each run begins, beside it; of runs that are too thin only how many they are."""
        x = RIGHT + COLUMN + 10
        size = part.end - part.start
        if not part.runs:
            return
        tops = [y + height * (run.offset - part.start) / size for run in part.runs]
        ends = [*tops[1:], y + height]
        if len(part.runs) > 1 and min(end - top for top, end in zip(tops, ends, strict=True)) < 14:
            self._write(x, y + 12, "", f"{part.runs[0].physical:#x}")
            if height >= 30:
                self._write(x, y + 12 + LINE, "small dim", f"… {plural(len(part.runs), 'piece')}")
            return
        for run, top in zip(part.runs, tops, strict=True):
            self._write(x, top + 12, "", f"{run.physical:#x}")
            if top > y:
                self._add("line", {"x1": RIGHT, "x2": RIGHT + COLUMN, "y1": top, "y2": top, "class": "run"})

    def _band(self, band: Band) -> None:
        (y1, height1), (y2, height2) = self.top[id(band.block)], self.top[id(band.memory)]
        a, b = (y1 + height1 * part for part in band.left)
        c, d = (y2 + height2 * part for part in band.right)
        b, d = max(b, a + 1.5), max(d, c + 1.5)
        x1, x2 = LEFT + COLUMN, RIGHT
        middle = (x1 + x2) / 2
        path = (
            f"M{x1},{a:.1f} C{middle:.0f},{a:.1f} {middle:.0f},{c:.1f} {x2},{c:.1f} "
            f"L{x2},{d:.1f} C{middle:.0f},{d:.1f} {middle:.0f},{b:.1f} {x1},{b:.1f} Z"
        )
        shape = self._add("path", {"d": path, "class": "band", "fill": self.colours[band.memory.ino]})
        name = printable(self.space.names[band.memory.ino])
        self._tip(shape, f"{span(band.block.start, band.block.end - band.block.start)} → {name}, {band.access}")

    def _legend(self, y: float) -> float:
        """Files by colour, stripes, and what must be known; where it ends."""
        use = self.space.usage()
        x = 20.0
        entries = [
            (self.colours[ino], "", f"{short(printable(self.space.names[ino]), LEGEND)}, {human(size)}")
            for ino, size in use.items()
        ]
        accesses = {block.access for block in self.space.blocks}
        entries += [(GREY, access, text) for access, text in (("ro", "read only"), ("wo", "write only"))
                    if access in accesses]  # fmt: skip
        if any(block.ino == OTHERS for block in self.space.blocks) and OTHERS not in use:
            entries.append((GREY, "", "of several files"))
        for colour, pattern, label in entries:
            width = 34 + len(label) * CHAR
            if x > 20 and x + width > WIDTH - 20:
                x, y = 20.0, y + 22
            where = {"x": x, "y": y - 11, "width": 14, "height": 14, "rx": 2}
            self._add("rect", {**where, "class": "box", "fill": colour})
            if pattern:
                self._add("rect", {**where, "fill": f"url(#{pattern})"})
            self._write(x + 20, y, "", label)
            x += width + 12
        y += 26
        for note in self.space.notes():
            self._write(20, y, "dim small", note)
            y += LINE
        return y


def _memory_lines(part: Memory) -> list[str]:
    if part.ino == OTHERS:
        return [f"{plural(len(part.mappings), 'mapping')}, {human(part.length)}"]
    size = human(part.length) if part.length == part.end - part.start else f"{human(part.length)} in parts of it"
    return [f"offset {part.start:#x} to {part.end - 1:#x}", size]


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
    return "\n".join([*lines[:LISTED], *more])


def _block_tip(block: Block, names: dict[int, str]) -> str:
    """Every mapping of a block, as far as a tooltip can, and its leaves."""
    lines = [
        f"{span(m.iova, m.length)} ({human(m.length)}, {m.access}): {printable(names[m.ino])}, offset {m.offset:#x}"
        for m in block.mappings
    ]
    return "\n".join([_listed(lines), *([block.leaf_sizes()] if block.leaves else [])])


def _memory_tip(part: Memory, names: dict[int, str]) -> str:
    """Where a part of a file is."""
    if part.ino == OTHERS:
        return f"{printable(names[OTHERS])}: {plural(len(part.mappings), 'mapping')}"
    runs = [
        f"offset {run.offset:#x}: physical {span(run.physical, run.length)} ({human(run.length)})" for run in part.runs
    ]
    return f"{printable(names[part.ino])}\n{_listed(runs) or 'not known where'}"
