"""pkernfs iommu invalidations: what hardware may have cached of tables that have changed since."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkernfs.cli.iommu.arguments import UNITS, existing
from pkernfs.cli.iommu.replies import INVALIDATIONS
from pkernfs.cli.parsers import Verb, add_json, add_mount
from pkernfs.cli.text import human, plural, show, span
from pkernfs.errors import printable, quoted
from pkernfs.format import PAGE
from pkernfs.iommu import pci

if TYPE_CHECKING:
    from pkernfs import api

DESCRIPTION = """\
Show the invalidations that are pending: what an IOMMU may have cached of tables that have changed since, as the
commands that its driver must queue for Intel VT-d (specification, 6.5) and AMD-Vi (specification, 2.4).  pkernfs
changes memory; it does not touch hardware.

  pkernfs iommu invalidations /mnt/pkernfs              what is pending
  pkernfs iommu invalidations /mnt/pkernfs --ack 77     all of the list that ended with the token 77 has been done
  pkernfs iommu invalidations /mnt/pkernfs --ack all    whatever is pending has been done

Until it is acknowledged no page of an old table, or of a destroyed domain's, is used again, and no memory of a file
that was unmapped, and removed or cut since: a cache that is late points to memory that is nobody's.  It is counted as
used, and against the owner's quota.  Acknowledge after the IOMMU reported the end of the commands (VT-d:
Invalidation Wait Descriptor; AMD: COMPLETION_WAIT).  With a token it fails (EAGAIN) when more is pending by now; use
one where somebody else may change mappings meanwhile.

`pkernfs iommu iotlb-needed [--done [--token N]]` is the old form of this command, deprecated: it goes with the next
release.
"""
OLD = """\
Deprecated: use `pkernfs iommu invalidations MOUNT [--ack TOKEN|all]`.  This form goes with the next release.
"""
ALL = 0  #: the token that stands for whatever is pending


def _token(word: str) -> int:
    """A token, or "all".  For argparse."""
    if word == "all":
        return ALL
    if not (word.isascii() and word.isdecimal()) or not int(word):
        raise argparse.ArgumentTypeError(f"expected the token of a list, or all, found {quoted(word)}")
    return int(word)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_mount(parser)
    parser.add_argument("--ack", metavar="TOKEN|all", type=_token, help="hardware has invalidated all of that list")
    add_json(parser, UNITS)


def _run(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    path = existing(arguments.mount, "a path")
    result = client.ask(path, api.IommuInvalidations(acknowledge=arguments.ack))
    show(arguments, result, _lines(result, path, arguments))
    return 0


def _lines(result: api.Invalidations, path: str, arguments: argparse.Namespace) -> Iterator[str]:
    from pkernfs import api, client

    if arguments.ack is not None:
        content = f", {human(result.released)} of content and removed domains" if result.released else ""
        yield f"acknowledged: {plural(result.freed, 'page')} of old tables reclaimed{content}"
    pending = result.invalidations
    if not pending:
        yield "nothing to invalidate"
        return
    listing = client.ask(path, api.IommuList())
    formats = {domain.id: domain.format for domain in listing.domains if domain.id}
    roots = sorted({root.format for root in listing.roots}) or ["vtd"]
    queued: set[str] = set()
    for one in pending:
        known = formats.get(one.id)
        needed = [command for form in ([known] if known else roots) for command in commands(form, one)]
        yield _headline(one)
        yield "\n".join(f"  {command}" for command in needed if command not in queued) or "  as above"
        queued.update(needed)
    if any("page-selective" in command for command in queued):
        yield "where an address mask is above the unit's CAP.MAMV: domain-selective instead"
    if result.awaiting:
        yield f"waiting for invalidation: {human(result.awaiting)} of removed files, cut files and removed domains"
    yield f"then: {INVALIDATIONS} {printable(arguments.mount)} --ack {result.token}"


def _headline(one: api.Invalidation) -> str:
    if one.device is not None:
        return f"device {one.device}: its context has changed"
    if one.iova is None or one.length is None:
        return f"domain id {one.id}: all translations"
    return f"domain id {one.id}: {span(one.iova, one.length)} ({human(one.length)})"


def covering(iova: int, length: int) -> tuple[int, int]:
    """The smallest naturally aligned power-of-two range around a range of pages: its address, and log2 of its pages."""
    order = ((iova ^ (iova + length - 1)) // PAGE).bit_length()
    return iova >> (12 + order) << (12 + order), order


def commands(form: str, one: api.Invalidation) -> list[str]:
    """What a driver queues for one pending invalidation, in order."""
    name = one.id
    if one.device is not None:
        requester = pci.parse(one.device)
        source = f"{requester & 0xFFFF:#06x} of segment {requester >> 16:#x}"
        if form == "vtd":
            return [
                f"VT-d: context-cache invalidation, device-selective: source id {source}, function mask 0,"
                f" domain id {name}",
                f"VT-d: IOTLB invalidation, domain-selective: domain id {name}",
            ]
        return [f"AMD: INVALIDATE_DEVTAB_ENTRY: device id {source}", _amd_all(name)]
    if one.iova is None or one.length is None:
        return [f"VT-d: IOTLB invalidation, domain-selective: domain id {name}"] if form == "vtd" else [_amd_all(name)]
    address, order = covering(one.iova, one.length)
    if form == "vtd":
        return [
            f"VT-d: IOTLB invalidation, page-selective within domain: domain id {name}, address {address:#x},"
            f" address mask {order}, invalidation hint 0"
        ]
    # The size is where the lowest zero bit of the address is, from bit 12 on (AMD-Vi specification, 2.4.3).
    ones = ((1 << (order - 1)) - 1) * PAGE if order else 0
    return [
        f"AMD: INVALIDATE_IOMMU_PAGES: domain id {name}, address {address | ones:#x}, S={int(order > 0)}, PDE=1"
        f" ({human(PAGE << order)} from {address:#x})"
    ]


def _amd_all(name: int) -> str:
    return f"AMD: INVALIDATE_IOMMU_PAGES: domain id {name}, address 0x7ffffffffffff000, S=1, PDE=1 (all)"


def _old_arguments(parser: argparse.ArgumentParser) -> None:
    add_mount(parser)
    parser.add_argument("--done", action="store_true", help="as --ack all, or --ack TOKEN with --token")
    parser.add_argument("--token", metavar="N", type=int, help="with --done: of the list that was worked through")
    add_json(parser, UNITS)


def _run_old(arguments: argparse.Namespace) -> int:
    arguments.ack = (arguments.token or ALL) if arguments.done else None
    return _run(arguments)


# The second goes with the release after 0.2: until then scripts that use the old command go on working.  It does not
# say so on standard error, which such scripts may take for a failure.
VERBS = {
    "invalidations": Verb(DESCRIPTION, _arguments, _run),
    "iotlb-needed": Verb(OLD, _old_arguments, _run_old),
}
