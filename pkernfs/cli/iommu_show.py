"""pkernfs iommu: the verbs that look, at a mount or at a region that need not be mounted."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pkernfs.cli.iommu_source import Facts, source
from pkernfs.cli.iommu_words import FORMATS, Command, about, address, device, plural, segment
from pkernfs.cli.words import human, printable
from pkernfs.errors import UsageError

ROOT = """\
Print the physical address of the root table, which goes into the register of the IOMMU, and nothing else, so that
scripts can use it.  VT-d: RTADDR (legacy mode); AMD-Vi: the device table's base address, without its size.

  pkernfs iommu root /mnt/pkernfs
  pkernfs iommu root /mnt/pkernfs --format amd --segment 1
  pkernfs iommu root --json /mnt/pkernfs
"""


def _target_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MOUNT|REGION")


def _root_arguments(parser: argparse.ArgumentParser) -> None:
    _target_argument(parser)
    parser.add_argument("--format", choices=FORMATS, default="vtd", help="default: vtd")
    parser.add_argument("--segment", metavar="N", type=segment, default=0, help="PCI segment (default 0)")


def _root(arguments: argparse.Namespace) -> int:
    result = source(arguments.target).root(arguments.format, arguments.segment)
    print(json.dumps(result, indent=2) if arguments.json else f"{result['physical']:#x}")
    return 0


LIST = """\
Show domains, what is mapped in them, and the devices that are attached.

  pkernfs iommu list /mnt/pkernfs
  pkernfs iommu list /dev/shm/pkernfs.img
  pkernfs iommu list --json /mnt/pkernfs
"""


def _list(arguments: argparse.Namespace) -> int:
    result = source(arguments.target).list()
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(_listing(result)))
    return 0


def _listing(result: dict[str, Any]) -> list[str]:
    lines = [
        f"root table: {FORMATS[root['format']]}, segment {root['segment']}, at physical {root['physical']:#x}"
        for root in result["roots"]
    ]
    for domain in result["domains"]:
        lines += [""] * bool(lines) + [f"{printable(domain['name'] or '(no name)')}: {about(domain)}"]
        lines += [f"  {line}" for line in _domain(domain)]
    lines += [f"{printable(one['name'])}: {one['text']}" for one in result.get("damaged", ())]
    if not result["domains"]:
        lines.append("no domains")
    if result["stale"]:
        lines += ["", "hardware must forget what was there: pkernfs iommu iotlb-needed"]
    return lines


def _domain(domain: dict[str, Any]) -> list[str]:
    where = f"root at physical {domain['root']:#x}, " if domain["root"] is not None else ""
    stale = f", {plural(domain['stale'], 'page')} of old ones" if domain["stale"] else ""
    lines = [f"{where}{plural(domain['tables'], 'table')}{stale}, leaves of up to {human(domain['leaf'])}"]
    for one in domain["devices"]:
        kept = ", persistent" * bool(one["persistent"])
        lines.append(f"device {one['device']} {one['state']}{kept}")
    mappings = domain["mappings"]
    rows = [
        (
            f"{one['iova']:#x}",
            f"{one['iova'] + one['length'] - 1:#x}",
            human(one["length"]),
            one["access"],
            f"{one['offset']:#x}",
            file_name(one),
        )
        for one in mappings
    ]
    return [*lines, *table(("IOVA", "to", "length", "", "offset", "file"), rows, ">>>>><")] if rows else lines


def file_name(one: dict[str, Any]) -> str:
    """The file of a mapping, for people."""
    return printable(one["file"]) if one["file"] is not None else f"inode {one['ino']}, without a name"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """Rows with aligned columns under a head."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


WALK = """\
Follow the tables as hardware would, and print each entry on the way: where it is, what it holds, what that means; then
the physical address, or why the access faults.

  pkernfs iommu walk /mnt/pkernfs 00:05.0 0x100000000       as the device sees it
  pkernfs iommu walk 00:05.0 0x100000000                    when one pkernfs is mounted
  pkernfs iommu walk /mnt/pkernfs/iommu/dom-0 4G            from the domain's own tables
  pkernfs iommu walk /dev/shm/pkernfs.img 00:05.0 4G        without a mount
  pkernfs iommu walk /dev/shm/pkernfs.img:/iommu/dom-0 4G

exit status:  0  it leads to memory     1  it faults, or an error     2  wrong usage
"""


