"""Arguments of the verbs of `pkernfs iommu`: addresses, devices, domains."""

from __future__ import annotations

import argparse
import os

from pkernfs.cli.arguments import size
from pkernfs.errors import PkernfsError, UsageError, quoted

FORMATS = {"vtd": "VT-d", "amd": "AMD-Vi"}
DOMAIN = "MOUNT/iommu/NAME"
MOUNT_OR_REGION = "a mount, or a region that need not be mounted"
UNITS = "addresses and sizes in bytes"  #: with --json


def add_domain(parser: argparse.ArgumentParser) -> None:
    """The domain that is changed."""
    parser.add_argument("domain", metavar=DOMAIN, help="the domain: a file in the directory iommu of a mount")


def address(word: str) -> int:
    """An IOVA or a length: 64 bits.  For argparse."""
    number = size(word)
    if number >> 64:
        raise argparse.ArgumentTypeError(f"expected at most 64 bits, found {quoted(word)}")
    return number


def segment(word: str) -> int:
    """A PCI segment: 16 bits.  For argparse."""
    number = size(word)
    if number >> 16:
        raise argparse.ArgumentTypeError(f"expected a PCI segment, 0 to 65535, found {quoted(word)}")
    return number


def device(word: str) -> str:
    """The full name of a device: 0000:00:05.0.  Raises UsageError."""
    from pkernfs.iommu import pci

    return pci.text(pci.parse(word))


def existing(word: str, what: str, hint: str = "") -> str:
    """The real path that ``word`` names.  Raises UsageError outside a mount, PkernfsError when there is nothing."""
    from pkernfs.client import device_of

    path = os.path.realpath(word)
    if not device_of(path):
        raise UsageError(f"{word}: expected {what} in a pkernfs mount", hint="mount -t pkernfs REGION DIR makes one")
    try:
        os.stat(path)
    except OSError as error:
        raise PkernfsError(f"{word}: expected {what}, found none: {error.strerror}", hint=hint) from None
    return path


def domain(word: str) -> str:
    """The real path of a domain that exists.  Raises UsageError, PkernfsError."""
    return existing(word, "a domain", "pkernfs iommu create makes one")
