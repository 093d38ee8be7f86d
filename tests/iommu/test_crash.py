"""A crash at any store, under hardware that goes on walking.

It sees the old or the new translation, and what stays at every moment; the next mount finds that a change happened or
not, in records and tables alike.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest

from pkernfs.format import ROOT_INO as ROOT
from pkernfs.format import ROOT_PGTABLES_INO, GiB, Ino, KiB, MiB
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.iommu import devices, domain, mapping, pci, reclaim, replace, views
from pkernfs.iommu.awaiting import awaiting
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.records import Records
from pkernfs.iommu.restore import restore
from pkernfs.region import MemoryRegion
from tests.core.crash.scratch import Scratch, torn
from tests.core.support import ME, SEED, UUID, check, mkfile, open_fs
from tests.iommu.walker import Amd, AmdReason, Malformed, Memory, Vtd, VtdReason

BASE = 1 << 40
DEVICE, OTHER, THIRD, LATE = (pci.parse(word) for word in ("00:05.0", "00:06.0", "01:00.0", "00:07.0"))
#: A device that is not attached, as hardware says it.
NO_ENTRY = {VtdReason.ROOT_NOT_PRESENT, VtdReason.CONTEXT_NOT_PRESENT, AmdReason.ABORTED}
Run = Callable[[Filesystem], object]


def dom(fs: Filesystem, name: bytes = b"dom-0") -> Ino:
    return fs.resolve(b"iommu/" + name)


def maps(iova: int, name: bytes, offset: int, length: int, **more: Any) -> Run:
    return lambda fs: mapping.map_file(fs, dom(fs), iova, fs.resolve(name), offset, length, **more)


def unmaps(iova: int, length: int) -> Run:
    return lambda fs: mapping.unmap(fs, dom(fs), iova, length)


OPERATIONS: dict[str, Run] = {
    "create": lambda fs: domain.create(fs, b"new", "amd", 3, ME),
    "destroy": lambda fs: domain.destroy(fs, dom(fs, b"dom-1")),
    "map-beside": maps(64 * KiB, b"small", 0, 16 * KiB),
    "map-new-tables": maps(5 * GiB, b"guest", 0, 4 * MiB, access="ro"),
    "map-scattered": maps(8 * MiB + 4 * KiB, b"scattered", 0, 0),
    "map-hole": maps(8 * MiB, b"hole", 0, 0),
    "map-merges": maps(7 * MiB, b"guest", MiB, MiB),
    "unmap-splits": unmaps(2 * MiB + 64 * KiB, 8 * KiB),
    "unmap-table": unmaps(0, 64 * KiB),
    "unmap-all": unmaps(0, 16 * MiB),
    "unmap-last-of-unlinked": unmaps(GiB, 16 * KiB),
    "attach": lambda fs: devices.attach(fs, dom(fs, b"dom-1"), OTHER),
    "attach-new-bus": lambda fs: devices.attach(fs, dom(fs), THIRD, persistent=True),
    "attach-amd": lambda fs: devices.attach(fs, dom(fs, b"amd"), OTHER),
    "detach": lambda fs: devices.detach(fs, DEVICE),
    "mount": restore,
    "mount-cold": lambda fs: restore(fs, cold=True),
    "replace": lambda fs: replace.replace(fs, dom(fs), 1),
    "destroy-pending": lambda fs: domain.destroy(fs, dom(fs, b"late")),
    "unmap-pending": lambda fs: mapping.unmap(fs, dom(fs, b"late"), 16 * KiB, 32 * KiB),
    "cut-awaiting": lambda fs: fs.setattr(fs.resolve(b"was"), fs_size(5 * KiB)),
    "cut-awaiting-to-nothing": lambda fs: fs.setattr(fs.resolve(b"was"), fs_size(0)),
    "unlink-awaiting": lambda fs: fs.unlink(ROOT, b"was"),
    "acknowledged": reclaim.acknowledge,
}


@functools.cache
def image(form: str) -> bytes:
    """A domain in use: leaves of 4 KiB and 2 MiB, one of an unlinked file, a device, and pages that wait to be free."""
    region = MemoryRegion(36 * MiB)
    mkfs(region, uuid=UUID, hash_seed=SEED, phys_base=BASE)
    fs = open_fs(region)
    mkfile(fs, b"guest", bytes(range(1, 256)) * 16448)
    fs.setattr(fs.resolve(b"guest"), fs_size(6 * MiB))
    mkfile(fs, b"small", b"s" * 64 * KiB)
    mkfile(fs, b"gone", b"g" * 16 * KiB)
    for page in range(6):
        fs.write(mkfile(fs, b"between-%d" % page), 0, b"b")
        fs.write(fs.resolve(b"scattered") if page else mkfile(fs, b"scattered"), page * 4096, b"x" * 4096)
    fs.setattr(mkfile(fs, b"hole"), fs_size(0))
    fs.write(fs.resolve(b"hole"), 20 * KiB, b"end of a hole" * 400)
    domain.create(fs, b"dom-0", form, 4, ME)
    domain.create(fs, b"dom-1", form, 3, ME)
    domain.create(fs, b"amd", "amd", 4, ME)
    devices.attach(fs, dom(fs), DEVICE, persistent=form == "vtd")
    for iova, name, length in ((0, b"small", 64 * KiB), (2 * MiB, b"guest", 4 * MiB), (GiB, b"gone", 16 * KiB)):
        mapping.map_file(fs, dom(fs), iova, fs.resolve(name), 0, length)
    mapping.map_file(fs, dom(fs), 6 * MiB, fs.resolve(b"guest"), 0, MiB)
    mapping.map_file(fs, dom(fs, b"dom-1"), 0, fs.resolve(b"guest"), 0, 0, "ro")
    mapping.map_file(fs, dom(fs), 3 * GiB, fs.resolve(b"small"), 0, 64 * KiB)
    mapping.unmap(fs, dom(fs), 3 * GiB, 64 * KiB)
    fs.unlink(fs.resolve(b""), b"gone")
    # What awaits an invalidation: of a file, by a domain that lives on, and of one that was detached.
    for page in range(70):
        fs.write(fs.resolve(b"was") if page else mkfile(fs, b"was"), page * 8192, b"w" * 4096)
    domain.create(fs, b"late", form, 3, ME)
    devices.attach(fs, dom(fs, b"late"), LATE)
    mapping.map_file(fs, dom(fs, b"late"), 0, fs.resolve(b"small"), 0, 0)
    mapping.map_file(fs, dom(fs), 5 * GiB, fs.resolve(b"was"), 0, 0)
    mapping.unmap(fs, dom(fs), 5 * GiB, GiB)
    devices.detach(fs, LATE)
    assert check(fs.volume) == []
    assert views.audit(fs).problems == []
    return bytes(region.view)


def fs_size(size: int) -> Any:
    from pkernfs.fs.attributes import SetAttr

    return SetAttr(size=size)


class Hardware:
    """What devices can reach, as a walker sees it that knows nothing of journals and records."""

    def __init__(self, region: Scratch, form: str, root: int) -> None:
        memory = Memory(region.view, BASE)
        self.iommu = Vtd(memory, root) if form == "vtd" else Amd(memory, root)

    def reach(self, device: int) -> dict[int, tuple[int, int]]:
        """By page of IOVA: the physical page, and the rights."""
        found = {}
        try:
            for leaf in self.iommu.leaves(device):
                for at in range(0, leaf.length, 4096):
                    found[leaf.iova + at] = (leaf.physical + at, leaf.access)
        except Malformed as error:
            if error.fault.reason not in NO_ENTRY:
                raise
        return found


def seen(fs: Filesystem) -> dict[str, Any]:
    """What a user can see of it."""
    facts = views.list_all(fs)
    sizes = {name: fs.getattr(fs.resolve(b"iommu/" + name)).size for name, _ in named_domains(fs.volume)}
    pins = {name: fs.getattr(ino).iommu for name in (b"guest", b"small", b"was") for ino in inos(fs, name)}
    was = [(fs.getattr(ino).size, fs.content.extents(ino)) for ino in inos(fs, b"was")]
    kept = sorted(
        (*one[1:], fs.getattr(one.ino).nlink, fs.content.extents(one.ino))
        for one in awaiting(Records(fs.volume, ROOT_PGTABLES_INO))
    )
    return {"facts": facts, "sizes": sizes, "pins": pins, "was": was, "kept": kept}


def inos(fs: Filesystem, name: bytes) -> list[Ino]:
    """What a name in the root stands for, if it is there."""
    return [entry.ino for entry in fs.readdir(ROOT) if entry.name == name]


@pytest.mark.parametrize("form", ["vtd", "amd"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_at_any_store(name: str, form: str) -> None:
    region = Scratch(image(form))
    fs = open_fs(region)
    root = next(facts.physical for facts in views.list_all(fs).roots if facts.format == form)
    hardware = Hardware(region, form, root)
    states = [seen(fs)]
    reaches = [hardware.reach(DEVICE)]
    region.log.clear()
    OPERATIONS[name](fs)
    states.append(seen(fs))
    log = list(region.log)
    reaches.append(hardware.reach(DEVICE))
    assert log
    assert states[0] != states[1]
    region.reset(volatile=False)
    rng = random.Random(1)
    reached = 0
    again = OPERATIONS[name] if name.startswith("mount") else None
    for number, store in enumerate(log):
        where = f"store {number} of {len(log)} at {store.offset:#x}"
        for pieces in torn(store, 2, rng):
            mark = region.mark()
            region.apply(pieces)
            judge(region, hardware, states, reaches, f"in {where}", again)
            region.take_back(mark)
        region.apply([store])
        index = judge(region, hardware, states, reaches, f"after {where}", again)
        assert index >= reached, where
        reached = index
    assert reached == 1


def judge(
    region: Scratch,
    hardware: Hardware,
    states: list[dict[str, Any]],
    reaches: list[dict[int, Any]],
    where: str,
    again: Run | None,
) -> int:
    """Which of the two states a mount finds; leaves the region as it was.  ``again``: what it does first, in steps."""
    before, after = reaches
    reach = hardware.reach(DEVICE)
    for iova in before.keys() | after.keys() | reach.keys():
        allowed = {before.get(iova), after.get(iova)}
        assert reach.get(iova) in allowed, (
            f"{where}: IOVA {iova:#x} translates to {reach.get(iova)}, expected one of {allowed}"
        )
    mark = region.mark()
    fs = open_fs(region)
    if again:
        again(fs)
    problems = [*check(fs.volume), *views.audit(fs).problems]
    assert problems == [], where
    found = states.index(seen(fs))
    region.take_back(mark)
    assert found or not again, where
    return found
