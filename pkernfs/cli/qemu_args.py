"""pkernfs qemu-args: the option with which QEMU takes a file as guest memory."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import stat
import sys
from typing import TYPE_CHECKING

from pkernfs.cli.arguments import mounted_file
from pkernfs.cli.parsers import Verb
from pkernfs.errors import PkernfsError, UsageError, printable

if TYPE_CHECKING:
    from pkernfs import api

DESCRIPTION = """\
Print QEMU's -object option for a file of a mount as guest memory, quoted for the shell:

  pkernfs direct /mnt/pkernfs/guest-ram on
  qemu-system-x86_64 -M q35,memory-backend=pc.ram $(pkernfs qemu-args /mnt/pkernfs/guest-ram) ...

A file that is marked as region-mapped (pkernfs direct) is mapped from the region (mem-path=REGION,offset=N: native
speed, the guest runs on while no pkernfs process is there, and its devices may do DMA), any other through the mount,
and a warning says why.  The direct map needs a file that is one piece of the region, and QEMU 8.1 or later.

Nothing is changed.  Refused is what would give a guest memory that others see otherwise: one map while a process has
the other, the path map while a domain maps the file; and a file that a process maps already, but with --force.
"""
#: What the path map costs.
LOST = "stores go through the page cache, the guest needs the server, devices cannot do DMA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT/FILE and which mapping."""
    parser.add_argument("file", metavar="MOUNT/FILE", help="the guest's memory, a regular file")
    mapping = parser.add_mutually_exclusive_group()
    mapping.add_argument("--path", action="store_true", help="map through the mount, without a warning")
    mapping.add_argument("--direct", action="store_true", help="map the region, or fail")
    parser.add_argument(
        "--force", action="store_true", help="also when a process maps the file in the same way already"
    )
    parser.add_argument(
        "--id", default="pc.ram", help="id of the object (default pc.ram, the name QEMU saves RAM under)"
    )
    parser.add_argument("--json", action="store_true", help="the properties of the object, for -object and object-add")


def run(arguments: argparse.Namespace) -> int:
    """Choose the mapping and print the option.  Raises PkernfsError."""
    from pkernfs import client
    from pkernfs.qemu.cmdline import backend_option

    path = mounted_file(arguments.file, hint="truncate -s makes one")
    facts = client.file(path)
    if not facts.size or facts.size % 4096:
        raise UsageError(
            f"{arguments.file}: expected a size that is a multiple of 4096, found {facts.size}",
            hint=f"truncate -s {max(-(-facts.size // 4096), 1) * 4096} {shlex.quote(arguments.file)}",
        )
    direct = facts.direct and not arguments.path
    if arguments.direct or direct:
        check_direct(arguments.file, facts)
    else:
        check_path(arguments.file, facts)
    check_users(arguments, facts, "direct" if direct else "path")
    mem_path, offset, align = path, None, None
    if direct:
        mem_path, offset = facts.region, facts.extents[0].region_offset
        align = alignment(mem_path)
        if text := neighbours(path, mem_path):
            warn(f"{arguments.file}: {text}")
    elif not arguments.path:
        warn(f"{arguments.file}: maps through the mount: {LOST}: {why_not_direct(arguments.file, facts)}")
    if arguments.json:
        properties = {"qom-type": "memory-backend-file", "id": arguments.id, "size": facts.size, "mem-path": mem_path}
        properties |= {"share": True} | ({"offset": offset} if offset is not None else {})
        print(json.dumps(properties | ({"align": align} if align else {})))
    else:
        option = shlex.quote(backend_option(mem_path, facts.size, offset, arguments.id, align))
        # The bytes of the path as they are: a shell is to take them.
        sys.stdout.buffer.write(os.fsencode(f"-object {option}\n"))
    return 0


def warn(text: str) -> None:
    """A line that is no part of the option."""
    print(f"pkernfs: warning: {printable(text)}", file=sys.stderr)


