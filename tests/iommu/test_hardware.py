"""Hardware walks tables of a real mount: what devices do by DMA lands where the mappings say, and nowhere else.

The hardware is QEMU's, without a guest; it goes on while servers and mounts are killed.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest

from pkernfs.format import BLOCK, PAGE, GiB, MiB
from tests.iommu.machine import HIGH_MEMORY, Device
from tests.iommu.rig import DEVICES, Rig, new_rig
from tests.iommu.walker import READ, WRITE, AmdReason, Translation, VtdReason
from tests.mount.site import errno_of, run

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]
ONE, TWO = DEVICES
DATA = bytes(range(256)) * 16
#: What the log of a mount may hold that all tests of this module use.
EXPECTED = re.compile("another one takes over|no space is left")
BOTH = pytest.mark.parametrize("form", ["vtd", "amd"])


@pytest.fixture(scope="module")
def rigs(qemu: None) -> Iterator[Callable[[str], Rig]]:  # noqa: ARG001  # it skips
    """By format, one mount with its machine for all tests of this module."""
    with ExitStack() as stack:
        yield functools.cache(lambda form: stack.enter_context(new_rig(form)))


@pytest.fixture
def rig(rigs: Callable[[str], Rig], form: str) -> Iterator[Rig]:
    """A region of 64 MiB at physical address 0, and two devices; everything is taken away at the end."""
    rig = rigs(form)
    yield rig
    rig.clear()


@BOTH
def test_both_directions(rig: Rig) -> None:
    both_directions(rig)


@BOTH
@pytest.mark.usefixtures("qemu")
def test_memory_beyond_4_gib(form: str) -> None:
    with new_rig(form, base=HIGH_MEMORY) as rig:
        both_directions(rig)


def both_directions(rig: Rig) -> None:
    """Leaves of 4 KiB and 2 MiB, memory in one piece and scattered, from one page to the next."""
    domain = rig.domain("dom-0", ONE)
    device, other = rig.devices
    rig.scattered(("scattered", "between"), 12)
    rig.file("ram", 3 * BLOCK)
    rig.iommu("map", domain, GiB - 2 * BLOCK, rig.mnt / "ram")
    rig.iommu("map", domain, 0x10000, rig.mnt / "scattered")
    rig.iommu("map", domain, 0x7F00_0000_1000, rig.mnt / "ram", "--offset", BLOCK, "--length", 2 * PAGE)
    sizes = {leaf.length for leaf in rig.walker.leaves(device.id)}
    assert sizes == {PAGE, BLOCK}
    ram = rig.at("ram", 0)
    # In a large leaf; from one to the next, which another table holds; and the same memory again, by 4 KiB leaves.
    rig.lands(device, GiB - 2 * BLOCK + 0x12345, DATA[:3000], [(ram + 0x12345, 3000)])
    rig.lands(device, GiB - 100, DATA[:300], [(ram + 2 * BLOCK - 100, 300)])
    rig.lands(device, 0x7F00_0000_1000 + PAGE - 8, DATA[:4096], [(ram + BLOCK + PAGE - 8, 4096)])
    pages = [rig.at("scattered", page * PAGE) for page in range(12)]
    scattered = [
        (0x10000 + page * PAGE + 1000, DATA, [(here + 1000, 3096), (there, 1000)])
        for page, (here, there) in enumerate(pairwise(pages))
    ]
    rig.all_land(device, scattered)
    # What a device has written is what a program reads.
    with open(rig.mnt / "scattered", "rb", buffering=0) as file:
        assert file.read(PAGE + 1000)[1000:PAGE] == bytes(byte ^ 0xFF for byte in DATA[:3096])
    # The other device is attached to nothing.
    rig.refuses(other, GiB, WRITE)
    rig.refuses(other, 0x10000, READ)


@pytest.mark.parametrize(("form", "levels"), [("vtd", 3), ("amd", 3), ("amd", 5)])
def test_tables_of_other_depths(rig: Rig, levels: int) -> None:
    """All but VT-d's 5 levels, which QEMU has not."""
    domain = rig.domain("dom-0", ONE, levels=levels)
    device = rig.devices[0]
    rig.file("ram", 2 * BLOCK)
    last = (1 << 12 + 9 * levels) - 2 * BLOCK
    for iova in (BLOCK, last):
        rig.iommu("map", domain, iova, rig.mnt / "ram")
        rig.lands(device, iova + BLOCK - 8, DATA, [(rig.at("ram", BLOCK - 8), 4096)])
    rig.refuses(device, 0, READ)
    rig.refuses(device, 1 << 12 + 9 * levels, WRITE)


