"""pkernfs explain: what owns a block, a page or an address."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING

from pkernfs.cli.arguments import size
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.errors import UsageError, printable

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import Filesystem
    from pkernfs.fsck.explain import Explained

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
    found = with_filesystem(region_of(arguments.region), lambda fs: _explain(fs, number, unit))
    if arguments.json:
        from pkernfs.api import to_builtins

        print(json.dumps(to_builtins(found), indent=2))
        return 0
    where = f"block {found.block}, page {found.page:#x}"
    print(f"offset {found.offset:#x}, physical {found.physical:#x}: {where}")
    for line in _lines(found):
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


def _explain(fs: Filesystem, number: int, unit: str) -> Explained:
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


def _lines(found: Explained) -> list[str]:
    """What it is, in a line; other names, and the extent, in more."""
    text = found.structure
    more = []
    if found.tree:
        text += f" ({found.tree})"
    if found.attribute:
        text += f" ({printable(found.attribute)})"
    if found.ino is not None:
        text += f" of inode {found.ino}" if not text.endswith("inode") else f" {found.ino}"
        gone = ", which was removed and is still open" if found.orphan else ", which has no name"
        if found.awaits is not None:
            gone = f", which has no name, waiting for invalidation {found.awaits}"
        text += f", {printable(found.path)}" if found.path else gone
        more += [f"also {printable(path)}" for path in (found.paths or [])[1:]]
    if found.extent is not None:
        extent = found.extent
        text += f", at file offset {found.file_offset:#x}"
        text += " (beyond its end)" if found.beyond_end else ""
        first, last = extent.file_offset, extent.file_offset + extent.length - 1
        more.append(f"extent: file offset {first:#x} to {last:#x} at region offset {extent.region_offset:#x}")
    if found.record is not None:
        record = found.record
        more.append(f"{record.kind} of {record.length} bytes at region offset {record.offset:#x}")
    return [text, *more]


VERBS = {"explain": Verb(DESCRIPTION, add_arguments, run)}
