"""The command ``pkernfs``: its verbs, and the one place that runs them."""

from collections.abc import Sequence

from pkernfs.cli.parsers import Parser, add_version

#: verb -> (module, what it is for).
VERBS = {
    "info": ("pkernfs.cli.info", "geometry, use and features of a region; the memory of a file"),
    "ls": ("pkernfs.cli.ls", "list files in a region that need not be mounted"),
    "cat": ("pkernfs.cli.cat", "print a file of a region that need not be mounted"),
    "explain": ("pkernfs.cli.explain", "what owns a block or an address of a region"),
    "scrub": ("pkernfs.cli.scrub", "verify every checksum of a mounted region"),
    "create-ram": ("pkernfs.cli.create_ram", "make a guest's memory in one step"),
    "hold": ("pkernfs.cli.hold", "let nobody change a file, as a saved guest's memory"),
    "release": ("pkernfs.cli.hold", "let a held file be changed again"),
    "quota": ("pkernfs.cli.quota", "what a directory and all below it may use"),
    "iommu": ("pkernfs.cli.iommu", "page tables for DMA: domains, mappings, devices, audit"),
    "status": ("pkernfs.cli.status", "who serves a mount, and how it has been doing"),
    "metrics": ("pkernfs.cli.metrics", "the same for Prometheus"),
    "upgrade": ("pkernfs.cli.upgrade", "let this version serve a mount in use"),
    "direct": ("pkernfs.cli.direct", "whether a file's memory may be mapped past the mount"),
    "qemu-args": ("pkernfs.cli.qemu_args", "QEMU's -object option for a file as guest memory"),
}

DESCRIPTION = """\
Look into regions and mounts of pkernfs, which keeps live-update state in one piece of memory.

Regions are made by mkfs.pkernfs, checked by fsck.pkernfs and mounted by `mount -t pkernfs REGION DIR`.
"""

EPILOG = """\
exit status:
  0  done          1  it failed: one line says why          2  wrong usage

`pkernfs VERB --help` tells more.
"""


def parser() -> Parser:
    """The parser of pkernfs with those of all its verbs."""
    made = Parser(prog="pkernfs", description=DESCRIPTION, epilog=EPILOG)
    add_version(made)
    made.add_verbs(VERBS)
    return made


def run(argv: Sequence[str] | None) -> int:
    """Parse, and run the verb.  Raises PkernfsError."""
    arguments = parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status
