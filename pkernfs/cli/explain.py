"""pkernfs explain: what owns a block, a page or an address."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pkernfs.cli.words import size
from pkernfs.errors import UsageError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import Filesystem

DESCRIPTION = """\
Say what owns a block of 2 MiB, or the byte at an address of a region: which structure, which file, which offset in it.

  pkernfs explain /dev/shm/pkernfs.img 17               block 17
  pkernfs explain /dev/shm/pkernfs.img 0x3fe04010       a physical address, as a DMA fault reports it
  pkernfs explain --offset /dev/shm/pkernfs.img 0x4000  an offset in the region

A number in hexadecimal is a physical address (from the region's --phys-base on), one in decimal a block.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """REGION and what to explain."""
    parser.add_argument("region", metavar="REGION")
    parser.add_argument("what", metavar="BLOCK|ADDRESS")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--block", action="store_true", help="the number is that of a block")
    kind.add_argument("--offset", action="store_true", help="the number is an offset in the region, in bytes")
    kind.add_argument("--physical", action="store_true", help="the number is a physical address")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Explain.  Raises PkernfsError."""
    from pkernfs.cli.offline import with_filesystem

    word = arguments.what
    try:
        number = size(word)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{word}: {error}") from None
    physical = arguments.physical or (word[:2].lower() == "0x" and not (arguments.block or arguments.offset))
    facts = with_filesystem(arguments.region, lambda fs: _explain(fs, number, physical, arguments.offset))
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    where = f"block {facts['block']}, page {facts['page']:#x}"
    print(f"offset {facts['offset']:#x}, physical {facts['physical']:#x}: {where}")
    print(_line(facts))
    return 0


def _explain(fs: Filesystem, number: int, physical: bool, is_offset: bool) -> dict[str, Any]:
    from pkernfs.format import BLOCK
    from pkernfs.fs.explain import explain

    sb = fs.volume.sb
    if physical:
        end = sb.phys_base + sb.blocks * BLOCK
        if not sb.phys_base <= number < end:
            raise UsageError(
                f"address {number:#x}: expected one of the region, {sb.phys_base:#x} to {end - 1:#x}",
                hint="--offset and --block take other numbers",
            )
        return explain(fs, number - sb.phys_base)
    return explain(fs, number if is_offset else number * BLOCK)


def _line(facts: dict[str, Any]) -> str:
    text: str = facts["structure"]
    if "ino" in facts:
        text += f" of inode {facts['ino']}" if not text.endswith("inode") else f" {facts['ino']}"
        text += f", {facts['path']}" if facts["path"] else ", which has no name"
    if "file_offset" in facts:
        text += f", at file offset {facts['file_offset']:#x}"
        text += " (beyond its end)" if facts["beyond_end"] else ""
    return text
