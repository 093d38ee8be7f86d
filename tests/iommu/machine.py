"""A machine without a guest: QEMU with an IOMMU, devices that do DMA, and a region as its memory.

No CPU runs anything.  The devices are QEMU's `edu` (hw/misc/edu.c), which holds 4 KiB: it loads them from an address
and stores them to another.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pkernfs.format import MiB
from pkernfs.qemu.cmdline import escape, find_qemu
from tests.iommu.units import PATIENCE, Amd, Qtest, Vtd

LOW_MEMORY = 0xB000_0000  #: bytes of RAM that a q35 can have below 4 GiB
HIGH_MEMORY = 1 << 32  #: where what is more begins
BUFFER = 4096  #: bytes that a device holds
#: cli; hlt; jmp -2 at the reset vector of a 64 KiB firmware.
FIRMWARE = bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd" + bytes(12)


def requester(device: str) -> int:
    """bus << 8 | device << 3 | function of "01:02.3"."""
    bus, rest = device.split(":")
    slot, function = rest.split(".")
    return int(bus, 16) << 8 | int(slot, 16) << 3 | int(function, 16)


class Device:
    """An `edu`.  Its DMA has ended when a call returns; what cannot be loaded is held as zeros."""

    SOURCE, TARGET, COUNT, COMMAND, DATA = 0x80, 0x88, 0x90, 0x98, 0x40000

    def __init__(self, qtest: Qtest, name: str, bar: int) -> None:
        self.qtest, self.name, self.bar = qtest, name, bar
        self.id = requester(name)

    def load(self, iova: int, length: int = BUFFER) -> None:
        """Memory to device."""
        self._dma(iova, self.DATA, length, 1)

    def store(self, iova: int, length: int = BUFFER) -> None:
        """Device to memory: what it loaded last."""
        self._dma(self.DATA, iova, length, 3)

    def copy(self, source: int, target: int, length: int) -> None:
        """From one address to another, in pieces as large as the device holds."""
        for at in range(0, length, BUFFER):
            self.load(source + at, min(BUFFER, length - at))
            self.store(target + at, min(BUFFER, length - at))

    def _dma(self, source: int, target: int, length: int, command: int) -> None:
        assert 0 < length <= BUFFER
        words = (self.SOURCE, source), (self.TARGET, target), (self.COUNT, length), (self.COMMAND, command)
        self.qtest.ask(*(f"writeq {self.bar + at:#x} {value:#x}" for at, value in words))
        deadline = time.monotonic() + PATIENCE
        while self.qtest.readq(self.bar + self.COMMAND) & 1:
            assert time.monotonic() < deadline, "the DMA does not end"


class Machine:
    """QEMU with ``region`` as its memory at physical address ``base``: 0, or HIGH_MEMORY.

    ``devices`` are of bus 00, or of bus 01, 02 ... with slot 0: each such bus has its root port.
    """

    def __init__(
        self, region: Path, unit: type[Vtd | Amd], devices: Sequence[str] = ("00:05.0",), base: int = 0
    ) -> None:
        assert base in (0, HIGH_MEMORY)
        self.tmp = tempfile.TemporaryDirectory(prefix="pkernfs-machine-", dir="/tmp")
        tmp = Path(self.tmp.name)
        (tmp / "firmware").write_bytes(FIRMWARE)
        size = region.stat().st_size
        # The IOMMU's own buffers are in memory of their own, so that nothing but DMA changes the region.
        if base:
            own, nodes = 2048 * MiB, ("own", "region")
        else:
            own, nodes = 2 * MiB, ("region", "own")
            assert size + own < LOW_MEMORY, (
                f"expected a region of less than {LOW_MEMORY - own:#x} bytes, found {size:#x}"
            )
        # A periodic timer would keep QEMU busy: with sleep=off time jumps to where the next one is due.
        limit = ",max-ram-below-4g=2G" if base else ""
        command = [find_qemu().path, "-machine", f"q35,accel=tcg,kernel-irqchip=off,hpet=off,pit=off{limit}"]
        command += ["-cpu", "qemu64", "-smp", "1"]
        command += ["-m", f"{size + own}B", "-bios", str(tmp / "firmware"), "-icount", "shift=0,sleep=off"]
        command += ["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
        command += ["-object", f"memory-backend-file,id=region,size={size},mem-path={escape(str(region))},share=on"]
        command += ["-object", f"memory-backend-ram,id=own,size={own}"]
        for node, backend in enumerate(nodes):
            command += ["-numa", f"node,nodeid={node},memdev={backend}"]
        command += ["-qtest", f"unix:{escape(str(tmp / 'qtest'))},server=on,wait=off", "-qtest-log", "none"]
        command += ["-device", unit.DEVICE]
        buses = sorted({requester(name) >> 8 for name in devices} - {0})
        for bus in buses:
            command += [
                "-device",
                f"pcie-root-port,id=bus{bus},bus=pcie.0,addr={0x10 + bus:x},chassis={bus},slot={bus}",
            ]
        for name in devices:
            bus, slot = requester(name) >> 8, requester(name) >> 3 & 31
            place = f"bus=bus{bus},addr=0" if bus else f"bus=pcie.0,addr={slot:x}"
            command += ["-device", f"edu,{place},dma_mask={(1 << 64) - 1}"]
        self.errors = (tmp / "errors").open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors, cwd=self.tmp.name
        )
        try:
            self.qtest = Qtest(tmp / "qtest", self.process)
            for bus in buses:
                self._set_up_bus(bus)
            self.devices = [self._set_up_device(name, number) for number, name in enumerate(devices)]
            self.unit = unit(self.qtest, MiB if base else size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it.  It must not have ended by itself."""
        if hasattr(self, "qtest"):
            self.qtest.close()
        ended = self.process.poll()
        self.process.kill()
        self.process.wait()
        self.errors.seek(0)
        said = self.errors.read()
        self.errors.close()
        self.tmp.cleanup()
        assert ended is None, f"QEMU ended with {ended}: {said}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def invalidate(self, pending: Iterable[dict[str, Any]]) -> None:
        """Invalidate what `pkernfs iommu invalidations --json` names, and nothing else."""
        for each in pending:
            if each["kind"] == "context":
                self.unit.invalidate_contexts(requester(each["device"].split(":", 1)[1]))
            elif each["length"] is None:
                self.unit.invalidate_domain(each["id"])
            else:
                self.unit.invalidate_pages(each["id"], each["iova"], each["length"])

    def _config(self, device: int, register: int, value: int) -> None:
        address = 1 << 31 | device << 8 | register
        self.qtest.ask(f"outl 0xcf8 {address:#x}", f"outl 0xcfc {value:#x}")

    def _set_up_bus(self, bus: int) -> None:
        port = 0x10 + bus << 3
        window = 0xE0000000 + bus * 16 * MiB
        self._config(port, 0x18, bus << 16 | bus << 8)
        self._config(port, 0x20, (window + 15 * MiB) & 0xFFF00000 | window >> 16)
        self._config(port, 0x04, 6)

    def _set_up_device(self, name: str, number: int) -> Device:
        bus = requester(name) >> 8
        bar = 0xE0000000 + bus * 16 * MiB + (0 if bus else number * MiB)
        self._config(requester(name), 0x10, bar)
        self._config(requester(name), 0x04, 6)
        return Device(self.qtest, name, bar)


def sparse(path: Path, size: int) -> Path:
    """A file of zeros to be a machine's memory."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
    return path
