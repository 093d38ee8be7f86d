"""How things are printed: for people, or one JSON object for programs."""

import argparse
import json
from collections.abc import Iterable, Sequence

from pkernfs.errors import printable as printable  # noqa: PLC0414  # what all of it comes by


def show(arguments: argparse.Namespace, facts: object, lines: Iterable[str]) -> None:
    """The facts with --json (a reply of api.py, or made of dicts and lists), else the lines."""
    print(as_json(facts) if arguments.json else "\n".join(lines))


def as_json(facts: object, indent: int | None = 2) -> str:
    """The facts as --json prints them."""
    from pkernfs.api import to_builtins

    return json.dumps(to_builtins(facts), indent=indent)


def human(count: int) -> str:
    """A size for people: 1.5 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def memory_line(memory: int | None, host_free: int | None) -> str:
    """How much memory a region has, and how much more it can get."""
    if memory is None:
        return "all of it is there"
    return f"{human(memory)} so far" + ("" if host_free is None else f", the host has {human(host_free)} more")


def duration(length: float) -> str:
    """A length of time for people: 350 ms, 12 s, 3 h 20 min."""
    if length < 1:
        return f"{length * 1000:.1f} ms"
    for unit, size, name, below in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if length >= unit:
            return f"{length // unit:.0f} {name} {length % unit // size:.0f} {below}"
    return f"{length:.0f} s"


def span(iova: int, length: int) -> str:
    """A range of addresses, first to last."""
    return f"{iova:#x} to {iova + length - 1:#x}"


def plural(count: int, what: str) -> str:
    """3 mappings, 1 mapping."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Rows with aligned columns under a head."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
