"""The command ``pkernfs``: its verbs."""

import importlib
from collections.abc import Sequence

from pkernfs.cli.words import Parser, add_version

#: verb -> (module, what it is for).  A module has ``add_arguments(parser)``, ``DESCRIPTION`` and ``run(arguments)``.
VERBS = {
    "info": ("info", "geometry, use and features of a region; the memory of a file"),
    "ls": ("ls", "list files in a region that need not be mounted"),
    "cat": ("cat", "print a file of a region that need not be mounted"),
    "explain": ("explain", "what owns a block or an address of a region"),
    "scrub": ("scrub", "verify every checksum of a mounted region"),
    "quota": ("quota", "what a directory and all below it may use"),
    "iommu": ("iommu", "page tables for DMA: domains, mappings, devices, audit"),
    "status": ("status", "who serves a mount, and how it has been doing"),
    "metrics": ("metrics", "the same for Prometheus"),
    "upgrade": ("upgrade", "let this version serve a mount in use"),
    "qemu-args": ("qemu_args", "QEMU's -object option for a file as guest memory"),
}

DESCRIPTION = """\
Look into regions and mounts of pkernfs, which keeps live-update state in one piece of memory.

Regions are made by mkfs.pkernfs, checked by fsck.pkernfs and mounted by `mount -t pkernfs REGION DIR`.
"""

EPILOG = """\
verbs:
{verbs}

exit status:
  0  done          1  it failed: one line says why          2  wrong usage

`pkernfs VERB --help` tells more.
"""


def run(argv: Sequence[str] | None) -> int:
    """Parse the verb, then load only that verb's module."""
    listing = "\n".join(f"  {verb:10} {text}" for verb, (_, text) in VERBS.items())
    parser = Parser(
        prog="pkernfs", usage="pkernfs VERB ...", description=DESCRIPTION, epilog=EPILOG.format(verbs=listing)
    )
    add_version(parser)
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    parser.add_argument("rest", nargs="...", metavar="...")
    chosen = parser.parse_args(argv)
    module = importlib.import_module(f"pkernfs.cli.{VERBS[chosen.verb][0]}")
    verb = Parser(prog=f"pkernfs {chosen.verb}", description=module.DESCRIPTION)
    module.add_arguments(verb)
    status: int = module.run(verb.parse_args(chosen.rest))
    return status
