"""pkernfs iommu root, list, audit: what there is, of a mount or of a region that need not be mounted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkernfs.cli.iommu.arguments import FORMATS, MOUNT_OR_REGION, UNITS, segment
from pkernfs.cli.iommu.replies import about, reminder
from pkernfs.cli.iommu.source import file_name, source
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human, plural, show, table
from pkernfs.errors import printable

if TYPE_CHECKING:
    from pkernfs import api

ROOT = """\
Print the physical address of the root table, which goes into the register of the IOMMU, and nothing else, so that
scripts can use it.  VT-d: RTADDR (legacy mode); AMD-Vi: the device table's base address, without its size.

  pkernfs iommu root /mnt/pkernfs
  pkernfs iommu root /mnt/pkernfs --format amd --segment 1
  pkernfs iommu root --json /mnt/pkernfs
"""


def _target_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MOUNT|REGION", help=MOUNT_OR_REGION)
    add_json(parser, UNITS)


def _root_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MOUNT|REGION", help=MOUNT_OR_REGION)
    parser.add_argument("--format", choices=FORMATS, default="vtd", help="what hardware reads (default vtd)")
    parser.add_argument("--segment", metavar="N", type=segment, default=0, help="PCI segment (default 0)")
    add_json(parser, UNITS)


def _root(arguments: argparse.Namespace) -> int:
    result = source(arguments.target).root(arguments.format, arguments.segment)
    show(arguments, result, [f"{result.physical:#x}"])
    return 0


LIST = """\
Show domains, what is mapped in them, and the devices that are attached.

  pkernfs iommu list /mnt/pkernfs
  pkernfs iommu list /dev/shm/pkernfs.img
  pkernfs iommu list --json /mnt/pkernfs
"""


def _list(arguments: argparse.Namespace) -> int:
    result = source(arguments.target).list()
    show(arguments, result, _listing(result))
    return 0


def _listing(result: api.Domains) -> Iterator[str]:
    for root in result.roots:
        yield f"root table: {FORMATS[root.format]}, segment {root.segment}, at physical {root.physical:#x}"
    for n, domain in enumerate(result.domains):
        if n or result.roots:
            yield ""
        yield f"{printable(domain.name or '(no name)')}: {about(domain)}"
        yield from (f"  {line}" for line in _domain(domain))
    yield from (f"{printable(one.name)}: {one.text}" for one in result.damaged)
    if not result.domains:
        yield "no domains"
    for line in reminder(result.invalidations):
        yield ""
        yield line


def _domain(domain: api.Domain) -> list[str]:
    where = f"root at physical {domain.root:#x}, " if domain.root is not None else ""
    awaiting = f", {plural(domain.awaiting, 'page')} awaiting invalidation" if domain.awaiting else ""
    lines = [f"{where}{plural(domain.tables, 'table')}{awaiting}, leaves of up to {human(domain.leaf)}"]
    for one in domain.devices:
        kept = ", persistent" * one.persistent
        lines.append(f"device {one.device} {one.state}{kept}")
    mappings = domain.mappings
    rows = [
        (
            f"{one.iova:#x}",
            f"{one.iova + one.length - 1:#x}",
            human(one.length),
            one.access,
            f"{one.offset:#x}",
            file_name(one),
        )
        for one in mappings
    ]
    return [*lines, *table(("IOVA", "to", "length", "", "offset", "file"), rows, ">>>>><")] if rows else lines


AUDIT = """\
Walk root tables, contexts and page tables as hardware would, and prove that each IOVA of each device translates to
the memory of the file that the mapping names, with no more rights; that no page of a table serves twice, and that none
is lost.

  pkernfs iommu audit /mnt/pkernfs
  pkernfs iommu audit --json /dev/shm/pkernfs.img

problems:
  dangling           an entry points to free memory, or out of the region
  foreign            it points to memory of another file or another place in the file
  over-permissive    it grants more than the mapping does, or where there is no mapping
  under-mapped       a mapping that the tables do not have
  reserved-bits      hardware would fault on an entry
  overlap            a page of tables is reached in two ways
  unreachable        a page of tables is in use and not reached
  bitmap             a page of tables is reached and not marked as used
  context, attachment    a device's entry and its record disagree

exit status:
  0  nothing found          1  problems, or an error          2  wrong usage
"""


def _audit(arguments: argparse.Namespace) -> int:
    result = source(arguments.target).audit()
    problems = result.problems
    lines = []
    for problem in problems:
        where = [printable(name) for name in (problem.domain, problem.device) if name]
        where += [f"IOVA {problem.iova:#x}"] if problem.iova is not None else []
        lines.append(": ".join([problem.kind, *([", ".join(where)] if where else []), printable(problem.text)]))
    walked = ", ".join(plural(getattr(result, f"{what}s"), what) for what in ("device", "domain", "mapping", "table"))
    found = plural(len(problems), "problem") if problems else "no problems"
    lines.append(f"{printable(arguments.target)}: {walked}, {human(result.bytes)} of translations audited: {found}")
    show(arguments, result, lines)
    return 1 if problems else 0


VERBS = {
    "root": Verb(ROOT, _root_arguments, _root),
    "list": Verb(LIST, _target_argument, _list),
    "audit": Verb(AUDIT, _target_argument, _audit),
}
