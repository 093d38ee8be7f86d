"""pkernfs iommu map, unmap: what an address space holds."""

from __future__ import annotations

import argparse
import errno
import os

from pkernfs.cli.iommu.arguments import UNITS, add_domain, address, domain
from pkernfs.cli.iommu.replies import reminder
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human, show, span
from pkernfs.errors import FsError, UsageError, printable

MAP = """\
Let devices that are attached to the domain reach a file's memory at an IOVA.  While it is mapped, that memory does not
move and is not freed, whatever becomes of the file.

  pkernfs iommu map /mnt/pkernfs/iommu/dom-0 0 /mnt/pkernfs/guest-ram                     all of the file
  pkernfs iommu map /mnt/pkernfs/iommu/dom-0 4G /mnt/pkernfs/guest-ram --offset 3G        from an offset to its end
  pkernfs iommu map /mnt/pkernfs/iommu/dom-0 0xfe000000 /mnt/pkernfs/rom --length 64K --ro
  pkernfs iommu map /mnt/pkernfs/iommu/dom-0 0 /mnt/pkernfs/guest-ram --live-update       after a live update

IOVA, offset and length are multiples of 4096; leaves are as large as alignment and contiguity allow.  What overlaps
another mapping (EEXIST), the interrupt range 0xfee00000 to 0xfeefffff or the end of the address space (EINVAL) is not
mapped, and nothing of it.  With --live-update nothing is changed: it succeeds when exactly this is mapped already.
"""


def _map_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)
    parser.add_argument("iova", metavar="IOVA", type=address, help="where in the address space")
    parser.add_argument("file", metavar="MOUNT/FILE", help="a file of the same mount")
    parser.add_argument("--offset", metavar="N", type=address, default=0, help="where in the file (default 0)")
    parser.add_argument("--length", metavar="N", type=address, help="how much (default: to the end of the file)")
    access = parser.add_mutually_exclusive_group()
    access.add_argument("--ro", action="store_const", dest="access", const="ro", help="the device only reads")
    access.add_argument("--wo", action="store_const", dest="access", const="wo", help="the device only writes")
    parser.add_argument("--live-update", action="store_true", help="check that it is mapped already; change nothing")
    add_json(parser, UNITS)
    parser.set_defaults(access="rw")


def _map(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    space, file = domain(arguments.domain), os.path.realpath(arguments.file)
    try:
        found = os.stat(file)
    except OSError as error:
        raise FsError(error.errno or errno.EIO, arguments.file) from None
    if found.st_dev != os.stat(space).st_dev:
        raise UsageError(f"{arguments.file}: expected a file in the same mount as {arguments.domain}")
    if arguments.length == 0:
        raise FsError(errno.EINVAL, "length 0: expected at least a page of 4096 bytes")
    request = api.IommuMap(
        iova=arguments.iova,
        file_ino=found.st_ino,
        offset=arguments.offset,
        length=arguments.length or 0,
        access=arguments.access,
        live_update=arguments.live_update,
    )
    result = client.ask(space, request)
    where = f"{printable(arguments.file)}, offset {result.offset:#x}, {arguments.access}"
    checked = ": it was mapped already" * arguments.live_update
    line = f"{span(result.iova, result.length)} translates to {where}{checked}"
    show(arguments, result, [line, *reminder(result.invalidations, space)])
    return 0


UNMAP = """\
Take away what is mapped in an IOVA range, also when it is a part of a mapping, or several.  Nothing mapped there:
ENOENT.

  pkernfs iommu unmap /mnt/pkernfs/iommu/dom-0 4G 1G
  pkernfs iommu unmap /mnt/pkernfs/iommu/dom-0 0xfe000000 64K

Hardware may go on with what it has cached until that is invalidated: `pkernfs iommu invalidations MOUNT` says how.
"""


def _unmap_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)
    parser.add_argument("iova", metavar="IOVA", type=address, help="where in the address space")
    parser.add_argument("length", metavar="LENGTH", type=address, help="how much")
    add_json(parser, UNITS)


def _unmap(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    space = domain(arguments.domain)
    result = client.ask(space, api.IommuUnmap(iova=arguments.iova, length=arguments.length))
    line = f"{span(result.iova, result.length)}: {human(result.unmapped)} unmapped"
    show(arguments, result, [line, *reminder(result.invalidations, space)])
    return 0


VERBS = {
    "map": Verb(MAP, _map_arguments, _map),
    "unmap": Verb(UNMAP, _unmap_arguments, _unmap),
}
