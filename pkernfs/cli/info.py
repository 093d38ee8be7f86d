"""pkernfs info: what a region, a mount or a file in it is."""

import argparse
import json
import os
import time
from typing import Any

from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human, printable

DESCRIPTION = """\
Show a region (mounted or not), a mount, or the memory of a file in a mount: its extents as region offsets and physical
addresses, and the mappings of IOMMU domains that pin it.

  pkernfs info /dev/shm/pkernfs.img
  pkernfs info /mnt/pkernfs
  pkernfs info --json /mnt/pkernfs/guest-ram
"""
SHOWN = 10  #: findings of damage; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """REGION, MOUNT or MOUNT/FILE."""
    parser.add_argument("target", metavar="REGION|MOUNT|MOUNT/FILE")
    add_json(parser, "sizes in bytes, times in ns since the epoch")


def run(arguments: argparse.Namespace) -> int:
    """Find out what the target is and print its facts.  Raises PkernfsError."""
    from pkernfs.client import control, mount_of
    from pkernfs.mountinfo import mountpoints_of

    target = arguments.target
    real = os.path.realpath(target)
    mount = mount_of(target)
    if mount is not None:
        verb = "file" if os.path.isfile(target) else "info"
        facts = control(target, verb)
        facts["mountpoint"] = mount.mountpoint
    elif mounted := mountpoints_of(real):
        verb = "info"
        facts = control(mounted[0], verb)
        facts["mountpoint"] = mounted[0]
    else:
        from pkernfs.cli.offline import with_filesystem
        from pkernfs.fs.facts import region_facts

        verb = "info"
        facts = with_filesystem(target, region_facts)
        facts["mountpoint"] = None
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif verb == "file":
        _print_file(target, facts)
    else:
        _print_region(facts)
    return 0


def _when(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9)) if nanoseconds else "never"


def _power_cut(facts: dict[str, Any]) -> str:
    """What the end of the machine does to the region."""
    if not facts["volatile"]:
        return "ends what is in memory"
    if facts["readonly"]:
        return "leaves it whole, but for mounts with nobarrier"
    return "leaves it whole: barriers are on" if facts["barriers"] else "may damage it: mounted with nobarrier"


def _print_region(facts: dict[str, Any]) -> None:
    used = facts["space"] - facts["space_free"]
    features = [f"{kind} {bits:#x}" for kind, bits in facts["features"].items() if bits]
    rows = {
        "region": f"{facts['region']} ({facts['kind']})",
        "mounted": f"on {facts['mountpoint']}, server {facts['server']}" if facts["mountpoint"] else "no",
        "power cut": _power_cut(facts),
        "uuid": facts["uuid"],
        "label": printable(facts["label"]) or "-",
        "format": f"version {facts['version']}, features: {', '.join(features) or 'none'}",
        "size": f"{human(facts['size'])}: {facts['blocks']} blocks of {human(facts['block_size'])}",
        "physical": f"{facts['phys_base']:#x} to {facts['phys_base'] + facts['size'] - 1:#x}",
        "space": f"{human(used)} used, {human(facts['space_free'])} free of {human(facts['space'])}",
        "free blocks": f"{facts['blocks_free']}, {facts['blocks_largest_free_run']} of them in one piece",
        "slabs": f"{facts['slabs']} blocks cut into pages of 4 KiB",
        "inodes": f"{facts['inodes']}, {'?' if facts['orphans'] is None else facts['orphans']} of them without a name",
        "journal": f"{human(facts['journal']['size'])}, {facts['journal']['sequence']} transactions so far",
        "damaged": _damaged(facts["damaged"]),
        "created": _when(facts["created"]),
        "mounts": f"{facts['mounts']}, the last from {_when(facts['last_mounted'])}",
        "unmounted": _when(facts["last_unmounted"]),
    }
    for name, text in rows.items():
        print(f"{name:12} {text}")


def _damaged(findings: list[dict[str, Any]]) -> str:
    """How many structures were found damaged, and which, a line each."""
    if not findings:
        return "nothing that was read"
    lines = [f"{one['structure']} at {one['offset']:#x}: {one['found']}" for one in findings[:SHOWN]]
    lines += [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
    count = f"{len(findings)} structure{'s' * (len(findings) != 1)}: run fsck.pkernfs"
    return f"\n{'':13}".join([count, *lines])


def _print_file(path: str, facts: dict[str, Any]) -> None:
    shape = "contiguous" if facts["contiguous"] else f"{len(facts['extents'])} extents"
    print(f"{path}: inode {facts['ino']}, {facts['size']} bytes, {human(facts['allocated'])} allocated, {shape}")
    print(f"region {facts['region']}, {'mapped directly' if facts['direct'] else 'not mapped directly'}")
    if facts["extents"]:
        print(f"{'file offset':>18} {'region offset':>18} {'physical':>18} {'length':>14}")
    for extent in facts["extents"]:
        print(
            f"{extent['file_offset']:#18x} {extent['region_offset']:#18x} {extent['physical']:#18x} "
            f"{extent['length']:#14x}"
        )
    for pin in facts["pins"]:
        name = "a domain that is being removed" if pin["domain"] is None else f"domain {printable(pin['domain'])}"
        print(
            f"pinned by {name}: IOVA {pin['iova']:#x}, offset {pin['offset']:#x}, length {pin['length']:#x}, "
            f"{pin['access']}"
        )


VERBS = {"info": Verb(DESCRIPTION, add_arguments, run)}
