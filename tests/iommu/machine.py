"""A machine without a guest: QEMU with an IOMMU, devices that do DMA, and a region as its memory.

No CPU runs anything; registers are written through QEMU's qtest socket.  The devices are QEMU's `edu`, which holds
4 KiB: it loads them from an address and stores them to another.  Facts about the registers: VT-d 4.1, chapter 11; AMD
48882, section 3.4; and what QEMU 10.0 does with them (hw/i386/intel_iommu.c, amd_iommu.c, hw/misc/edu.c).
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pkernfs.qemu.cmdline import escape, find_qemu
from tests.iommu.walker import READ, WRITE, VtdReason

MiB = 1 << 20
LOW_MEMORY = 0xB000_0000  #: bytes of RAM that a q35 can have below 4 GiB
HIGH_MEMORY = 1 << 32  #: where what is more begins
BUFFER = 4096  #: bytes that a device holds
PATIENCE = 60.0
#: cli; hlt; jmp -2 at the reset vector of a 64 KiB firmware.
FIRMWARE = bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd" + bytes(12)


class Recorded(NamedTuple):
    """A fault as the IOMMU recorded it."""

    device: int  #: bus << 8 | device << 3 | function
    iova: int  #: of the page
    reason: VtdReason
    access: int  #: READ or WRITE


def requester(device: str) -> int:
    """bus << 8 | device << 3 | function of "01:02.3"."""
    bus, rest = device.split(":")
    slot, function = rest.split(".")
    return int(bus, 16) << 8 | int(slot, 16) << 3 | int(function, 16)


class Qtest:
    """The text protocol of QEMU's -qtest: one line for a command, one for its answer."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                assert process.poll() is None, f"QEMU ended with {process.returncode}"
                assert time.monotonic() < deadline, "QEMU does not answer"
                time.sleep(0.01)
        self.socket.settimeout(PATIENCE)
        self.answers = self.socket.makefile("rb")

    def close(self) -> None:
        self.answers.close()
        self.socket.close()

    def ask(self, *commands: str) -> list[str]:
        """Send commands at once; what follows OK in their answers."""
        self.socket.sendall("".join(f"{command}\n" for command in commands).encode())
        found = []
        for command in commands:
            answer = self.answers.readline().decode().split()
            assert answer[:1] == ["OK"], f"{command}: {answer}"
            found.append(answer[1] if len(answer) > 1 else "")
        return found

    def readl(self, address: int) -> int:
        return int(self.ask(f"readl {address:#x}")[0], 0)

    def readq(self, address: int) -> int:
        return int(self.ask(f"readq {address:#x}")[0], 0)

    def writel(self, address: int, value: int) -> None:
        self.ask(f"writel {address:#x} {value:#x}")

    def writeq(self, address: int, value: int) -> None:
        self.ask(f"writeq {address:#x} {value:#x}")

    def read(self, address: int, length: int) -> bytes:
        return bytes.fromhex(self.ask(f"read {address:#x} {length:#x}")[0].removeprefix("0x"))

    def write(self, address: int, data: bytes) -> None:
        self.ask(f"write {address:#x} {len(data):#x} 0x{data.hex()}")


class Vtd:
    """The remapping unit of `intel-iommu`."""

    DEVICE = "intel-iommu,intremap=off,aw-bits=48"
    BASE = 0xFED90000
    CAP, GCMD, GSTS, RTADDR, CCMD = 0x8, 0x18, 0x1C, 0x20, 0x28
    FSTS, IVA, IOTLB, FRCD = 0x34, 0xF0, 0xF8, 0x220
    ENABLE, SET_ROOT = 1 << 31, 1 << 30
    BUSY = 1 << 63

    def __init__(self, qtest: Qtest, memory: int) -> None:
        self.qtest = qtest

    def set_root(self, physical: int) -> None:
        """Let RTADDR name a root table, and enable translation if it is not.  Forgets nothing by itself."""
        self.qtest.writeq(self.BASE + self.RTADDR, physical)
        self._command(self.SET_ROOT)

    def enable(self, on: bool = True) -> None:
        """Translation on, or off: then devices reach physical memory."""
        self._command(self.ENABLE if on else 0, keep=False)

    def _command(self, bits: int, keep: bool = True) -> None:
        # One-shot commands are given together with the state that is to stay.
        state = self.qtest.readl(self.BASE + self.GSTS) & self.ENABLE if keep else 0
        self.qtest.writel(self.BASE + self.GCMD, bits | state)
        assert self.qtest.readl(self.BASE + self.GSTS) & (bits | self.ENABLE) == (bits | state)

    def invalidate_contexts(self, device: int | None = None) -> None:
        """Of all devices, or of one."""
        which = 1 << 61 if device is None else 3 << 61 | device << 16
        self.qtest.writeq(self.BASE + self.CCMD, self.BUSY | which)
        assert not self.qtest.readq(self.BASE + self.CCMD) & self.BUSY

    def invalidate_all(self) -> None:
        """All contexts, and all translations."""
        self.invalidate_contexts()
        self._invalidate(1 << 60)

    def invalidate_domain(self, id: int) -> None:
        """All translations of a domain id."""
        self._invalidate(2 << 60 | id << 32)

    def invalidate_pages(self, id: int, iova: int, length: int) -> None:
        """Translations of a range of a domain id; QEMU has no more than 1 GiB at a time."""
        for start, order in _aligned(iova, length, 18):
            self.qtest.writeq(self.BASE + self.IVA, start | order)
            self._invalidate(3 << 60 | id << 32)

    def _invalidate(self, which: int) -> None:
        self.qtest.writeq(self.BASE + self.IOTLB, self.BUSY | which)
        assert not self.qtest.readq(self.BASE + self.IOTLB) & self.BUSY

    def faults(self) -> list[Recorded]:
        """The first fault since the last call; there is one register for them."""
        if not self.qtest.readl(self.BASE + self.FSTS) & 2:
            return []
        low, high = (self.qtest.readq(self.BASE + self.FRCD + n) for n in (0, 8))
        self.qtest.writel(self.BASE + self.FRCD + 12, 1 << 31)
        self.qtest.writel(self.BASE + self.FSTS, 1)
        assert not self.qtest.readl(self.BASE + self.FSTS) & 3
        access = READ if high >> 62 & 1 else WRITE
        return [Recorded(high & 0xFFFF, low & -4096, VtdReason(high >> 32 & 0xFF), access)]


