"""A mount whose region is the memory of a machine: tables by the installed commands, DMA by the hardware."""

from __future__ import annotations

import io
import json
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from pkernfs.cli.main import run as pkernfs
from pkernfs.format import BLOCK, PAGE, Ino, MiB
from tests.iommu import units, walker
from tests.iommu.machine import Device, Machine
from tests.iommu.walker import READ, WRITE, Fault, Memory, Translation
from tests.mount.site import Site, find_program

STAGE = 0x7_0000_0000  #: IOVA of a page in each domain, through which a device is given what it is to store
DEVICES = ("00:05.0", "00:06.0")
ZERO = bytes(BLOCK)


class Extent(NamedTuple):
    """A run of a file's bytes."""

    file: Ino
    region: int
    physical: int
    length: int


class Rig:
    """``site`` has a region, mounted, with physical addresses from ``base`` on; the devices are all unattached."""

    def __init__(self, site: Site, form: str, base: int, devices: tuple[str, ...]) -> None:
        self.site, self.form, self.base = site, form, base
        self.fd = os.open(site.region, os.O_RDWR)
        self.memory = mmap.mmap(self.fd, 0)
        unit = units.Vtd if form == "vtd" else units.Amd
        self.machine = Machine(site.region, unit, devices, base)
        self.devices = self.machine.devices
        view = Memory(memoryview(self.memory), base)
        self.root = int(self.iommu("root", site.mnt, "--format", form)["physical"])
        self.walker: Any = walker.Vtd(view, self.root, 48) if form == "vtd" else walker.Amd(view, self.root)
        self.stage = 0  #: region offset
        self.known: dict[str, list[Extent]] = {}  #: of files that are mapped, and so do not move
        for device in self.devices:
            device.load(base)  # the superblock: so that what is stored where it should not be is seen
        self.machine.unit.set_root(self.root)
        self.machine.unit.enable()
        self.machine.unit.invalidate_all()

    def close(self) -> None:
        """End the machine.  The region stays mapped until the last look at it is gone."""
        self.machine.close()
        os.close(self.fd)

    def clear(self) -> None:
        """Take away all domains and files, but for the stage; the audit finds nothing before and after."""
        self.iommu("audit", self.mnt)
        domains = self.iommu("list", self.mnt)["domains"]
        for device in (device for domain in domains for device in domain["devices"]):
            self.iommu("detach", self.mnt, device["device"])
        self.invalidate()
        for domain in domains:
            self.iommu("destroy", self.mnt / "iommu" / domain["name"])
        for path in self.mnt.iterdir():
            if path.is_file() and path.name != "stage":
                path.unlink()
        self.known.clear()
        self.iommu("audit", self.mnt)
        self.quiet()

    # -- commands -------------------------------------------------------------------------------------------------

    @property
    def mnt(self) -> Path:
        """The mountpoint."""
        return self.site.mnt

    def iommu(self, *words: str | os.PathLike[str] | int) -> dict[str, Any]:
        """Run `pkernfs iommu`, which must succeed; what it says."""
        first, *rest = (hex(word) if isinstance(word, int) else str(word) for word in words)
        return self.command("iommu", first, "--json", *rest)

    def command(self, *words: str) -> dict[str, Any]:
        """Run `pkernfs`, which must succeed; what it says.  In this process: a new one takes much longer."""
        said = io.StringIO()
        with redirect_stdout(said):
            status = pkernfs(words)
        assert status == 0, (words, said.getvalue())
        result: dict[str, Any] = json.loads(said.getvalue())
        return result

    def domain(self, name: str, *devices: str, levels: int = 4) -> Path:
        """A new domain with the stage in it, and persistent devices attached to it."""
        path = self.mnt / "iommu" / name
        self.iommu("create", path, "--format", self.form, "--levels", str(levels))
        if not self.stage:
            self.file("stage", PAGE)
            self.stage = self.extents("stage")[0].region
        self.iommu("map", path, STAGE, self.mnt / "stage")
        for device in devices:
            self.iommu("attach", path, device, "--persistent")
        self.invalidate()
        return path

    def file(self, name: str, size: int) -> Path:
        """A file with memory."""
        path = self.mnt / name
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def scattered(self, names: tuple[str, str], pages: int) -> None:
        """Two files whose pages lie between each other's."""
        files = [os.open(self.mnt / name, os.O_CREAT | os.O_RDWR | os.O_DIRECT) for name in names]
        buffer = mmap.mmap(-1, PAGE)
        for page in range(pages):
            for file in files:
                assert os.pwrite(file, buffer, page * PAGE) == PAGE
        for file in files:
            os.close(file)
        for name in names:
            assert len(self.extents(name)) > pages // 2, f"{name} is not scattered"

    def extents(self, name: str) -> list[Extent]:
        """Where a file is, as `pkernfs info` tells."""
        facts = self.command("info", "--json", str(self.mnt / name))
        keys = ("file_offset", "region_offset", "physical", "length")
        found = [Extent(*(extent[key] for key in keys)) for extent in facts["extents"]]
        assert all(extent.physical == self.base + extent.region for extent in found)
        return found

    def during(self, command: tuple[str | os.PathLike[str], ...], sample: Callable[[], None]) -> int:
        """Run `pkernfs iommu` with samples all the time until it has succeeded; how many those were."""
        count = 0
        with subprocess.Popen(
            [find_program("pkernfs"), "iommu", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            while process.poll() is None:
                sample()
                count += 1
            assert process.stdout is not None
            said = process.stdout.read()
        assert process.returncode == 0, said
        return count

    def invalidate(self) -> list[dict[str, Any]]:
        """Let the hardware invalidate what is pending, and acknowledge it; what that was."""
        pending: list[dict[str, Any]] = self.iommu("invalidations", self.mnt)["stale"]
        self.machine.invalidate(pending)
        assert self.iommu("invalidations", self.mnt, "--ack", "all")["stale"] == []
        return pending

    # -- memory ---------------------------------------------------------------------------------------------------

    def at(self, name: str, offset: int) -> int:
        """The region offset of a byte of a file."""
        if name not in self.known:
            self.known[name] = self.extents(name)
        (extent,) = (one for one in self.known[name] if one.file <= offset < one.file + one.length)
        return extent.region + offset - extent.file

    def snapshot(self) -> dict[int, bytes]:
        """The blocks of the region that hold anything, but for the stage's page."""
        found = {}
        for at in range(0, len(self.memory), BLOCK):
            block = self.memory[at : at + BLOCK]
            if at <= self.stage < at + BLOCK:
                cut = self.stage - at
                block = block[:cut] + bytes(PAGE) + block[cut + PAGE :]
            if block != ZERO:
                found[at] = block
        return found

    # -- DMA ------------------------------------------------------------------------------------------------------

    def give(self, device: Device, data: bytes) -> None:
        """Let a device hold ``data``."""
        self.memory[self.stage : self.stage + len(data)] = data
        device.load(STAGE, len(data))

    def take(self, device: Device, length: int) -> bytes:
        """What a device holds."""
        self.memory[self.stage : self.stage + length] = bytes(length)
        device.store(STAGE, length)
        return self.memory[self.stage : self.stage + length]

    def write(self, device: Device, iova: int, data: bytes) -> None:
        """DMA to memory."""
        self.give(device, data)
        device.store(iova, len(data))

    def read(self, device: Device, iova: int, length: int) -> bytes:
        """DMA from memory.  What cannot be read is zeros."""
        device.load(iova, length)
        return self.take(device, length)

    def lands(self, device: Device, iova: int, data: bytes, parts: list[tuple[int, int]]) -> None:
        """DMA of ``data`` to and from an IOVA touches (region offset, length) ``parts``, one after the other, alone."""
        self.all_land(device, [(iova, data, parts)])

    def all_land(self, device: Device, transfers: list[tuple[int, bytes, list[tuple[int, int]]]]) -> None:
        """The same of several, of memory that does not overlap: (IOVA, data, parts)."""
        before = self.snapshot()
        for iova, data, _ in transfers:
            self.write(device, iova, data)
        after = self.snapshot()
        self.quiet()
        all_parts = [part for _, _, parts in transfers for part in parts]
        blocks = {at // BLOCK * BLOCK for first, length in all_parts for at in (first, first + length - 1)}
        expected = {at: bytearray(before.get(at, ZERO)) for at in blocks}
        for _, data, parts in transfers:
            assert sum(length for _, length in parts) == len(data)
            places = (at for first, length in parts for at in range(first, first + length))
            for at, byte in zip(places, data, strict=True):
                expected[at // BLOCK * BLOCK][at % BLOCK] = byte
        assert after == before | {at: bytes(block) for at, block in expected.items()}, self.where(before, after)
        for iova, data, parts in transfers:
            mirrored = rest = bytes(byte ^ 0xFF for byte in data)
            for at, length in parts:
                self.memory[at : at + length], rest = rest[:length], rest[length:]
            assert self.read(device, iova, len(data)) == mirrored
        self.quiet()

    @staticmethod
    def where(before: dict[int, bytes], after: dict[int, bytes]) -> str:
        """The blocks that have changed."""
        changed = [at for at in sorted(before.keys() | after.keys()) if before.get(at, ZERO) != after.get(at, ZERO)]
        return f"blocks that were written to: {[hex(at) for at in changed]}"

    def quiet(self) -> None:
        """The hardware has recorded no fault."""
        assert self.machine.unit.faults() == []

    def refuses(self, device: Device, iova: int, access: int) -> Fault:
        """An access of a device touches no memory; how the walker tells it, and the hardware.

        Of a device that is attached to nothing a WRITE is to be tried first: what it could not load it holds as zeros.
        Where the IOVA is cached without the right QEMU records no fault.
        """
        attached = isinstance(self.walker.translate(device.id, STAGE, READ | WRITE), Translation)
        if attached:
            self.give(device, b"\xa5" * 8)
        before = self.snapshot()
        if access == WRITE:
            device.store(iova, 8)
        else:
            device.load(iova, 8)
        faults = self.machine.unit.faults()
        assert self.snapshot() == before
        if attached and access == READ:
            assert self.take(device, 8) == bytes(8)
        found = self.walker.translate(device.id, iova, access)
        assert isinstance(found, Fault), found
        if self.form == "vtd":
            (fault,) = faults
            assert (fault.device, fault.iova, fault.reason) == (device.id, iova & -PAGE, found.reason)
        return found

    def reaches(self, device: Device, iova: int) -> int:
        """The region offset that a device reaches, by the walker."""
        found = self.walker.translate(device.id, iova, READ)
        assert isinstance(found, Translation), found
        return found.physical - self.base


@contextmanager
def new_rig(
    form: str, base: int = 0, size: int = 64 * MiB, disk: bool = False, devices: tuple[str, ...] = DEVICES
) -> Iterator[Rig]:
    """A mount and its machine; in the end the audit finds nothing, the log is clean and the region sound.

    ``disk``: the region is a file on a disk, for one that is too large for memory.
    """
    site = Site(size=None)
    try:
        if disk:
            site.region = site.tmp / "region"
        site.run_ok("mkfs.pkernfs", "--size", str(size), "--phys-base", hex(base), site.region)
        site.mount()
        rig = Rig(site, form, base, devices)
        try:
            yield rig
            rig.iommu("audit", site.mnt)
        finally:
            rig.close()
    finally:
        site.close()