@pytest.mark.usefixtures("qemu")
def test_devices_of_other_buses() -> None:
    """Each bus has a context table; QEMU's AMD-Vi takes all devices for those of bus 0."""
    with new_rig("vtd", devices=("01:00.0", "02:00.0", "00:1e.0")) as rig:
        first, second, third = rig.devices
        rig.iommu("map", rig.domain("dom-0", first.name, third.name), 0, rig.file("a", BLOCK))
        rig.iommu("map", rig.domain("dom-1", second.name), 0, rig.file("b", BLOCK))
        for device, name in ((first, "a"), (second, "b"), (third, "a")):
            rig.lands(device, 0x1234, DATA, [(rig.at(name, 0x1234), 4096)])
        rig.iommu("detach", rig.mnt, first.name)
        rig.invalidate()
        rig.refuses(first, 0, WRITE)
        rig.lands(third, 0, DATA, [(rig.at("a", 0), 4096)])


@BOTH
@pytest.mark.usefixtures("qemu")
def test_leaves_of_1_gib(form: str) -> None:
    with new_rig(form, size=2100 * MiB, disk=True) as rig:
        domain = rig.domain("dom-0", ONE)
        device = rig.devices[0]
        rig.file("ram", 2060 * MiB)
        (extent,) = rig.extents("ram")
        offset = -extent.physical % GiB
        rig.iommu("map", domain, 5 * GiB, rig.mnt / "ram", "--offset", offset, "--length", GiB)
        assert [leaf.length for leaf in rig.walker.leaves(device.id)] == [GiB, PAGE]
        start = extent.region + offset
        places = (0, 123 * MiB + 77, 511 * MiB, GiB - 4096)
        rig.all_land(device, [(5 * GiB + at, DATA, [(start + at, 4096)]) for at in places])
        rig.refuses(device, 6 * GiB, WRITE)


@BOTH
def test_rights(rig: Rig) -> None:
    domain = rig.domain("dom-0", ONE)
    device = rig.devices[0]
    rig.file("ram", BLOCK)
    rig.iommu("map", domain, 0x10000, rig.mnt / "ram", "--length", PAGE, "--ro")
    rig.iommu("map", domain, 0x11000, rig.mnt / "ram", "--offset", PAGE, "--length", PAGE, "--wo")
    rig.iommu("map", domain, 4 * BLOCK, rig.mnt / "ram", "--ro")
    ram = rig.at("ram", 0)
    rig.memory[ram : ram + 2 * PAGE] = DATA + DATA
    unmapped, read_only, write_only = 0x13000, 0x10000, 0x11000
    assert {rig.refuses(device, read_only, WRITE).reason, rig.refuses(device, 4 * BLOCK, WRITE).reason} <= {
        VtdReason.NO_WRITE,
        AmdReason.PAGE_FAULT,
    }
    assert rig.refuses(device, write_only, READ).reason in (VtdReason.NO_READ, AmdReason.PAGE_FAULT)
    for iova in (unmapped, 1 << 40, (1 << 48) - PAGE):
        assert rig.refuses(device, iova, READ).reason in (VtdReason.NO_READ, AmdReason.PAGE_FAULT)
        assert rig.refuses(device, iova, WRITE).reason in (VtdReason.NO_WRITE, AmdReason.PAGE_FAULT)
    rig.memory[ram : ram + 4] = b"seen"
    assert rig.read(device, read_only, 4) == rig.read(device, 4 * BLOCK, 4) == b"seen"
    rig.write(device, write_only, b"done")
    assert rig.memory[ram + PAGE : ram + PAGE + 4] == b"done"


