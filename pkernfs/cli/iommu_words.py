"""What the verbs of `pkernfs iommu` have in common: their words, and how they ask the server."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

from pkernfs.cli.words import human, size
from pkernfs.errors import PkernfsError, UsageError

FORMATS = {"vtd": "VT-d", "amd": "AMD-Vi"}


class Command(NamedTuple):
    """A verb below a verb."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def address(word: str) -> int:
    """An IOVA or a length: 64 bits.  For argparse."""
    number = size(word)
    if number >> 64:
        raise argparse.ArgumentTypeError(f"expected at most 64 bits, found {word!r}")
    return number


def segment(word: str) -> int:
    """A PCI segment: 16 bits.  For argparse."""
    number = size(word)
    if number >> 16:
        raise argparse.ArgumentTypeError(f"expected a PCI segment, 0 to 65535, found {word!r}")
    return number


def device(word: str) -> str:
    """The full name of a device: 0000:00:05.0.  Raises UsageError."""
    from pkernfs.iommu import pci

    return pci.text(pci.parse(word))


def existing(word: str, what: str, hint: str = "") -> str:
    """The real path that ``word`` names.  Raises UsageError outside a mount, PkernfsError when there is nothing."""
    from pkernfs.client import mount_of

    path = os.path.realpath(word)
    if mount_of(path) is None:
        raise UsageError(f"{word}: expected {what} in a pkernfs mount", hint="mount -t pkernfs REGION DIR makes one")
    try:
        os.stat(path)
    except OSError as error:
        raise PkernfsError(f"{word}: expected {what}, found none: {error.strerror}", hint=hint) from None
    return path


def domain(word: str) -> str:
    """The real path of a domain that exists.  Raises UsageError, PkernfsError."""
    return existing(word, "a domain", "pkernfs iommu create makes one")


def ask(path: str, op: str, **arguments: Any) -> dict[str, Any]:
    """One question to the server of ``path``, with a number that tells it from one that is asked again.

    Raises UsageError, ControlError.
    """
    from pkernfs.client import control

    request = 1 + secrets.randbelow((1 << 64) - 1)
    return control(path, "iommu", timeout=None, op=op, request=request, **arguments)


def span(iova: int, length: int) -> str:
    """A range of addresses, first to last."""
    return f"{iova:#x} to {iova + length - 1:#x}"


def plural(count: int, what: str) -> str:
    """3 mappings, 1 mapping."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def reminder(result: dict[str, Any], mountpoint: str) -> list[str]:
    """The line that a change ends with when hardware may have cached what it took away."""
    return [f"hardware must forget what was there: pkernfs iommu iotlb-needed {mountpoint}"] if result["stale"] else []


def about(domain: dict[str, Any]) -> str:
    """A domain's tables, in a line."""
    parts = [FORMATS[domain["format"]], f"{domain['levels']} levels", f"{human(domain['aperture'])} of addresses"]
    parts += [f"id {domain['id']}"] if domain["id"] else []
    return ", ".join(parts)
