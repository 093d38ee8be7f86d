"""pkernfs iommu iotlb-needed: what hardware must be told to forget."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pkernfs.cli.iommu_words import Command, ask, existing, plural, span
from pkernfs.cli.words import human, printable
from pkernfs.format import PAGE
from pkernfs.iommu import pci

IOTLB_NEEDED = """\
Show what an IOMMU may have cached of tables that have changed since, as the commands that its driver must queue: for
Intel VT-d (specification, 6.5) and AMD-Vi (specification, 2.4).  pkernfs changes memory; it does not touch hardware.

  pkernfs iommu iotlb-needed /mnt/pkernfs            what is to be invalidated
  pkernfs iommu iotlb-needed /mnt/pkernfs --done     all that it showed has been: pages of old tables are free again

Until --done no page of an old table is used again, so a cache that is late leads to old memory, not to other tables.
Say --done after the IOMMU reported the end of the commands (VT-d: Invalidation Wait Descriptor; AMD: COMPLETION_WAIT).
Where somebody else may change mappings meanwhile, add --token N, the number that the list ended with: it fails (EAGAIN)
when there is more by now.
"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("--done", action="store_true", help="confirm: hardware has forgotten all of it")
    parser.add_argument("--token", metavar="N", type=int, help="with --done: of the list that was worked through")


def _run(arguments: argparse.Namespace) -> int:
    path = existing(arguments.mount, "a path")
    result = ask(path, "iotlb-needed", done=arguments.done, token=arguments.token or 0)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    if arguments.done:
        print(f"confirmed: {plural(result['freed'], 'page')} of old tables free again")
    stale = result["stale"]
    if not stale:
        print("nothing to invalidate")
        return 0
    listing = ask(path, "list")
    formats = {domain["id"]: domain["format"] for domain in listing["domains"] if domain["id"]}
    roots = sorted({root["format"] for root in listing["roots"]}) or ["vtd"]
    queued: set[str] = set()
    for one in stale:
        known = formats.get(one["id"])
        needed = [command for form in ([known] if known else roots) for command in commands(form, one)]
        print(_headline(one))
        print("\n".join(f"  {command}" for command in needed if command not in queued) or "  as above")
        queued.update(needed)
    if any("page-selective" in command for command in queued):
        print("where an address mask is above the unit's CAP.MAMV: domain-selective instead")
    print(f"then: pkernfs iommu iotlb-needed {printable(arguments.mount)} --done --token {result['token']}")
    return 0


def _headline(one: dict[str, Any]) -> str:
    if one["kind"] == "context":
        return f"device {one['device']}: its context has changed"
    if one["length"] is None:
        return f"domain id {one['id']}: all translations"
    return f"domain id {one['id']}: {span(one['iova'], one['length'])} ({human(one['length'])})"


def covering(iova: int, length: int) -> tuple[int, int]:
    """The smallest naturally aligned power-of-two range around a range of pages: its address, and log2 of its pages."""
    order = ((iova ^ (iova + length - 1)) // PAGE).bit_length()
    return iova >> (12 + order) << (12 + order), order


def commands(form: str, one: dict[str, Any]) -> list[str]:
    """What a driver queues for one thing that is stale, in order."""
    name = one["id"]
    if one["kind"] == "context":
        requester = pci.parse(one["device"])
        source = f"{requester & 0xFFFF:#06x} of segment {requester >> 16:#x}"
        if form == "vtd":
            return [
                f"VT-d: context-cache invalidation, device-selective: source id {source}, function mask 0,"
                f" domain id {name}",
                f"VT-d: IOTLB invalidation, domain-selective: domain id {name}",
            ]
        return [f"AMD: INVALIDATE_DEVTAB_ENTRY: device id {source}", _amd_all(name)]
    if one["length"] is None:
        return [f"VT-d: IOTLB invalidation, domain-selective: domain id {name}"] if form == "vtd" else [_amd_all(name)]
    address, order = covering(one["iova"], one["length"])
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


COMMANDS = {"iotlb-needed": Command(IOTLB_NEEDED, _arguments, _run)}
