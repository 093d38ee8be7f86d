"""pkernfs info: what a region, a mount or a file in it is."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from pkernfs.cli import direct
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human, memory_line, printable, show
from pkernfs.format import RO_COMPAT_NAMES

if TYPE_CHECKING:
    from pkernfs import api

DESCRIPTION = """\
Show a region (mounted or not), a mount, or the memory of a file in a mount: its extents as region offsets and physical
addresses, the mappings of IOMMU domains that pin it, and the processes that map it.

  pkernfs info /dev/shm/pkernfs.img
  pkernfs info /mnt/pkernfs
  pkernfs info --json /mnt/pkernfs/guest-ram
"""
SHOWN = 10  #: findings of damage; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """REGION, MOUNT or MOUNT/FILE."""
    parser.add_argument("target", metavar="REGION|MOUNT|MOUNT/FILE", help="what to look at")
    add_json(parser, "sizes in bytes, times in ns since the epoch")


def run(arguments: argparse.Namespace) -> int:
    """Find out what the target is and print its facts.  Raises PkernfsError."""
    from pkernfs import client
    from pkernfs.api import to_builtins
    from pkernfs.served import served, still_mounted

    target = arguments.target
    mount = client.mount_of(target)
    found = None if mount else served(os.path.realpath(target))
    mountpoint = mount.mountpoint if mount else next((one.mountpoint for one in found.here()), None) if found else None
    info: api.RegionInfo | api.FileInfo
    if mount is not None and os.path.isfile(target):
        info = client.file(target)
        lines = _file_lines(target, info)
    elif mount is not None or found is not None:
        info = client.info(target)
        if mountpoint is None and found is not None:
            holders = found.elsewhere()
            lines = region_lines(info, still_mounted(holders) if holders else "nowhere, but in use")
        else:
            lines = region_lines(info, f"on {mountpoint}")
    else:
        from pkernfs.cli.offline import with_filesystem
        from pkernfs.fs.facts import region_facts

        info = with_filesystem(target, region_facts)
        lines = region_lines(info)
    show(arguments, to_builtins(info) | {"mountpoint": mountpoint}, lines)
    return 0


def _when(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9)) if nanoseconds else "never"


def _power_cut(facts: api.RegionInfo) -> str:
    """What the end of the machine does to the region."""
    if not facts.volatile:
        return "ends what is in memory"
    if facts.readonly:
        return "leaves it whole, but for mounts with nobarrier"
    return "leaves it whole: barriers are on" if facts.barriers else "may damage it: mounted with nobarrier"


def region_lines(facts: api.RegionInfo, place: str = "") -> list[str]:
    """A region for people; ``place``: where it is mounted."""
    missing = facts.space - facts.space_used - facts.space_free
    needed = facts.features
    kinds = {"compat": needed.compat, "ro_compat": needed.ro_compat, "incompat": needed.incompat}
    kinds["ro_compat"] &= ~sum(RO_COMPAT_NAMES)
    features = [f"{kind} {bits:#x}" for kind, bits in kinds.items() if bits]
    features += [name for bit, name in RO_COMPAT_NAMES.items() if needed.ro_compat & bit]
    server = getattr(facts, "server", None)
    rows = {
        "region": f"{printable(facts.region)} ({facts.kind})",
        "mounted": f"{printable(place)}, server {server}" if place else "no",
        "power cut": _power_cut(facts),
        "uuid": facts.uuid,
        "label": printable(facts.label) or "-",
        "format": f"version {facts.version}, features: {', '.join(features) or 'none'}",
        "size": f"{human(facts.size)}: {facts.blocks} blocks of {human(facts.block_size)}",
        "physical": f"{facts.phys_base:#x} to {facts.phys_base + facts.size - 1:#x}",
        "space": f"{human(facts.space_used)} used, {human(facts.space_free)} free of {human(facts.space)}"
        + f": the host has no memory for {human(missing)}" * (missing > 0),
        "awaiting": "?" if facts.awaiting is None else f"{human(facts.awaiting)} waiting for invalidation",
        "memory": memory_line(facts.memory, facts.host_free),
        "free blocks": f"{facts.blocks_free}, {facts.blocks_largest_free_run} of them in one piece",
        "slabs": f"{facts.slabs} blocks cut into pages of 4 KiB",
        "inodes": f"{facts.inodes}, {'?' if facts.orphans is None else facts.orphans} of them without a name",
        "journal": f"{human(facts.journal.size)}, {facts.journal.sequence} transactions so far",
        "damaged": _damaged(facts.damaged),
        "created": _when(facts.created),
        "mounts": f"{facts.mounts}, the last from {_when(facts.last_mounted)}",
        "unmounted": _when(facts.last_unmounted),
    }
    return [f"{name:12} {text}" for name, text in rows.items()]


def _damaged(findings: list[api.Finding]) -> str:
    """How many structures were found damaged, and which, a line each."""
    if not findings:
        return "nothing that was read"
    lines = [f"{one.structure} at {one.offset:#x}: {one.found}" for one in findings[:SHOWN]]
    lines += [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
    count = f"{len(findings)} structure{'s' * (len(findings) != 1)}: run fsck.pkernfs"
    return f"\n{'':13}".join([count, *lines])


def _file_lines(path: str, facts: api.FileInfo) -> list[str]:
    shape = "contiguous" if facts.contiguous else f"{len(facts.extents)} extents"
    lines = [
        f"{printable(path)}: inode {facts.ino}, {facts.size} bytes, {human(facts.allocated)} allocated, {shape}",
        f"region {printable(facts.region)}",
        *map(printable, direct.lines(facts)),
    ]
    if facts.held is not None:
        from pkernfs.cli.hold import about

        lines.append(about(facts.held))
    if facts.extents:
        lines.append(f"{'file offset':>18} {'region offset':>18} {'physical':>18} {'length':>14}")
    for extent in facts.extents:
        place = f"{extent.file_offset:#18x} {extent.region_offset:#18x} {extent.physical:#18x}"
        lines.append(f"{place} {extent.length:#14x}")
    for pin in facts.pins:
        name = "a domain that is being removed" if pin.domain is None else f"domain {printable(pin.domain)}"
        what = f"IOVA {pin.iova:#x}, offset {pin.offset:#x}, length {pin.length:#x}, {pin.access}"
        lines.append(f"pinned by {name}: {what}")
    for one in facts.awaiting:
        what = f"offset {one.offset:#x}, length {one.length:#x}, of domain id {one.id}"
        lines.append(f"waiting for invalidation: {what}: see pkernfs iommu invalidations")
    return lines


VERBS = {"info": Verb(DESCRIPTION, add_arguments, run)}
