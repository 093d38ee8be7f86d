"""`pkernfs iommu` on a real mount, as a script uses it; what devices reach is told by the second walker."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pkernfs import client
from pkernfs.vfio import Container, DmaMapping
from tests.iommu.space import DEVICE, OTHER, GiB, KiB, MiB
from tests.iommu.walker import Fault, Memory, Translation, Vtd
from tests.mount.site import Site, run, site, wait_for

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="the mount of these tests is root's"),
]
READ, WRITE = 1, 2


@pytest.fixture
def place() -> Iterator[Site]:
    """A mount with a guest's memory and a domain."""
    with site() as made:
        made.mount()
        with (made.mnt / "guest-ram").open("wb") as file:
            file.truncate(8 * MiB)
        made.run_ok("pkernfs", "iommu", "create", made.mnt / "iommu/dom-0")
        yield made


def iommu(site: Site, verb: str, *words: object) -> dict[str, Any]:
    """A verb that must succeed; what --json prints."""
    result: dict[str, Any] = json.loads(site.run_ok("pkernfs", "iommu", verb, *map(str, words), "--json"))
    return result


def refused(verb: str, *words: object) -> str:
    """A verb that must fail with status 1; its line."""
    result = run("pkernfs", "iommu", verb, *map(str, words))
    assert result.returncode == 1, result
    return result.line


class Hardware:
    """An IOMMU that has the region as its memory."""

    def __init__(self, site: Site) -> None:
        self.root = int(site.run_ok("pkernfs", "iommu", "root", site.mnt), 0)
        with site.region.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.vtd = Vtd(Memory(memoryview(self.map)), self.root)

    def reach(self, iova: int, device: int = DEVICE, access: int = READ | WRITE) -> int | None:
        """The physical address that an access goes to; None: it faults."""
        found = self.vtd.translate(device, iova, access)
        assert isinstance(found, Translation | Fault)
        return found.physical if isinstance(found, Translation) else None


def physical(site: Site, name: str, offset: int = 0) -> int:
    """Where a byte of a file is, as info tells."""
    extents = json.loads(site.run_ok("pkernfs", "info", site.mnt / name, "--json"))["extents"]
    found = next(one for one in extents if one["file_offset"] <= offset < one["file_offset"] + one["length"])
    return int(found["physical"]) + offset - int(found["file_offset"])


def test_map_attach_walk_unmap(place: Site) -> None:
    dom, ram = place.mnt / "iommu/dom-0", place.mnt / "guest-ram"
    done = iommu(place, "map", dom, "0x40000000", ram, "--offset", "2M", "--length", "4M")
    assert (done["iova"], done["length"], done["entries"], done["stale"]) == (GiB, 4 * MiB, 2, [])
    hardware = Hardware(place)
    assert hardware.reach(GiB) is None
    device = iommu(place, "attach", dom, "00:05.0")
    assert (device["device"], device["state"], device["persistent"]) == ("0000:00:05.0", "attached", False)
    for offset in (0, 12345, 4 * MiB - 1):
        assert hardware.reach(GiB + offset) == physical(place, "guest-ram", 2 * MiB + offset)
        step = iommu(place, "walk", place.mnt, "00:05.0", hex(GiB + offset))
        assert (step["physical"], step["file"]) == (physical(place, "guest-ram", 2 * MiB + offset), "guest-ram")
    assert hardware.reach(GiB - 1) is None
    assert hardware.reach(GiB + 4 * MiB) is None
    assert hardware.reach(GiB, OTHER) is None
    iommu(place, "map", dom, "2G", ram, "--length", "4K", "--ro")
    assert hardware.reach(2 * GiB, access=READ) == physical(place, "guest-ram")
    assert hardware.reach(2 * GiB, access=WRITE) is None
    done = iommu(place, "unmap", dom, "0x40001000", "4K")
    assert done["unmapped"] == 4 * KiB
    assert [(one["kind"], one["iova"], one["length"]) for one in done["stale"]] == [("iotlb", GiB, 2 * MiB)]
    assert hardware.reach(GiB + 4 * KiB) is None
    assert hardware.reach(GiB + 8 * KiB) == physical(place, "guest-ram", 2 * MiB + 8 * KiB)
    assert iommu(place, "audit", place.mnt)["problems"] == []
    assert iommu(place, "invalidations", place.mnt)["stale"] == done["stale"]
    token = iommu(place, "invalidations", place.mnt)["token"]
    iommu(place, "unmap", dom, "0x40200000", "4K")
    assert "has become pending" in refused("invalidations", place.mnt, "--ack", str(token))
    token = iommu(place, "invalidations", place.mnt)["token"]
    assert iommu(place, "invalidations", place.mnt, "--ack", token)["stale"] == []
    iommu(place, "detach", place.mnt, "00:05.0")
    assert hardware.reach(GiB) is None


