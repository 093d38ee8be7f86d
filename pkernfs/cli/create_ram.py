"""pkernfs create-ram: a guest's memory in one step."""

import argparse
import os

from pkernfs.cli.arguments import group, mode, size, user
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human, printable, show
from pkernfs.errors import UsageError

DESCRIPTION = """\
Make a guest's memory: a new file, for its owner only, whose whole size is allocated, in one piece of the region, so
that QEMU can map it directly or through the mount (pkernfs qemu-args).  It is there as a whole, or not at all.

  pkernfs create-ram /mnt/pkernfs/guest-ram 4G
  pkernfs create-ram /mnt/pkernfs/guest-ram 4G --owner libvirt-qemu --group kvm

`touch` and `truncate -s`, as in the RFC, make such a file in two steps, with the permissions that the umask leaves and
in pieces where the space is in pieces.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT/NAME and what it is to be."""
    parser.add_argument("file", metavar="MOUNT/NAME", help="the file, which must not be there yet")
    parser.add_argument("size", metavar="SIZE", type=size, help="bytes, or with K, M, G, T; a multiple of 4096")
    parser.add_argument("--owner", type=user, metavar="USER", help="whose it is (default: who runs this)")
    parser.add_argument("--group", type=group, metavar="GROUP", help="its group")
    parser.add_argument("--mode", type=mode, metavar="MODE", default=0o600, help="its mode, in octal (default 0600)")
    parser.add_argument(
        "--fragmented", action="store_true", help="make it in several pieces when there is no free piece of its size"
    )
    add_json(parser, "sizes and offsets in bytes")


def run(arguments: argparse.Namespace) -> int:
    """Make it, and say where it is.  Raises PkernfsError."""
    from pkernfs import client

    if not arguments.size or arguments.size % 4096:
        raise UsageError(f"SIZE: expected a multiple of 4096, found {arguments.size}")
    folder, name = os.path.split(arguments.file)
    if name in ("", ".", "..") or not os.path.isdir(folder or "."):
        raise UsageError(f"{arguments.file}: expected a name in a directory of a pkernfs mount")
    made = client.create_ram(
        arguments.file,
        arguments.size,
        owner=arguments.owner,
        group=arguments.group,
        mode=arguments.mode,
        fragmented=arguments.fragmented,
    )
    at = f"one piece, at {made.extents[0].region_offset:#x}" if made.contiguous else f"{len(made.extents)} pieces"
    show(arguments, made, [f"{printable(arguments.file)}: {human(made.size)} in {at} of the region"])
    return 0


VERBS = {"create-ram": Verb(DESCRIPTION, add_arguments, run)}
