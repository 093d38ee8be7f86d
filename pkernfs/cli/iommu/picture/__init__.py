"""pkernfs iommu map-picture: draw an address space."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pkernfs.cli.iommu.arguments import UNITS
from pkernfs.cli.iommu.source import Source, source
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import show
from pkernfs.errors import PkernfsError, UsageError
from pkernfs.format import PAGE, Iova

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.cli.iommu.picture.space import Block, Space
    from pkernfs.format import Ino

DESCRIPTION = """\
Draw an address space: what is mapped at which IOVA, with which rights and leaves, of which file and where in memory;
and the gaps between.  What is too small to be seen is drawn together with its neighbours, and the picture says so.

  pkernfs iommu map-picture /mnt/pkernfs/iommu/dom-0                      in the terminal
  pkernfs iommu map-picture /mnt/pkernfs/iommu/dom-0 --svg dom-0.svg      as a picture for a browser
  pkernfs iommu map-picture /dev/shm/pkernfs.img:/iommu/dom-0             without a mount
"""
BLOCKS = 36  #: of IOVAs in a picture
LINES = 24  #: the same for the terminal


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", metavar="DOMAIN", help="MOUNT/iommu/NAME or REGION:/iommu/NAME")
    parser.add_argument("--svg", metavar="FILE", help="draw there; - for standard output")
    add_json(parser, UNITS)


def _run(arguments: argparse.Namespace) -> int:
    from pkernfs.cli.iommu.picture.space import space

    if arguments.json and arguments.svg == "-":
        raise UsageError("--svg -: expected a file beside --json, which prints on standard output, too")
    where = source(arguments.domain, domain=True)
    ino = where.ino()
    domain = next((one for one in where.list().domains if one.ino == ino), None)
    if domain is None:
        raise UsageError(f"{arguments.domain}: expected a domain", hint="pkernfs iommu create makes one")
    found = space(domain, lambda ino: _extents(where, ino), BLOCKS if arguments.svg or arguments.json else LINES)
    for block in found.blocks:
        block.leaves = _leaves(where, block)
    if arguments.svg:
        _write_svg(found, arguments.svg)
    if arguments.json:
        show(arguments, _facts(found), [])
    elif not arguments.svg:
        _print(found)
    return 0


def _extents(where: Source, ino: Ino) -> list[api.Extent]:
    """Of a file, or none when it cannot be asked."""
    try:
        return where.file(ino).extents
    except PkernfsError:
        return []


def _leaves(where: Source, block: Block) -> tuple[int, ...]:
    """The sizes of leaves at the first, a middle and the last page of a block; 0: there is none."""
    middle = block.mappings[len(block.mappings) // 2]
    pages = {block.start, middle.iova + middle.length // 2 // PAGE * PAGE, block.end - PAGE}
    walks = [where.walk(Iova(page)) for page in sorted(pages)]
    return tuple(sorted({(walk.page_size or 0) if walk.fault is None else 0 for walk in walks}))


def _write_svg(found: Space, path: str) -> None:
    from pkernfs.cli.iommu.picture.svg import svg

    text = svg(found)
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise PkernfsError(f"{path}: cannot write the picture: {error.strerror}") from None


def _print(found: Space) -> None:
    from pkernfs.cli.iommu.picture import text as drawn

    if not sys.stdout.isatty():
        try:
            drawn.UNICODE.fills.encode(sys.stdout.encoding or "ascii")
            marks = drawn.UNICODE
        except UnicodeEncodeError:
            marks = drawn.ASCII
        for line in drawn.picture(found, marks):
            print("".join(piece.text for piece in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    colours = found.colours()
    for line in drawn.picture(found, drawn.UNICODE if console.no_color else drawn.COLOURS):
        text = Text(no_wrap=True, overflow="ellipsis")
        for piece in line:
            text.append(piece.text, style="" if piece.ino is None else colours.get(piece.ino, ""))
        console.print(text)


def _facts(found: Space) -> dict[str, object]:
    """The picture for programs."""
    blocks = [
        {
            "iova": block.start,
            "length": block.end - block.start,
            "mapped": block.length,
            "mappings": len(block.mappings),
            "access": block.access,
            "leaves": list(block.leaves),
            "inos": sorted({mapping.ino for mapping in block.mappings}),
        }
        for block in found.blocks
    ]
    memory = [
        {
            "ino": part.ino or None,
            "file": found.names[part.ino],
            "offset": part.start if part.ino else None,
            "length": part.end - part.start if part.ino else None,
            "mapped": part.length,
            "runs": [run._asdict() for run in part.runs],
        }
        for part in found.memory
    ]
    return {
        "domain": found.domain.name,
        "aperture": found.domain.aperture,
        "mappings": sum(len(block.mappings) for block in found.blocks),
        "blocks": blocks,
        "memory": memory,
    }


VERBS = {"map-picture": Verb(DESCRIPTION, _arguments, _run)}