def test_memory_of_a_removed_file_waits_for_the_acknowledgement(place: Site) -> None:
    """It is shown wherever one may look for it."""
    dom, ram, mnt = place.mnt / "iommu/dom-0", place.mnt / "guest-ram", place.mnt
    iommu(place, "map", dom, 0, ram)
    iommu(place, "attach", dom, "00:05.0", "--persistent")
    iommu(place, "invalidations", mnt, "--ack", "all")
    at, ino = physical(place, "guest-ram"), ram.stat().st_ino
    free = os.statvfs(mnt).f_bfree
    ram.unlink()
    done = iommu(place, "unmap", dom, 0, "8M")
    assert done["unmapped"] == 8 * MiB
    # What was seen before: the next file got it at once.
    other = mnt / "other"
    other.touch()
    place.run_ok("truncate", "-s", "8M", other)
    assert physical(place, "other") != at
    assert free - os.statvfs(mnt).f_bfree == 8 * MiB // 4096
    listed = iommu(place, "invalidations", mnt)
    assert listed["awaiting"] == 8 * MiB
    assert json.loads(place.run_ok("pkernfs", "info", "--json", mnt))["awaiting"] == 8 * MiB
    assert "8 MiB waiting for invalidation" in place.run_ok("pkernfs", "info", mnt)
    assert "waiting for invalidation: 8 MiB" in place.run_ok("pkernfs", "iommu", "invalidations", mnt)
    said = place.run_ok("pkernfs", "explain", place.region, hex(at))
    assert f"of inode {ino}, which has no name, waiting for invalidation {listed['token']}" in said
    wait_for(lambda: "8 MiB waiting for invalidation" in place.run_ok("pkernfs", "status", mnt), "status tells of it")
    assert "pkernfs_awaiting_bytes" in place.run_ok("pkernfs", "metrics", mnt)
    # Of one that has a name still.
    iommu(place, "map", dom, 0, other)
    iommu(place, "unmap", dom, 0, "8M")
    assert "waiting for invalidation: offset 0x0, length 0x800000" in place.run_ok("pkernfs", "info", other)
    listing = place.run_ok("pkernfs", "ls", "-l", place.region)
    assert "other (waiting for invalidation)" in listing
    # What does not fit says why, and what to do.
    place.expected = re.compile("no space is left")
    figures = os.statvfs(mnt)
    hole = mnt / "hole"
    hole.touch()
    with pytest.raises(OSError, match="No space left"):
        os.truncate(hole, figures.f_bavail * figures.f_frsize + 2 * MiB)
    token = iommu(place, "invalidations", mnt)["token"]
    how = f"let hardware do what pkernfs iommu invalidations MOUNT lists, then --ack {token}"
    assert f"8388608 bytes await an invalidation: {how}" in place.server_log.read_text()
    done = iommu(place, "invalidations", mnt, "--ack", str(token))
    assert (done["released"], done["awaiting"], done["stale"]) == (8 * MiB, 0, [])
    assert os.statvfs(mnt).f_bfree == free


def test_what_an_acknowledgement_releases_is_freed_though_nobody_uses_the_mount(place: Site) -> None:
    """Small files are freed later, together with others."""
    dom, small, mnt = place.mnt / "iommu/dom-0", place.mnt / "small", place.mnt
    iommu(place, "attach", dom, "00:05.0")
    iommu(place, "invalidations", mnt, "--ack", "all")
    small.write_bytes(b"small")
    iommu(place, "map", dom, 0, small)
    iommu(place, "unmap", dom, 0, "4K")
    small.unlink()

    def inodes() -> int:
        """By the control socket: a request of the kernel would have it freed."""
        return client.info(str(mnt)).inodes

    before = inodes()
    iommu(place, "invalidations", mnt, "--ack", "all")
    wait_for(lambda: inodes() == before - 1, "the file is freed")


