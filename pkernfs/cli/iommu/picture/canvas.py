"""An SVG file: one without scripts, fonts or links, whose colours suit light and dark pages."""

from __future__ import annotations

from xml.etree import ElementTree as xml

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
#: Stripes over what is not both read and written: up for read only, down for write only.
STRIPES = {"ro": "M-2,2 l4,-4 M0,10 l10,-10 M8,12 l4,-4", "wo": "M-2,8 l4,4 M0,0 l10,10 M8,-2 l4,4"}

Value = str | float


class Canvas:
    """Shapes in the order in which they are drawn; those of ``below`` come before all others."""

    def __init__(self, title: str, description: str) -> None:
        self._root = xml.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        for tag, text in (("title", title), ("desc", description), ("style", STYLE)):
            xml.SubElement(self._root, tag).text = text
        defs = self.add("defs")
        for name, path in STRIPES.items():
            stripes = self.add("pattern", defs, id=name, width=10, height=10, patternUnits="userSpaceOnUse")
            self.add("path", stripes, d=path, stroke="#ffffff", stroke_opacity=".45", stroke_width=3)
        self._page = self.add("rect", kind="page", x=0, y=0)
        self.below = self.add("g")

    def add(self, tag: str, parent: xml.Element | None = None, kind: str = "", **values: Value) -> xml.Element:
        """A shape of a class ``kind``; "_" in the name of a value stands for "-"."""
        shown = {"class": kind} if kind else {}
        for key, value in values.items():
            shown[key.replace("_", "-")] = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        return xml.SubElement(self._root if parent is None else parent, tag, shown)

    def write(self, x: float, y: float, kind: str, text: str) -> None:
        """A line of text."""
        self.add("text", kind=kind, x=x, y=y).text = text

    def tip(self, shape: xml.Element, text: str) -> None:
        """What a browser shows of a shape that is pointed at."""
        xml.SubElement(shape, "title").text = text

    def box(self, tip: str, fill: str, access: str, **values: Value) -> None:
        """A rectangle with stripes if it is not for reading and writing."""
        group = self.add("g") if tip else None
        if group is not None:
            self.tip(group, tip)
        self.add("rect", group, kind="box", fill=fill, **values)
        if access in STRIPES:
            self.add("rect", group, "", fill=f"url(#{access})", **values)

    def text(self, width: int, height: int) -> str:
        """The file."""
        for element in (self._root, self._page):
            element.set("width", str(width))
            element.set("height", str(height))
        self._root.set("viewBox", f"0 0 {width} {height}")
        xml.indent(self._root, " ")
        return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(self._root, encoding="unicode") + "\n"
