"""The page pkernfs(5): the format of a region, from the one reference of it, pkernfs/format.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from argparse_manpage.compat import get_reproducible_date

from pkernfs import __version__, format
from pkernfs.cli.manual import roff
from pkernfs.cli.manual.commands import tidy, written
from pkernfs.layout import Layout

NUMBERS = (
    ("Features that allow reading only where they are not known", format.RO_COMPAT_NAMES),
    ("Kinds of blocks", format.BLOCK_KINDS),
    ("Kinds of pages", format.PAGE_KINDS),
    ("Flags of inodes", format.FLAG_NAMES),
    ("Access of mappings", format.ACCESS_NAMES),
)


def page() -> str:
    """The page, complete."""
    date, prose = get_reproducible_date(), inspect.getdoc(format) or ""
    lines = [
        f'.TH PKERNFS "5" "{date}" "pkernfs {__version__}" "pkernfs"',
        *(".SH NAME", r"pkernfs \- format of a region"),
        *(".SH DESCRIPTION", *roff.prose(prose.partition("\n")[2])),
        *(".SH RECORDS", *roff.prose("Offsets and sizes are in bytes; u8 to u64 are unsigned, i32 and i64 signed.")),
    ]
    for layout in vars(format).values():
        if isinstance(layout, Layout):
            lines += _record(layout)
    lines += [".SH NUMBERS", ".SS Constants", *_constants()]
    for heading, names in NUMBERS:
        lines += [f".SS {heading}", *_numbers(names)]
    lines.append(".SH FUNCTIONS")
    for function in vars(format).values():
        if isinstance(function, FunctionType) and function.__module__ == format.__name__:
            lines += [f".SS {roff.escape(function.__name__)}", *roff.prose(inspect.getdoc(function) or "")]
    for heading, text in written("pkernfs.5").items():
        lines += [f".SH {heading}", *roff.prose(text)]
    return tidy("\n".join(lines))


def _record(layout: Layout[Any]) -> Iterator[str]:
    """One record: what its class says, and each field with its offset and type."""
    source = inspect.getsource(layout.record)
    fields = dict(re.findall(r"^    (\w+): (.*)$", source, re.MULTILINE))
    yield f".SS {layout.record.__name__}, {layout.size} bytes"
    yield from roff.prose(inspect.getdoc(layout.record) or "")
    for name, offset in layout.offsets.items():
        kind, _, meaning = fields[name].partition("  #: ")
        if not name.startswith("reserved"):
            yield from _row(rf"{offset:<4} {kind.partition(' ')[0]:8} {roff.bold(name)}", meaning)


def _row(term: str, meaning: str) -> list[str]:
    """An item of a list with a wide first column, whose spaces stay."""
    _, head, *text = roff.item(term.replace(" ", r"\ "), meaning)
    return [".TP 32", head, *(text or [r"\&"])]


def _constants() -> Iterator[str]:
    """Numbers that the text names, in the order of the format."""
    comments = dict(re.findall(r"^(\w+): Final = .*#: (.*)$", inspect.getsource(format), re.MULTILINE))
    for name, value in vars(format).items():
        if name.isupper() and isinstance(value, int):
            shown = f"{value:#x}" if value > 1 << 16 else str(value)
            yield from _row(f"{roff.bold(name)}", ": ".join([shown, *([comments[name]] if name in comments else [])]))


def _numbers(names: Mapping[int, str]) -> Iterator[str]:
    for number, name in names.items():
        yield from _row(roff.bold(str(number)), name)