def test_the_rfc_s_way_to_make_a_domain(place: Site) -> None:
    dom = place.mnt / "iommu/dom-1"
    place.run_ok("touch", dom)
    place.run_ok("truncate", "-s", "2M", dom)
    assert dom.stat().st_size == 2 * MiB
    assert dom.read_bytes()[:16] == b"\1" + bytes(15)
    iommu(place, "map", dom, 0, place.mnt / "guest-ram")
    assert dom.read_bytes()[0] == 0b1111  # the bitmap, and three tables
    facts = next(one for one in iommu(place, "list", place.mnt)["domains"] if one["name"] == "dom-1")
    assert (facts["format"], facts["levels"], facts["tables"]) == ("vtd", 4, 3)
    root = facts["root"] - physical(place, "iommu/dom-1")
    assert dom.read_bytes()[root : root + 8] != bytes(8)


def test_refusals(place: Site) -> None:
    dom, ram = place.mnt / "iommu/dom-0", place.mnt / "guest-ram"
    iommu(place, "map", dom, 0, ram)
    for words, text in (
        (("map", dom, "0x1000", ram), "File exists"),
        (("map", dom, "0x1001", ram), "Invalid argument"),
        (("map", dom, "0xfee00000", ram, "--length", "4K"), "never reaches"),
        (("map", dom, "256T", ram), "Invalid argument"),
        (("map", dom, "1G", dom), "Operation not permitted"),
        (("unmap", dom, "1G", "4K"), "No such file"),
        (("detach", place.mnt, "00:05.0"), "No such file"),
    ):
        assert text in refused(*map(str, words))
    iommu(place, "attach", dom, "00:05.0")
    assert "busy" in refused("attach", dom, "00:05.0")
    assert "busy" in refused("destroy", dom)
    assert run("pkernfs", "iommu", "attach", dom, "00:20.0").returncode == 2
    assert run("pkernfs", "iommu", "map", dom, "0", place.region).returncode == 2


def test_devices_go_on_when_the_server_is_replaced(place: Site) -> None:
    """A takeover is no kexec: nothing is blocked."""
    dom = place.mnt / "iommu/dom-0"
    iommu(place, "map", dom, 0, place.mnt / "guest-ram")
    iommu(place, "attach", dom, "00:05.0")
    hardware = Hardware(place)
    place.expected = re.compile("takes over")
    wait_for(lambda: place.status()["standby"], "a standby")
    os.kill(place.status()["worker"], signal.SIGKILL)
    wait_for(lambda: place.status()["takeovers"] == 1, "a takeover")
    iommu(place, "map", dom, "1G", place.mnt / "guest-ram")
    assert hardware.reach(0) == hardware.reach(GiB) == physical(place, "guest-ram")


@pytest.mark.parametrize("how", ["umount", "crash"])
def test_the_next_mount(place: Site, how: str) -> None:
    """Only what was declared persistent stays attached, untouched, and is claimed by its owner."""
    dom, ram = place.mnt / "iommu/dom-0", place.mnt / "guest-ram"
    iommu(place, "map", dom, 0, ram)
    iommu(place, "attach", dom, "00:05.0", "--persistent")
    iommu(place, "attach", dom, "00:06.0")
    hardware = Hardware(place)
    before = hardware.reach(0)
    if how == "umount":
        place.umount()
    else:
        place.crash()
    assert hardware.reach(0) == hardware.reach(0, OTHER) == before
    place.mount()
    assert hardware.reach(0) == before
    assert hardware.reach(0, OTHER) is None
    listed = iommu(place, "list", place.mnt)
    assert [(one["device"], one["state"]) for one in listed["domains"][0]["devices"]] == [("0000:00:05.0", "deferred")]
    assert {one["device"] for one in listed["stale"] if one["kind"] == "context"} == {"0000:00:06.0"}
    iommu(place, "map", dom, 0, ram, "--live-update")
    assert iommu(place, "attach", dom, "00:05.0", "--persistent")["state"] == "attached"
    assert iommu(place, "audit", place.mnt)["problems"] == []
    place.crash()
    place.mount("cold")
    assert hardware.reach(0) is None
    assert iommu(place, "list", place.mnt)["domains"][0]["devices"] == []
    assert iommu(place, "list", place.mnt)["domains"][0]["mappings"] != []