def _walk_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [--json] [MOUNT|REGION] DEVICE IOVA\n       {parser.prog} [--json] DOMAIN IOVA"
    parser.add_argument("where", metavar="DEVICE|DOMAIN", nargs="+", help="after MOUNT or REGION, or a domain's path")
    parser.add_argument("iova", metavar="IOVA", type=address)


def _walk(arguments: argparse.Namespace) -> int:
    result = _find(arguments.where)(arguments.iova)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print_walk(result)
    return 0 if result["fault"] is None else 1


def _find(where: list[str]) -> Callable[[int], Facts]:
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

    found = sorted({mount.mountpoint for mount in mounts() if mount.fstype == FSTYPE})
    if len(found) != 1:
        some = f"{len(found)} are: {', '.join(map(printable, found[:5]))}" if found else "none is"
        raise UsageError(f"expected MOUNT DEVICE IOVA where not exactly one pkernfs is mounted, and {some}")
    return found[0]


def _print_walk(result: dict[str, Any]) -> None:
    head = ("table", "at", "index", "entry at", "entry", "means")
    rows = [
        (
            step["level"] if isinstance(step["level"], str) else f"level {step['level']}",
            f"{step['table']:#x}",
            f"{step['index']:#x}",
            f"{step['address']:#x}",
            f"{step['entry']:#x}",
            step["means"],
        )
        for step in result["steps"]
    ]
    if sys.stdout.isatty():
        _colourful(head, rows, result)
        return
    print("\n".join([*table(head, rows, "<>>>><"), _end(result)]))


def _colourful(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], result: dict[str, Any]) -> None:
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
    console.print(Text(_end(result), style="bold green" if result["fault"] is None else "bold red"))


def _end(result: dict[str, Any]) -> str:
    """What the walk comes to."""
    if result["fault"] is not None:
        return f"IOVA {result['iova']:#x} faults: {result['fault']}"
    allowed = {"rw": "read and write", "ro": "read only", "wo": "write only"}[result["access"]]
    text = f"IOVA {result['iova']:#x} is physical {result['physical']:#x}, {allowed}, page of"
    text += f" {human(result['page_size'])}"
    if result["ino"] is None:
        return f"{text}; no mapping says so"
    return f"{text}: {file_name(result)}, offset {result['offset']:#x}"


AUDIT = """\
Walk root tables, contexts and page tables as hardware would, and prove that each IOVA of each device leads to the
memory of the file that the mapping names, with no more rights; that no page of a table serves twice, and none is lost.

  pkernfs iommu audit /mnt/pkernfs
  pkernfs iommu audit --json /dev/shm/pkernfs.img

problems:
  dangling           an entry leads to free memory, or out of the region
  foreign            it leads to memory of another file or another place in the file
  over-permissive    it grants more than the mapping does, or where there is no mapping
  under-mapped       a mapping that the tables do not have
  reserved-bits      hardware would fault on an entry
  overlap            a page of tables is reached in two ways
  unreachable        a page of tables is in use and not reached
  bitmap             a page of tables is reached and not marked as used
  context, attachment    a device's entry and its record disagree

exit status:  0  nothing found     1  problems, or an error     2  wrong usage
"""


def _audit(arguments: argparse.Namespace) -> int:
    result = source(arguments.target).audit()
    problems = result["problems"]
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 1 if problems else 0
    for problem in problems:
        where = [printable(problem[key]) for key in ("domain", "device") if problem[key]]
        where += [f"IOVA {problem['iova']:#x}"] if problem["iova"] is not None else []
        print(": ".join([problem["kind"], *([", ".join(where)] if where else []), printable(problem["text"])]))
    walked = ", ".join(plural(result[f"{what}s"], what) for what in ("device", "domain", "mapping", "table"))
    found = plural(len(problems), "problem") if problems else "no problems"
    print(f"{arguments.target}: {walked}, {human(result['bytes'])} of translations audited: {found}")
    return 1 if problems else 0


COMMANDS = {
    "root": Command(ROOT, _root_arguments, _root),
    "list": Command(LIST, _target_argument, _list),
    "walk": Command(WALK, _walk_arguments, _walk),
    "audit": Command(AUDIT, _target_argument, _audit),
}