@BOTH
def test_two_domains(rig: Rig) -> None:
    for name, device in (("a", ONE), ("b", TWO)):
        domain = rig.domain(f"dom-{name}", device)
        rig.file(f"ram-{name}", BLOCK)
        rig.iommu("map", domain, 0, rig.mnt / f"ram-{name}")
    rig.iommu("map", rig.mnt / "iommu/dom-b", 8 * BLOCK, rig.mnt / "ram-b")
    one, two = rig.devices
    rig.lands(one, 0x5000, DATA, [(rig.at("ram-a", 0x5000), 4096)])
    rig.lands(two, 0x5000, DATA, [(rig.at("ram-b", 0x5000), 4096)])
    rig.lands(two, 8 * BLOCK + 5, b"two", [(rig.at("ram-b", 5), 3)])
    rig.refuses(one, 8 * BLOCK, READ)
    rig.refuses(one, 8 * BLOCK, WRITE)
    reachable = {name: rig.walker.leaves(device.id) for name, device in (("a", one), ("b", two))}
    where = {name: {leaf.physical for leaf in leaves} for name, leaves in reachable.items()}
    assert where["a"] & where["b"] == {rig.base + rig.stage}


class Traffic:
    """A device that goes on with DMA: each round writes to one place of ``ram`` and reads it back."""

    def __init__(self, rig: Rig, device: Device, iova: int, ram: int, size: int) -> None:
        self.rig, self.device, self.iova, self.ram, self.size = rig, device, iova, ram, size
        self.rounds = 0

    def round(self) -> None:
        """It lands, nobody was told of a fault, and what was read is what was there."""
        self.rounds += 1
        at = self.rounds * 0x11_1040 % self.size & -64
        data = self.rounds.to_bytes(8, "little") * 8
        self.rig.write(self.device, self.iova + at, data)
        assert self.rig.memory[self.ram + at : self.ram + at + 64] == data, f"IOVA {self.iova + at:#x}"
        self.rig.memory[self.ram + at : self.ram + at + 64] = data[::-1]
        assert self.rig.read(self.device, self.iova + at, 64) == data[::-1], f"IOVA {self.iova + at:#x}"
        self.rig.quiet()

    def go(self, rounds: int = 50) -> None:
        for _ in range(rounds):
            self.round()


def traffic(rig: Rig, iova: int = GiB, name: str = "dom-0", device: int = 0) -> Traffic:
    """A device with 8 MiB of its own at an IOVA."""
    domain = rig.domain(name, (ONE, TWO)[device])
    rig.file(f"ram-{name}", 4 * BLOCK)
    (extent,) = rig.extents(f"ram-{name}")
    rig.iommu("map", domain, iova, rig.mnt / f"ram-{name}")
    return Traffic(rig, rig.devices[device], iova, extent.region, 4 * BLOCK)


@BOTH
def test_the_server_is_killed(rig: Rig) -> None:
    rig.site.expected = EXPECTED
    device = traffic(rig)
    device.go()
    os.kill(rig.site.worker(), signal.SIGKILL)
    device.go()
    # The next one serves while the device goes on, and finds it all as it was.
    domain = rig.mnt / "iommu/dom-0"
    words = ("map", domain, hex(GiB), rig.mnt / "ram-dom-0", "--live-update")
    rig.during(words, device.round)
    rig.iommu("map", domain, 3 * GiB, rig.mnt / "ram-dom-0")
    device.go()
    assert rig.reaches(device.device, 3 * GiB) == device.ram