def test_replace(place: Site) -> None:
    dom = place.mnt / "iommu/dom-0"
    iommu(place, "map", dom, 0, place.mnt / "guest-ram")
    iommu(place, "attach", dom, "00:05.0")
    hardware = Hardware(place)
    done = iommu(place, "replace", dom, "--leaf", "4K")
    assert (done["tables_before"], done["tables_after"]) == (3, 7)
    assert {one["kind"] for one in done["stale"]} == {"context", "iotlb"}
    assert iommu(place, "walk", place.mnt, "00:05.0", "5M")["page_size"] == 4 * KiB
    assert hardware.reach(5 * MiB) == physical(place, "guest-ram", 5 * MiB)
    assert iommu(place, "invalidations", place.mnt, "--ack", "all")["freed"] == 3


def test_the_same_of_a_region_that_is_not_mounted(place: Site) -> None:
    dom = place.mnt / "iommu/dom-0"
    iommu(place, "map", dom, 0, place.mnt / "guest-ram")
    iommu(place, "attach", dom, "00:05.0", "--persistent")
    online = {verb: iommu(place, verb, place.mnt) for verb in ("list", "audit", "root")}
    online["walk"] = iommu(place, "walk", place.mnt, "00:05.0", "4M")
    place.umount()
    place.wait_for_end()
    for verb in ("list", "audit", "root"):
        assert iommu(place, verb, place.region) == online[verb]
    assert iommu(place, "walk", place.region, "00:05.0", "4M") == online["walk"]
    # Nor when there is a mount whose servers were killed.
    place.mount()
    place.crash()
    assert iommu(place, "audit", place.region) == online["audit"]


def test_an_audit_that_finds_something(place: Site) -> None:
    dom = place.mnt / "iommu/dom-0"
    iommu(place, "map", dom, 0, place.mnt / "guest-ram")
    at = iommu(place, "walk", dom, 0)["steps"][-1]["address"]
    place.umount()
    place.wait_for_end()
    with place.region.open("r+b") as file:
        file.seek(at)
        entry = file.read(8)
        file.seek(at)
        file.write(bytes(8))
    result = run("pkernfs", "iommu", "audit", place.region, "--json")
    assert result.returncode == 1
    assert [one["kind"] for one in json.loads(result.stdout)["problems"]] == ["under-mapped"]
    with place.region.open("r+b") as file:
        file.seek(at)
        file.write(entry)


def test_the_container(place: Site) -> None:
    """VFIO's calls; all mappings are there when it is opened anew."""
    path, ram = place.mnt / "iommu/dom-0", place.mnt / "guest-ram"
    container = Container(path)
    container.map_dma(GiB, ram, size=4 * MiB)
    container.map_dma(3 * GiB, ram, 4 * MiB, MiB, write=False)
    with pytest.raises(FileExistsError):
        container.map_dma(GiB + 2 * MiB, ram)
    assert container.unmap_dma(GiB, MiB) == MiB
    place.restart()
    container = Container(path)
    assert container.mappings() == [
        DmaMapping(GiB + MiB, 3 * MiB, "guest-ram", MiB, "rw"),
        DmaMapping(3 * GiB, MiB, "guest-ram", 4 * MiB, "ro"),
    ]
    container.map_dma(GiB + MiB, ram, MiB, 3 * MiB, live_update=True)
    with pytest.raises(FileNotFoundError):
        container.map_dma(GiB, ram, 0, MiB, live_update=True)
    assert container.iova_ranges() == [(0, 0xFEDFFFFF), (0xFEF00000, (1 << 48) - 1)]


def test_workers_are_killed_in_the_middle(place: Site) -> None:
    """Each call that returns was executed, once, whatever was killed meanwhile."""
    place.expected = re.compile("takes over")
    container = Container(place.mnt / "iommu/dom-0")
    iommu(place, "attach", place.mnt / "iommu/dom-0", "00:05.0")
    rng = random.Random(5)
    mapped: dict[int, int] = {}
    for number in range(80):
        killer = None
        if number % 8 == 0:
            wait_for(lambda: place.status()["standby"], "a standby")
            killer = threading.Thread(target=os.kill, args=(place.status()["worker"], signal.SIGKILL))
            killer.start()
        iova = rng.randrange(12) * 2 * MiB
        if iova in mapped:
            assert container.unmap_dma(iova, mapped[iova]) == mapped.pop(iova)
        else:
            mapped[iova] = rng.choice([4 * KiB, MiB, 2 * MiB])
            container.map_dma(iova, place.mnt / "guest-ram", rng.randrange(4) * 2 * MiB, mapped[iova])
        if killer:
            killer.join()
    assert {one.iova: one.size for one in container.mappings()} == mapped
    assert iommu(place, "audit", place.mnt)["problems"] == []
    assert place.status()["takeovers"] >= 9
