"""pkernfs qemu-args: the option with which QEMU takes a file as guest memory."""

import argparse
import json
import os
import shlex

from pkernfs.cli.parsers import Verb
from pkernfs.errors import UsageError

DESCRIPTION = """\
Print QEMU's -object option for a file of a mount as guest memory, quoted for the shell:

  qemu-system-x86_64 -M q35,memory-backend=pc.ram $(pkernfs qemu-args /mnt/pkernfs/guest-ram) ...

A file that is one piece of the region is mapped directly (mem-path=REGION,offset=N: native speed, and the guest runs on
while no pkernfs process is there) when QEMU knows offset= (8.1 and later), any other through the mount.  A file that is
mapped directly is marked so: its memory stays where it is, reads through the mount see what the guest stores, and the
guest sees what is written through the mount.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT/FILE and which mapping."""
    parser.add_argument("file", metavar="MOUNT/FILE", help="the guest's memory, a regular file")
    mapping = parser.add_mutually_exclusive_group()
    mapping.add_argument("--path", action="store_true", help="map through the mount")
    mapping.add_argument("--direct", action="store_true", help="map the region; fails when the file is not one piece")
    parser.add_argument(
        "--id", default="pc.ram", help="id of the object (default pc.ram, the name QEMU saves RAM under)"
    )
    parser.add_argument("--json", action="store_true", help="the properties of the object, for -object and object-add")


def run(arguments: argparse.Namespace) -> int:
    """Choose the mapping, mark the file when it is the direct one, print the option.  Raises PkernfsError."""
    from pkernfs import client
    from pkernfs.qemu.cmdline import backend_option

    path = os.path.realpath(arguments.file)
    if not os.path.isfile(path):
        raise UsageError(f"{arguments.file}: expected a regular file in a pkernfs mount", hint="truncate -s makes one")
    facts = client.file(path)
    size = facts.size
    if not size or size % 4096:
        raise UsageError(
            f"{arguments.file}: expected a size that is a multiple of 4096, found {size}",
            hint=f"truncate -s {max(-(-size // 4096), 1) * 4096} {shlex.quote(arguments.file)}",
        )
    if arguments.direct and not facts.contiguous:
        raise UsageError(
            f"{arguments.file}: expected one piece of the region, found {len(facts.extents)} extents",
            hint="make it anew with truncate -s while enough space is free, or use --path",
        )
    direct = arguments.direct or (not arguments.path and facts.contiguous and _qemu_knows_offset())
    mem_path, offset = path, None
    if direct:
        facts = client.set_direct(path)
        if not facts.contiguous or facts.size != size:
            client.set_direct(path, on=False)
            raise UsageError(f"{arguments.file}: the file was changed while its extents were read", hint="try again")
        mem_path, offset = facts.region, facts.extents[0].region_offset
    if arguments.json:
        properties = {"qom-type": "memory-backend-file", "id": arguments.id, "size": size, "mem-path": mem_path}
        properties |= {"share": True} | ({"offset": offset} if offset is not None else {})
        print(json.dumps(properties))
    else:
        print("-object", shlex.quote(backend_option(mem_path, size, offset, id=arguments.id)))
    return 0


def _qemu_knows_offset() -> bool:
    """Whether there is a QEMU on PATH and it knows offset=."""
    from pkernfs.qemu.cmdline import Version, find_qemu
    from pkernfs.qemu.errors import QemuError

    try:
        return find_qemu(needed=Version(0, 0)).knows_offset
    except QemuError:
        return False


VERBS = {"qemu-args": Verb(DESCRIPTION, add_arguments, run)}
