"""pkernfs iommu walk: one translation, step by step."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pkernfs.cli.iommu.arguments import UNITS, address, device
from pkernfs.cli.iommu.source import file_name, source
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human, show, table
from pkernfs.errors import UsageError, printable

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.format import Iova

WALK = """\
Follow the tables as hardware would, and print each entry on the way: where it is, what it holds, what that means; then
the physical address, or why the access faults.

  pkernfs iommu walk /mnt/pkernfs 00:05.0 0x100000000       as the device sees it
  pkernfs iommu walk 00:05.0 0x100000000                    when one pkernfs is mounted
  pkernfs iommu walk /mnt/pkernfs/iommu/dom-0 4G            from the domain's own tables
  pkernfs iommu walk /dev/shm/pkernfs.img 00:05.0 4G        without a mount
  pkernfs iommu walk /dev/shm/pkernfs.img:/iommu/dom-0 4G

exit status:
  0  it translates to memory          1  it faults, or an error          2  wrong usage
"""


def _walk_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--json] [MOUNT|REGION] DEVICE IOVA\n       {parser.prog} [--json] DOMAIN IOVA"
    parser.add_argument("where", metavar="DEVICE|DOMAIN", nargs="+", help="after MOUNT or REGION, or a domain's path")
    parser.add_argument("iova", metavar="IOVA", type=address, help="the address that is translated")
    add_json(parser, UNITS)


def _walk(arguments: argparse.Namespace) -> int:
    result = _find(arguments.where)(arguments.iova)
    head = ("table", "at", "index", "entry at", "entry", "means")
    rows = _rows(result)
    if sys.stdout.isatty() and not arguments.json:
        _colourful(head, rows, result)
    else:
        show(arguments, result, [*table(head, rows, "<>>>><"), _end(result)])
    return 0 if result.fault is None else 1


def _find(where: list[str]) -> Callable[[Iova], api.Walk]:
    """The walk from a device or a domain.  Raises UsageError."""
    if len(where) > 2:
        raise UsageError(f"{' '.join(where)}: expected MOUNT DEVICE IOVA, DEVICE IOVA or DOMAIN IOVA")
    word = where[-1]
    if len(where) == 2:
        name = device(word)
        return lambda iova: source(where[0]).walk(iova, device=name)
    if "/" not in word and ":" in word and not os.path.lexists(word):
        name = device(word)
        mountpoint = only_mount()
        return lambda iova: source(mountpoint).walk(iova, device=name)
    found = source(word, domain=True)
    return found.walk


def only_mount() -> str:
    """The mountpoint of the one pkernfs that is mounted.  Raises UsageError."""
    from pkernfs.mountinfo import FSTYPE, mounts

    places = {mount.device: mount.mountpoint for mount in mounts() if mount.fstype == FSTYPE and mount.root == "/"}
    found = sorted(places.values())
    if len(found) != 1:
        some = f"{len(found)} are: {', '.join(map(printable, found[:5]))}" if found else "none is"
        raise UsageError(f"expected MOUNT DEVICE IOVA where not exactly one pkernfs is mounted, and {some}")
    return found[0]


def _rows(result: api.Walk) -> list[tuple[str, ...]]:
    """Each entry on the way."""
    return [
        (
            step.level if isinstance(step.level, str) else f"level {step.level}",
            f"{step.table:#x}",
            f"{step.index:#x}",
            f"{step.address:#x}",
            f"{step.entry:#x}",
            step.means,
        )
        for step in result.steps
    ]


def _colourful(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], result: api.Walk) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*head, box=None, pad_edge=False, header_style="bold")
    for n in range(1, 5):
        shown.columns[n].justify = "right"
        shown.columns[n].no_wrap = True
    for row in rows:
        shown.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.print(shown)
    console.print(Text(_end(result), style="bold green" if result.fault is None else "bold red"))


def _end(result: api.Walk) -> str:
    """What the walk comes to."""
    if result.fault is not None:
        return f"IOVA {result.iova:#x} faults: {result.fault}"
    allowed = {"rw": "read and write", "ro": "read only", "wo": "write only"}[result.access]
    text = f"IOVA {result.iova:#x} is physical {result.physical:#x}, {allowed}, page of"
    text += f" {human(result.page_size or 0)}"
    if result.ino is None:
        return f"{text}; no mapping says so"
    return f"{text}: {file_name(result)}, offset {result.offset:#x}"


VERBS = {"walk": Verb(WALK, _walk_arguments, _walk)}