@BOTH
def test_the_mount_is_killed_and_made_again(rig: Rig) -> None:
    """A kexec with the hardware running: persistent devices go on throughout, others are detached by the next mount."""
    kept, other = traffic(rig), traffic(rig, 2 * GiB, "dom-1", 1)
    rig.iommu("detach", rig.mnt, TWO)
    rig.iommu("attach", rig.mnt / "iommu/dom-1", TWO)
    rig.invalidate()
    kept.go()
    other.go()
    before = rig.site.digest()
    rig.site.crash()
    assert rig.site.digest() == before
    kept.go()
    other.go()
    rig.site.mount()
    kept.go()
    pending = rig.invalidate()
    assert {"context"} == {each["kind"] for each in pending if each["device"]}
    kept.go()
    fault = rig.refuses(other.device, 2 * GiB, WRITE)
    assert fault.reason in (VtdReason.CONTEXT_NOT_PRESENT, AmdReason.ABORTED)
    rig.refuses(other.device, 2 * GiB, READ)
    # Its owner claims the persistent one, and checks that the mappings are there.
    domains = {one["name"]: one for one in rig.iommu("list", rig.mnt)["domains"]}
    (device,) = domains["dom-0"]["devices"]
    assert device["state"] == "deferred"
    rig.iommu("map", rig.mnt / "iommu/dom-0", GiB, rig.mnt / "ram-dom-0", "--live-update")
    device = rig.iommu("attach", rig.mnt / "iommu/dom-0", ONE)
    assert (device["state"], device["persistent"]) == ("attached", True)
    assert rig.invalidate() == []
    kept.go()
    # The other one is attached anew.
    rig.iommu("attach", rig.mnt / "iommu/dom-1", TWO)
    other.go()


@BOTH
def test_a_cold_mount_cuts_all_off(rig: Rig) -> None:
    device = traffic(rig)
    device.go(5)
    rig.site.crash()
    rig.site.mount("cold")
    # The machine was off: its IOMMU has nothing cached.
    rig.machine.unit.invalidate_all()
    fault = rig.refuses(device.device, GiB, WRITE)
    assert fault.reason in (VtdReason.CONTEXT_NOT_PRESENT, AmdReason.ABORTED)
    rig.refuses(device.device, GiB, READ)
    rig.iommu("attach", rig.mnt / "iommu/dom-0", ONE)
    device.go(5)


@BOTH
def test_tables_are_replaced_under_dma(rig: Rig) -> None:
    device = traffic(rig)
    samples = 0
    for leaf in ("4K", "2M", "1G"):
        samples += rig.during(("replace", rig.mnt / "iommu/dom-0", "--leaf", leaf), device.round)
        device.go(10)
        pending = rig.invalidate()
        assert {each["kind"] for each in pending} == {"context", "iotlb"}
        device.go(10)
        sizes = {each.length for each in rig.walker.leaves(device.device.id)}
        assert sizes == ({PAGE} if leaf == "4K" else {PAGE, BLOCK})
    assert samples


@BOTH
def test_a_leaf_is_split_and_merged_under_dma(rig: Rig) -> None:
    device = traffic(rig)
    domain = rig.mnt / "iommu/dom-0"
    hole = GiB + BLOCK + 5 * PAGE
    device.size = BLOCK + 5 * PAGE
    rig.write(device.device, hole, DATA)  # so that it is cached
    samples = rig.during(("unmap", domain, hex(hole), "4K"), device.round)
    device.go(10)
    rig.invalidate()
    device.go(10)
    rig.refuses(device.device, hole, WRITE)
    rig.refuses(device.device, hole, READ)
    assert rig.reaches(device.device, hole + PAGE) == device.ram + BLOCK + 6 * PAGE
    offset = BLOCK + 5 * PAGE
    words = ("map", domain, hex(hole), rig.mnt / "ram-dom-0", "--offset", hex(offset), "--length", "4K")
    samples += rig.during(words, device.round)
    rig.invalidate()
    device.size = 4 * BLOCK
    device.go()
    found = rig.walker.translate(device.device.id, hole, WRITE)
    assert isinstance(found, Translation)
    assert found.size == BLOCK
    assert samples


