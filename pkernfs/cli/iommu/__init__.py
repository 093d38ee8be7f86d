"""pkernfs iommu: page tables for DMA, and its verbs; ``picture/`` draws them.

A module has the verbs of one noun in its VERBS.  What changes something asks the server of a mount (client.ask); what
looks asks it, or a region that is not mounted (source.py).
"""

from pkernfs.cli.parsers import Parser, Verb

#: verb -> (module, what it is for).
LISTED = {
    "create": ("pkernfs.cli.iommu.domains", "make a domain: an address space for devices, with its page tables"),
    "destroy": ("pkernfs.cli.iommu.domains", "remove a domain that no device is attached to"),
    "map": ("pkernfs.cli.iommu.mappings", "let an IOVA range translate to a file's memory"),
    "unmap": ("pkernfs.cli.iommu.mappings", "take it away, or a part of it"),
    "attach": ("pkernfs.cli.iommu.devices", "let a device do DMA through a domain"),
    "detach": ("pkernfs.cli.iommu.devices", "stop that"),
    "replace": ("pkernfs.cli.iommu.domains", "rebuild a domain's tables and switch to them under DMA"),
    "invalidations": ("pkernfs.cli.iommu.invalidations", "what hardware must invalidate, and that it has"),
    "root": ("pkernfs.cli.iommu.show", "physical address of the root table"),
    "list": ("pkernfs.cli.iommu.show", "domains, mappings and devices"),
    "walk": ("pkernfs.cli.iommu.walk", "what a device's access translates to, step by step"),
    "audit": ("pkernfs.cli.iommu.show", "prove that the tables say what the mappings say"),
    "map-picture": ("pkernfs.cli.iommu.picture", "draw an address space: on the terminal, as SVG"),
}
DEPRECATED = {"iotlb-needed": "pkernfs.cli.iommu.invalidations"}  #: the name of ``invalidations`` up to 0.1

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
exit status:
  0  done          1  it failed: one line says why; a fault on a walk, problems of an audit          2  wrong usage

`pkernfs iommu VERB --help` tells more.
"""


def add_arguments(parser: Parser) -> None:
    """Its verbs."""
    parser.epilog = EPILOG
    parser.add_verbs(LISTED, DEPRECATED)


VERBS = {"iommu": Verb(DESCRIPTION, add_arguments, None)}
