"""pkernfs explain: what owns a block, a page or an address."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from pkernfs.cli.arguments import size
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import printable
from pkernfs.errors import UsageError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import Filesystem

DESCRIPTION = """\
Say what owns a block of 2 MiB, a page, or the byte at an address of a region: which structure, which files, which
offset in them.  REGION may be mounted; the mountpoint will do as well.

  pkernfs explain /dev/shm/pkernfs.img 17               block 17
  pkernfs explain /mnt/pkernfs 0x1234567890             a physical address, as a DMA fault reports it
  pkernfs explain --offset /dev/shm/pkernfs.img 0x4000  an offset in the region

A number that begins with 0x is a physical address (from the region's --phys-base on), one of decimal digits only a
block.  For everything else say what it is: --block, --page, --offset and --physical take both, the last two also 512M.
A word out of a log that has one 0x number in it, such as `address=0x1234567890,`, is that number.

exit status:
  0  explained (free memory, too)          1  the region cannot be read          2  no such block or address
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """REGION and what to explain."""
    parser.add_argument("region", metavar="REGION|MOUNT", help="the region, mounted or not")
    parser.add_argument("what", metavar="BLOCK|ADDRESS", help="a number of a block, or a physical address")
    unit = parser.add_mutually_exclusive_group()
    for name, text in (
        ("block", "the number is that of a block of 2 MiB"),
        ("page", "the number is that of a page of 4 KiB"),
        ("offset", "the number is an offset in the region, in bytes"),
        ("physical", "the number is a physical address"),
    ):
        unit.add_argument(f"--{name}", action="store_const", dest="unit", const=name, help=text)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Explain.  Raises PkernfsError."""
    from pkernfs.cli.offline import region_of, with_filesystem

    number, unit = parse(arguments.what, arguments.unit)
    facts = with_filesystem(region_of(arguments.region), lambda fs: _explain(fs, number, unit))
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    where = f"block {facts['block']}, page {facts['page']:#x}"
    print(f"offset {facts['offset']:#x}, physical {facts['physical']:#x}: {where}")
    for line in _lines(facts):
        print(line)
    return 0


def parse(word: str, unit: str | None) -> tuple[int, str]:
    """The number, and its unit: "block", "page", "offset" or "physical".  Raises UsageError."""
    inside = re.findall(r"\b0x[0-9a-f]+", word, re.IGNORECASE)
    if len(inside) == 1 and not re.fullmatch(r"0x.*[0-9a-z]", word, re.IGNORECASE):
        word = inside[0]
    try:
        number = size(word)
    except argparse.ArgumentTypeError:
        raise UsageError(
            f"{word}: expected a block such as 17, or an address such as 0x1234567890",
            hint="a number in hexadecimal begins with 0x",
        ) from None
    if unit is None and not word.isdecimal() and not re.fullmatch(r"0x[0-9a-f]+", word, re.IGNORECASE):
        raise UsageError(f"{word}: expected a unit for this number", hint="--offset or --physical")
    return number, unit or ("block" if word.isdecimal() else "physical")


def _explain(fs: Filesystem, number: int, unit: str) -> dict[str, Any]:
    from pkernfs.format import BLOCK, PAGE
    from pkernfs.fsck.explain import explain

    sb = fs.volume.sb
    step, base = {"block": (BLOCK, 0), "page": (PAGE, 0), "offset": (1, 0), "physical": (1, sb.phys_base)}[unit]
    end = base + sb.blocks * BLOCK // step
    if not base <= number < end:
        name = "address" if unit == "physical" else unit
        shown, first, last = (
            (str(number), str(base), str(end - 1))
            if unit == "block"
            else (f"{number:#x}", f"{base:#x}", f"{end - 1:#x}")
        )
        hint = "--block, --page and --offset take other numbers" if unit == "physical" else ""
        raise UsageError(f"{name} {shown}: expected one of the region, {first} to {last}", hint=hint)
    return explain(fs, (number - base) * step)


def _lines(facts: dict[str, Any]) -> list[str]:
    """What it is, in a line; other names, and the extent, in more."""
    text: str = facts["structure"]
    more = []
    if facts.get("tree"):
        text += f" ({facts['tree']})"
    if facts.get("attribute"):
        text += f" ({printable(facts['attribute'])})"
    if "ino" in facts:
        text += f" of inode {facts['ino']}" if not text.endswith("inode") else f" {facts['ino']}"
        gone = ", which was removed and is still open" if facts.get("orphan") else ", which has no name"
        text += f", {printable(facts['path'])}" if facts["path"] else gone
        more += [f"also {printable(path)}" for path in facts["paths"][1:]]
    if "file_offset" in facts:
        text += f", at file offset {facts['file_offset']:#x}"
        text += " (beyond its end)" if facts["beyond_end"] else ""
        extent = facts["extent"]
        first, last = extent["file_offset"], extent["file_offset"] + extent["length"] - 1
        more.append(f"extent: file offset {first:#x} to {last:#x} at region offset {extent['region_offset']:#x}")
    if "record" in facts:
        record = facts["record"]
        more.append(f"{record['kind']} of {record['length']} bytes at region offset {record['offset']:#x}")
    return [text, *more]


VERBS = {"explain": Verb(DESCRIPTION, add_arguments, run)}
