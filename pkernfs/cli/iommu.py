"""pkernfs iommu: page tables for DMA, and its verbs."""

import argparse
import importlib

from pkernfs.cli.words import Parser

#: verb -> (module, what it is for).  A module has ``COMMANDS``: verb -> Command.
VERBS = {
    "create": ("iommu_change", "make a domain: an address space for devices, with its page tables"),
    "destroy": ("iommu_change", "remove a domain that no device is attached to"),
    "map": ("iommu_change", "let an IOVA range lead to a file's memory"),
    "unmap": ("iommu_change", "take it away, or a part of it"),
    "attach": ("iommu_change", "let a device do DMA through a domain"),
    "detach": ("iommu_change", "stop that"),
    "replace": ("iommu_change", "rebuild a domain's tables and switch to them under DMA"),
    "iotlb-needed": ("iommu_invalidate", "what hardware must be told to forget"),
    "root": ("iommu_show", "physical address of the root table"),
    "list": ("iommu_show", "domains, mappings and devices"),
    "walk": ("iommu_show", "where a device's access goes, step by step"),
    "audit": ("iommu_show", "prove that the tables lead where the mappings say"),
    "map-picture": ("iommu_picture", "draw an address space: on the terminal, as SVG"),
}

DESCRIPTION = """\
Page tables for DMA that survive a live update.  A domain is a file in MOUNT/iommu: an address space of mappings from
IOVA ranges to files (iommufd's IOAS, VFIO's container) and the page tables made from them, which hardware walks.

  pkernfs iommu create MOUNT/iommu/dom-0
  pkernfs iommu map    MOUNT/iommu/dom-0 0 MOUNT/guest-ram
  pkernfs iommu attach MOUNT/iommu/dom-0 00:05.0 --persistent
  pkernfs iommu root   MOUNT
  pkernfs iommu audit  MOUNT

Sizes and addresses are decimal, 0x1000, or with K, M, G, T (powers of 1024).  Devices are named as lspci does.
"""

EPILOG = """\
verbs:
{verbs}

exit status:
  0  done          1  it failed: one line says why; a fault on a walk, problems of an audit          2  wrong usage

`pkernfs iommu VERB --help` tells more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb and its words."""
    listing = "\n".join(f"  {verb:12} {text}" for verb, (_, text) in VERBS.items())
    parser.usage = "pkernfs iommu VERB ..."
    parser.epilog = EPILOG.format(verbs=listing)
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    parser.add_argument("rest", nargs="...", metavar="...")


def run(arguments: argparse.Namespace) -> int:
    """Load the module of the verb and run it.  Raises PkernfsError."""
    module = importlib.import_module(f"pkernfs.cli.{VERBS[arguments.verb][0]}")
    command = module.COMMANDS[arguments.verb]
    parser = Parser(prog=f"pkernfs iommu {arguments.verb}", description=command.description)
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs; addresses and sizes in bytes")
    status: int = command.run(parser.parse_args(arguments.rest))
    return status