class Amd:
    """The IOMMU of `amd-iommu`, with its command buffer and completion word in 8 KiB at ``memory``.

    QEMU takes all devices for devices of bus 0, and logs no event (before 10.1 never, then not what is not mapped):
    what was refused is seen from the bytes alone.
    """

    DEVICE = "amd-iommu,intremap=off,pt=off"
    BASE = 0xFED80000
    DEVICE_TABLE, COMMANDS, CONTROL, COMMAND_TAIL = 0x0, 0x8, 0x18, 0x2008
    LENGTH = 8 << 56  #: 256 entries of 16 bytes
    ON = 1 | 1 << 12  #: translation, command buffer

    def __init__(self, qtest: Qtest, memory: int) -> None:
        self.qtest, self.commands, self.done = qtest, memory, memory + 4096
        self.tail = self.waits = 0

    def set_root(self, physical: int) -> None:
        """Let DevTabBase name a device table of 65536 entries."""
        self.qtest.writeq(self.BASE + self.DEVICE_TABLE, physical | 511)

    def enable(self, on: bool = True) -> None:
        """Translation on, or off: then devices reach physical memory."""
        if on:
            self.qtest.writeq(self.BASE + self.COMMANDS, self.commands | self.LENGTH)
            self.tail = 0
        self.qtest.writeq(self.BASE + self.CONTROL, self.ON if on else 0)

    def _command(self, low: int, high: int) -> None:
        for words in ((low, high), (1 << 60 | self.done | 1, self.waits + 1)):
            self.qtest.write(self.commands + self.tail, struct.pack("<QQ", *words))
            self.tail = (self.tail + 16) % 4096
        self.waits += 1
        self.qtest.writeq(self.BASE + self.COMMAND_TAIL, self.tail)
        assert self.qtest.readq(self.done) == self.waits, "COMPLETION_WAIT was not executed"

    def invalidate_contexts(self, device: int | None = None) -> None:
        """INVALIDATE_DEVTAB_ENTRY, or all of everything: there is no command for all devices alone."""
        if device is None:
            self.invalidate_all()
        else:
            self._command(2 << 60 | device, 0)

    def invalidate_all(self) -> None:
        """INVALIDATE_IOMMU_ALL."""
        self._command(8 << 60, 0)

    def invalidate_domain(self, id: int) -> None:
        """INVALIDATE_IOMMU_PAGES for all pages of a domain id, and what leads to them."""
        self._command(3 << 60 | id << 32, 0x7FFF_FFFF_FFFF_F000 | 3)

    def invalidate_pages(self, id: int, iova: int, length: int) -> None:
        """INVALIDATE_IOMMU_PAGES for a range of a domain id.  (QEMU forgets the whole domain.)"""
        for start, order in _aligned(iova, length, 39):
            # The lowest bit from 12 on that is 0 tells the size.
            span = (1 << 11 + order) - 4096 | 1 if order else 0
            self._command(3 << 60 | id << 32, start | span | 2)

    def faults(self) -> list[Recorded]:
        """None is recorded."""
        return []


def _aligned(iova: int, length: int, most: int) -> Iterable[tuple[int, int]]:
    """The range as naturally aligned ranges of 1 << order pages."""
    page, end = iova >> 12, iova + length + 4095 >> 12
    while page < end:
        order = min(most, (end - page).bit_length() - 1)
        if page:
            order = min(order, (page & -page).bit_length() - 1)
        yield page << 12, order
        page += 1 << order


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

    def forget(self, stale: Iterable[dict[str, Any]]) -> None:
        """Invalidate what `pkernfs iommu iotlb-needed --json` names, and nothing else."""
        for each in stale:
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