def check_direct(file: str, facts: api.FileInfo) -> None:
    """Raise PkernfsError, UsageError when the file cannot be mapped directly as it is."""
    if not facts.contiguous:
        raise UsageError(
            f"{file}: expected one piece of the region, found {len(facts.extents)} extents",
            hint="make it anew with truncate -s while enough space is free, or use --path",
        )
    if not facts.direct:
        raise PkernfsError(
            f"{file}: expected a file that is marked as region-mapped, found none",
            hint=f"pkernfs direct {shlex.quote(file)} on",
        )
    offset, align = facts.extents[0].region_offset, alignment(facts.region)
    if align and (offset % align or facts.size % align):
        raise UsageError(
            f"{file}: expected size and offset to be multiples of {align}, as the device maps, "
            f"found {facts.size} and {offset}",
            hint="make it anew with such a size, or use --path",
        )
    if why := qemu_is_too_old():
        raise PkernfsError(f"{file}: {why}", hint=f"pkernfs direct {shlex.quote(file)} off, for the path map")


def check_path(file: str, facts: api.FileInfo) -> None:
    """Raise PkernfsError when what a mapping through the mount shows is not what others see."""
    if facts.direct:
        raise PkernfsError(
            f"{file}: expected a file for the path map, found one that is marked as region-mapped",
            hint=f"pkernfs direct {shlex.quote(file)} off",
        )
    if facts.pins:
        names = sorted({pin.domain or "a domain that is being removed" for pin in facts.pins})
        raise PkernfsError(
            f"{file}: {', '.join(names)} maps it for DMA, which does not see the page cache of the path map",
            hint=f"pkernfs direct {shlex.quote(file)} on, for the direct map",
        )


def check_users(arguments: argparse.Namespace, facts: api.FileInfo, way: str) -> None:
    """Raise PkernfsError when a process maps the file: in the other way, or in this one without --force."""
    from pkernfs.cli.direct import WAYS

    for one in sorted(facts.mapped_by, key=lambda one: one.map == way):
        if one.map != way or not arguments.force:
            raise PkernfsError(
                f"{arguments.file}: mapped {WAYS[one.map]} by {one.text}",
                hint="a guest's memory has one user" + ("" if one.map != way else ": --force if this is the next one"),
            )


def why_not_direct(file: str, facts: api.FileInfo) -> str:
    """What stands against the direct map, or how it is chosen."""
    if not facts.contiguous:
        return f"it is not one piece of the region but {len(facts.extents)} extents"
    return qemu_is_too_old() or f"for the direct map: pkernfs direct {shlex.quote(file)} on"


def qemu_is_too_old() -> str:
    """Why the QEMU on PATH cannot map a range of a file; "" when it can, or there is none: it may be elsewhere."""
    from pkernfs.qemu.cmdline import OFFSET_SINCE, Version, find_qemu
    from pkernfs.qemu.errors import QemuError

    try:
        qemu = find_qemu(needed=Version(0, 0))
    except QemuError:
        return ""
    return "" if qemu.knows_offset else f"expected QEMU >= {OFFSET_SINCE}, found {qemu.version} at {qemu.path}"


def alignment(region: str) -> int | None:
    """What mappings of a device-DAX region must be aligned to; None: of any other.  Raises RegionError."""
    from pkernfs.region import find_device

    status = os.stat(region)
    return find_device(status.st_rdev, region).align if stat.S_ISCHR(status.st_mode) else None


def neighbours(path: str, region: str) -> str:
    """Who has memory in the region beside a file's owner; "": nobody, or a server before 0.3.0 does not know."""
    from pkernfs import client

    try:
        others = client.others(path)
    except client.ControlError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return ""
    if not others.files:
        return ""
    return (
        f"whoever can open {region} can read and write all of it: {others.files} more files there are others'"
        f" ({others.path or 'without a name'}): a region for each tenant keeps them apart"
    )


VERBS = {"qemu-args": Verb(DESCRIPTION, add_arguments, run)}
