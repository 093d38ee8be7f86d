"""pkernfs iommu create, destroy, replace: domains as a whole."""

from __future__ import annotations

import argparse
import os

from pkernfs.cli.iommu.arguments import DOMAIN, FORMATS, UNITS, add_domain, domain, existing
from pkernfs.cli.iommu.replies import about, reminder
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import plural, show
from pkernfs.errors import UsageError, printable

LEAVES = {"4K": 1, "2M": 2, "1G": 3}

CREATE = """\
Make a domain: an empty address space, and the page tables that will say what is mapped in it.

  pkernfs iommu create /mnt/pkernfs/iommu/dom-0
  pkernfs iommu create /mnt/pkernfs/iommu/dom-0 --levels 5
  pkernfs iommu create /mnt/pkernfs/iommu/dom-0 --format amd

`touch` and `truncate -s 2M` in MOUNT/iommu make one for VT-d with 4 levels, too.
"""


def _create_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)
    parser.add_argument(
        "--levels", type=int, choices=(3, 4, 5), default=4, help="of tables: 39, 48 or 57 bits of IOVA (default 4)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="vtd",
        help="what hardware reads: Intel VT-d, second level (the default), or AMD-Vi, v1",
    )
    add_json(parser, UNITS)


def _create(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client
    from pkernfs.format import IOMMU_INO

    folder, name = os.path.split(arguments.domain.rstrip("/"))
    folder = existing(folder or ".", "MOUNT/iommu/NAME")
    if os.stat(folder).st_ino != IOMMU_INO or name in ("", ".", ".."):
        raise UsageError(f"{arguments.domain}: expected {DOMAIN}: domains are made in the directory iommu of a mount")
    request = api.IommuCreate(name=name, levels=arguments.levels, format=arguments.format)
    result = client.ask(folder, request)
    show(arguments, result, [f"{printable(arguments.domain)}: {about(result)}"])
    return 0


DESTROY = """\
Remove a domain with its mappings and tables.  A domain that a device is attached to stays (EBUSY): detach it first.

  pkernfs iommu destroy /mnt/pkernfs/iommu/dom-0
"""


def _destroy_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)
    add_json(parser, UNITS)


def _destroy(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    result = client.ask(domain(arguments.domain), api.IommuDestroy())
    show(arguments, result, [f"{printable(arguments.domain)}: destroyed"])
    return 0


REPLACE = """\
Rebuild a domain's tables beside the ones in use, compare them translation by translation, and switch every attached
device by one store of its context entry: a device doing DMA meanwhile sees no wrong and no missing translation.  This
compacts tables after many changes, and changes the size of leaves.

  pkernfs iommu replace /mnt/pkernfs/iommu/dom-0
  pkernfs iommu replace /mnt/pkernfs/iommu/dom-0 --leaf 4K       no large leaves from now on
  pkernfs iommu replace /mnt/pkernfs/iommu/dom-0 --rebuild       the audit has found damage: make them from the mappings

The old tables are reclaimed after `pkernfs iommu invalidations MOUNT --ack TOKEN`.
"""


def _replace_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)
    parser.add_argument(
        "--leaf", type=str.upper, choices=LEAVES, help="the largest leaf from now on (default: as before)"
    )
    parser.add_argument("--rebuild", action="store_true", help="of damaged tables: do not compare with them")
    add_json(parser, UNITS)


def _replace(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    space = domain(arguments.domain)
    leaf = LEAVES[arguments.leaf] if arguments.leaf else None
    result = client.ask(space, api.IommuReplace(leaf=leaf, rebuild=arguments.rebuild))
    before, after = f"{result.tables_before:,}", plural(result.tables_after, "table")
    line = f"{printable(arguments.domain)}: {before} -> {after}, {plural(result.compared, 'translation')} compared"
    show(arguments, result, [line, *reminder(result.invalidations, space)])
    return 0


VERBS = {
    "create": Verb(CREATE, _create_arguments, _create),
    "destroy": Verb(DESTROY, _destroy_arguments, _destroy),
    "replace": Verb(REPLACE, _replace_arguments, _replace),
}