@BOTH
def test_unmapped_memory_is_out_of_reach_after_the_invalidation_that_is_pending(rig: Rig) -> None:
    device = traffic(rig)
    other = traffic(rig, GiB, "dom-1", 1)
    domain = rig.mnt / "iommu/dom-0"
    device.go()
    other.go()
    rig.read(device.device, GiB, 4)
    pending = rig.iommu("unmap", domain, GiB, 4 * BLOCK)["stale"]
    # The hardware has it cached: this is what the invalidation is for.
    rig.memory[device.ram : device.ram + 4] = b"gone"
    assert rig.read(device.device, GiB, 4) == b"gone"
    assert {(each["kind"], each["device"]) for each in pending} == {("iotlb", None)}
    assert rig.invalidate() == pending
    assert rig.refuses(device.device, GiB, READ).reason in (VtdReason.NO_READ, AmdReason.PAGE_FAULT)
    rig.refuses(device.device, GiB + 4 * BLOCK - PAGE, WRITE)
    other.go()
    # Its memory is free for others now.
    result = run("pkernfs", "iommu", "unmap", domain, hex(GiB), hex(BLOCK))
    assert result.returncode == 1
    os.unlink(rig.mnt / "ram-dom-0")


def take_all(rig: Rig) -> None:
    """Let files take all memory that is free."""
    for number, step in enumerate((4 * BLOCK, BLOCK, PAGE)):
        path = rig.file(f"taken-{number}", 0)
        while not errno_of(os.truncate, path, path.stat().st_size + step):
            pass
        assert errno_of(os.truncate, path, path.stat().st_size + step) == errno.ENOSPC


def unmap_and_remove(rig: Rig) -> None:
    rig.iommu("unmap", rig.mnt / "iommu/dom-0", GiB, 4 * BLOCK)
    os.unlink(rig.mnt / "ram-dom-0")


def remove_and_unmap(rig: Rig) -> None:
    os.unlink(rig.mnt / "ram-dom-0")
    rig.iommu("unmap", rig.mnt / "iommu/dom-0", GiB, 4 * BLOCK)


def unmap_and_cut(rig: Rig) -> None:
    rig.iommu("unmap", rig.mnt / "iommu/dom-0", GiB, 4 * BLOCK)
    os.truncate(rig.mnt / "ram-dom-0", 0)


def unmap_and_write_anew(rig: Rig) -> None:
    """As cp(1) does it: O_TRUNC, and other content."""
    rig.iommu("unmap", rig.mnt / "iommu/dom-0", GiB, 4 * BLOCK)
    (rig.mnt / "ram-dom-0").write_bytes(b"anew" * BLOCK)
    os.sync()


def detach_and_destroy(rig: Rig) -> None:
    rig.iommu("detach", rig.mnt, ONE)
    rig.iommu("destroy", rig.mnt / "iommu/dom-0")
    os.unlink(rig.mnt / "ram-dom-0")


