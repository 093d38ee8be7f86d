"""pkernfs iommu: the verbs that change something."""

from __future__ import annotations

import argparse
import errno
import json
import os
from typing import Any

from pkernfs.cli.iommu_words import (
    FORMATS,
    Command,
    about,
    address,
    ask,
    device,
    domain,
    existing,
    plural,
    reminder,
    span,
)
from pkernfs.cli.words import human, printable
from pkernfs.errors import FsError, UsageError

DOMAIN = "MOUNT/iommu/NAME"
LEAVES = {"4K": 1, "2M": 2, "1G": 3}


def _print(arguments: argparse.Namespace, result: dict[str, Any], lines: list[str]) -> int:
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(lines))
    return 0


def _mount(path: str) -> str:
    from pkernfs.client import mount_of

    mount = mount_of(path)
    return printable(mount.mountpoint) if mount else "MOUNT"


CREATE = """\
Make a domain: an empty address space, and the page tables that will say what is mapped in it.

  pkernfs iommu create /mnt/pkernfs/iommu/dom-0
  pkernfs iommu create /mnt/pkernfs/iommu/dom-0 --levels 5
  pkernfs iommu create /mnt/pkernfs/iommu/dom-0 --format amd

`touch` and `truncate -s 2M` in MOUNT/iommu make one for VT-d with 4 levels, too.
"""


def _create_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", metavar=DOMAIN)
    parser.add_argument(
        "--levels", type=int, choices=(3, 4, 5), default=4, help="of tables: 39, 48 or 57 bits of IOVA (default 4)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="vtd",
        help="what hardware reads: Intel VT-d, second level (the default), or AMD-Vi, v1",
    )


def _create(arguments: argparse.Namespace) -> int:
    from pkernfs.format import IOMMU_INO

    folder, name = os.path.split(arguments.domain.rstrip("/"))
    folder = existing(folder or ".", "MOUNT/iommu/NAME")
    if os.stat(folder).st_ino != IOMMU_INO or name in ("", ".", ".."):
        raise UsageError(f"{arguments.domain}: expected {DOMAIN}: domains are made in the directory iommu of a mount")
    result = ask(folder, "create", name=name, levels=arguments.levels, format=arguments.format)
    return _print(arguments, result, [f"{printable(arguments.domain)}: {about(result)}"])


DESTROY = """\
Remove a domain with its mappings and tables.  A domain that a device is attached to stays (EBUSY): detach it first.

  pkernfs iommu destroy /mnt/pkernfs/iommu/dom-0
"""


def _domain_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", metavar=DOMAIN)


def _destroy(arguments: argparse.Namespace) -> int:
    result = ask(domain(arguments.domain), "destroy")
    return _print(arguments, result, [f"{printable(arguments.domain)}: destroyed"])


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
    parser.add_argument("domain", metavar=DOMAIN)
    parser.add_argument("iova", metavar="IOVA", type=address)
    parser.add_argument("file", metavar="MOUNT/FILE")
    parser.add_argument("--offset", metavar="N", type=address, default=0, help="where in the file (default 0)")
    parser.add_argument("--length", metavar="N", type=address, help="how much (default: to the end of the file)")
    access = parser.add_mutually_exclusive_group()
    access.add_argument("--ro", action="store_const", dest="access", const="ro", help="the device only reads")
    access.add_argument("--wo", action="store_const", dest="access", const="wo", help="the device only writes")
    parser.add_argument("--live-update", action="store_true", help="check that it is mapped already; change nothing")
    parser.set_defaults(access="rw")


def _map(arguments: argparse.Namespace) -> int:
    space, file = domain(arguments.domain), os.path.realpath(arguments.file)
    try:
        found = os.stat(file)
    except OSError as error:
        raise FsError(error.errno or errno.EIO, arguments.file) from None
    if found.st_dev != os.stat(space).st_dev:
        raise UsageError(f"{arguments.file}: expected a file in the same mount as {arguments.domain}")
    if arguments.length == 0:
        raise FsError(errno.EINVAL, "length 0: expected at least a page of 4096 bytes")
    result = ask(
        space,
        "map",
        iova=arguments.iova,
        file_ino=found.st_ino,
        offset=arguments.offset,
        length=arguments.length or 0,
        access=arguments.access,
        live_update=arguments.live_update,
    )
    where = f"{printable(arguments.file)}, offset {result['offset']:#x}, {arguments.access}"
    checked = ": it was mapped already" * arguments.live_update
    line = f"{span(result['iova'], result['length'])} leads to {where}{checked}"
    return _print(arguments, result, [line, *reminder(result, _mount(space))])


