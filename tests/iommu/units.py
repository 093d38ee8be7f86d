"""What a machine's IOMMUs are driven by: their registers, through QEMU's qtest socket.

Facts about the registers: VT-d 4.1, chapter 11; AMD 48882, section 3.4; and what QEMU 10.0 does with them
(hw/i386/intel_iommu.c, amd_iommu.c).
"""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.iommu.walker import READ, WRITE, VtdReason

PATIENCE = 60.0  #: seconds


class Recorded(NamedTuple):
    """A fault as the IOMMU recorded it."""

    device: int  #: bus << 8 | device << 3 | function
    iova: int  #: of the page
    reason: VtdReason
    access: int  #: READ or WRITE


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

    def __init__(self, qtest: Qtest, _memory: int) -> None:
        self.qtest = qtest

    def set_root(self, physical: int) -> None:
        """Let RTADDR name a root table, and enable translation if it is not.  Invalidates nothing by itself."""
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
        """INVALIDATE_IOMMU_PAGES for all pages of a domain id, and what points to them."""
        self._command(3 << 60 | id << 32, 0x7FFF_FFFF_FFFF_F000 | 3)

    def invalidate_pages(self, id: int, iova: int, length: int) -> None:
        """INVALIDATE_IOMMU_PAGES for a range of a domain id; QEMU invalidates the whole domain."""
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