@BOTH
@pytest.mark.parametrize(
    "taking", [unmap_and_remove, remove_and_unmap, unmap_and_cut, unmap_and_write_anew, detach_and_destroy]
)
def test_dma_by_what_is_cached_reaches_nobody_s_memory(rig: Rig, taking: Callable[[Rig], None]) -> None:
    """A device that hardware still translates for stores after its memory was freed, before that is acknowledged."""
    rig.site.expected = EXPECTED
    stale = traffic(rig)
    domain = rig.domain("dom-1", TWO)
    other = rig.devices[1]
    stale.go(5)
    rig.give(stale.device, DATA)
    stale.device.store(GiB, len(DATA))  # the device holds DATA, and the hardware has translated the IOVA
    taking(rig)
    take_all(rig)
    assert rig.command("info", "--json", str(rig.mnt))["awaiting"] >= 4 * BLOCK
    rig.memory[stale.ram : stale.ram + len(DATA)] = bytes(len(DATA))
    before = rig.snapshot()
    stale.device.store(GiB, len(DATA))
    assert rig.memory[stale.ram : stale.ram + len(DATA)] == DATA, "expected the hardware to have it cached"
    rig.memory[stale.ram : stale.ram + len(DATA)] = bytes(len(DATA))
    assert rig.snapshot() == before, "what was stored has reached more than what was unmapped"
    rig.memory[stale.ram : stale.ram + len(DATA)] = DATA
    old = range(stale.ram, stale.ram + 4 * BLOCK)
    for path in rig.mnt.iterdir():
        for one in rig.extents(path.name) if path.is_file() else ():
            assert not (one.region < old.stop and old.start < one.region + one.length), f"{path.name} has got it"
    said = rig.command("explain", "--json", "--offset", str(rig.site.region), str(stale.ram))
    assert (said["path"], said["awaits"]) == (None, rig.iommu("invalidations", rig.mnt)["token"])
    # After the acknowledgement it comes back, as zeros, and no device reaches it.
    rig.invalidate()
    fault = rig.refuses(stale.device, GiB, WRITE)
    assert fault.reason in (
        VtdReason.NO_WRITE,
        VtdReason.CONTEXT_NOT_PRESENT,
        AmdReason.PAGE_FAULT,
        AmdReason.ABORTED,
    )
    assert rig.command("info", "--json", str(rig.mnt))["awaiting"] == 0
    rig.iommu("map", domain, GiB, rig.file("next", 4 * BLOCK))
    (extent,) = rig.extents("next")
    assert 0 <= stale.ram - extent.region < extent.length, "expected what is free to be given out, the lowest first"
    assert rig.read(other, GiB + stale.ram - extent.region, len(DATA)) == bytes(len(DATA))


@BOTH
def test_a_detached_device(rig: Rig) -> None:
    device, other = traffic(rig), traffic(rig, GiB, "dom-1", 1)
    device.go(5)
    other.go(5)
    rig.iommu("detach", rig.mnt, ONE)
    pending = rig.invalidate()
    assert sorted(each["kind"] for each in pending) == ["context", "iotlb"]
    fault = rig.refuses(device.device, GiB, WRITE)
    assert fault.reason in (VtdReason.CONTEXT_NOT_PRESENT, AmdReason.ABORTED)
    rig.refuses(device.device, GiB, READ)
    other.go(5)


@BOTH
def test_the_steps_of_walk_are_what_the_hardware_takes(rig: Rig) -> None:
    device = traffic(rig)
    domain = rig.mnt / "iommu/dom-0"
    rig.iommu("unmap", domain, GiB + 0x3000, PAGE)
    rig.invalidate()
    for at in (0, 0x2FF8, 0x4000, BLOCK + 0x1234):
        said = rig.iommu("walk", rig.mnt, ONE, GiB + at)
        assert said["physical"] == rig.base + rig.reaches(device.device, GiB + at) == rig.base + device.ram + at
        for step in said["steps"]:
            assert step["entry"] == rig.walker.memory.load(step["address"], VtdReason.TABLE_OUTSIDE_MEMORY)
        rig.lands(device.device, GiB + at, b"here", [(device.ram + at, 4)])
    result = run("pkernfs", "iommu", "walk", "--json", rig.mnt, ONE, hex(GiB + 0x3000))
    assert json.loads(result.stdout)["physical"] is None
    assert json.loads(result.stdout)["fault"]
    rig.refuses(device.device, GiB + 0x3000, READ)