UNMAP = """\
Take away what is mapped in an IOVA range, also when it is a part of a mapping, or several.  Nothing mapped there:
ENOENT.

  pkernfs iommu unmap /mnt/pkernfs/iommu/dom-0 4G 1G
  pkernfs iommu unmap /mnt/pkernfs/iommu/dom-0 0xfe000000 64K

Hardware may go on with what it has cached until it is told: `pkernfs iommu iotlb-needed MOUNT` says what.
"""


def _unmap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", metavar=DOMAIN)
    parser.add_argument("iova", metavar="IOVA", type=address)
    parser.add_argument("length", metavar="LENGTH", type=address)


def _unmap(arguments: argparse.Namespace) -> int:
    space = domain(arguments.domain)
    result = ask(space, "unmap", iova=arguments.iova, length=arguments.length)
    line = f"{span(result['iova'], result['length'])}: {human(result['unmapped'])} unmapped"
    return _print(arguments, result, [line, *reminder(result, _mount(space))])


ATTACH = """\
Let a device do DMA through a domain: its context entry (AMD: device table entry) leads to the domain's tables.

  pkernfs iommu attach /mnt/pkernfs/iommu/dom-0 00:05.0
  pkernfs iommu attach /mnt/pkernfs/iommu/dom-0 0001:3b:00.1 --persistent

When a mount ends, in whatever way, the next one takes a device's entry away before it serves anything; one that was
attached with --persistent goes on doing DMA, and `attach` by its next owner claims it.  The device is named as lspci
does: [SEGMENT:]BUS:DEVICE.FUNCTION in hexadecimal.
"""


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", metavar=DOMAIN)
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument("--persistent", action="store_true", help="it goes on doing DMA across a live update")


def _attach(arguments: argparse.Namespace) -> int:
    name = device(arguments.device)
    result = ask(domain(arguments.domain), "attach", device=name, persistent=arguments.persistent)
    kept = ", persistent" * bool(result["persistent"])
    line = f"{result['device']}: {result['state']} to {printable(result['domain'])}, domain id {result['id']}{kept}"
    return _print(arguments, result, [line])


DETACH = """\
Take a device's context entry (AMD: device table entry) away: its DMA faults as soon as hardware has forgotten it.

  pkernfs iommu detach /mnt/pkernfs 00:05.0
"""


def _detach_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("device", metavar="DEVICE")


def _detach(arguments: argparse.Namespace) -> int:
    name = device(arguments.device)
    path = existing(arguments.mount, "a path")
    result = ask(path, "detach", device=name)
    return _print(arguments, result, [f"{result['device']}: detached", *reminder(result, _mount(path))])


REPLACE = """\
Rebuild a domain's tables beside the ones in use, compare them translation by translation, and switch every attached
device by one store of its context entry: a device doing DMA meanwhile sees no wrong and no missing translation.  This
compacts tables after many changes, and changes the size of leaves.

  pkernfs iommu replace /mnt/pkernfs/iommu/dom-0
  pkernfs iommu replace /mnt/pkernfs/iommu/dom-0 --leaf 4K       no large leaves from now on
  pkernfs iommu replace /mnt/pkernfs/iommu/dom-0 --rebuild       the audit has found damage: make them from the mappings

The old tables are used again after `pkernfs iommu iotlb-needed MOUNT --done`.
"""


def _replace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("domain", metavar=DOMAIN)
    parser.add_argument(
        "--leaf", type=str.upper, choices=LEAVES, help="the largest leaf from now on (default: as before)"
    )
    parser.add_argument("--rebuild", action="store_true", help="of damaged tables: do not compare with them")


def _replace(arguments: argparse.Namespace) -> int:
    space = domain(arguments.domain)
    leaf = LEAVES[arguments.leaf] if arguments.leaf else None
    result = ask(space, "replace", leaf=leaf, rebuild=arguments.rebuild)
    before, after = f"{result['tables_before']:,}", plural(result["tables_after"], "table")
    line = f"{printable(arguments.domain)}: {before} -> {after}, {plural(result['compared'], 'translation')} compared"
    return _print(arguments, result, [line, *reminder(result, _mount(space))])


COMMANDS = {
    "create": Command(CREATE, _create_arguments, _create),
    "destroy": Command(DESTROY, _domain_argument, _destroy),
    "map": Command(MAP, _map_arguments, _map),
    "unmap": Command(UNMAP, _unmap_arguments, _unmap),
    "attach": Command(ATTACH, _attach_arguments, _attach),
    "detach": Command(DETACH, _detach_arguments, _detach),
    "replace": Command(REPLACE, _replace_arguments, _replace),
}
