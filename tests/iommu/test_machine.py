"""The walker, and the machine, agree about tables that were made by hand; so they can judge those of pkernfs."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pkernfs.format import GiB, MiB
from tests.iommu import units, walker
from tests.iommu.machine import HIGH_MEMORY, Device, Machine, requester, sparse
from tests.iommu.tables import AmdTables, VtdTables
from tests.iommu.walker import READ, WRITE, AmdReason, Fault, Memory, Range, Translation, VtdReason, joined

SIZE = 16 * MiB
DEVICES = ("00:05.0", "00:06.0")
FIRST, SECOND = map(requester, DEVICES)
STAGE = 0x7000_0000  #: where a device loads from and stores to what a test gives and takes
STAGE_AT = 3 * MiB  #: in memory
DATA = bytes(range(256)) * 16


class Bench(NamedTuple):
    """A machine with two devices: one attached to ``table`` with domain id 6, one to ``other`` with 7."""

    machine: Machine
    walker: walker.Vtd | walker.Amd
    tables: VtdTables | AmdTables
    memory: mmap.mmap
    base: int
    table: int
    other: int

    def entry(self, device: int) -> int:
        """The address of a context entry, or device table entry."""
        if isinstance(self.tables, AmdTables):
            return self.tables.root + 32 * device
        return (self.tables.load(self.tables.root) & -4096) + 16 * device

    def map(self, iova: int, at: int, leaf: int, access: int = READ | WRITE) -> int:
        return self.tables.map(self.table, 4, iova, self.base + at, leaf, access)

    def give(self, device: Device, data: bytes) -> None:
        """Let a device hold ``data``."""
        self.memory[STAGE_AT : STAGE_AT + len(data)] = data
        device.load(STAGE, len(data))
        assert not self.machine.unit.faults()

    def take(self, device: Device, length: int) -> bytes:
        """What a device holds."""
        self.memory[STAGE_AT : STAGE_AT + length] = bytes(length)
        device.store(STAGE, length)
        assert not self.machine.unit.faults()
        return self.memory[STAGE_AT : STAGE_AT + length]

    def digest(self, start: int, length: int) -> bytes:
        """Of all memory but a range, and but the stage."""
        hidden = sorted([(start, start + length), (STAGE_AT, STAGE_AT + 4096)])
        (a, b), (c, d) = hidden
        view = memoryview(self.memory)
        return hashlib.blake2b(b"".join([view[:a], view[b:c], view[d:]])).digest()

    def writes(self, iova: int, length: int = 64) -> None:
        """A store of the first device does what the walker says, and nothing else."""
        device = self.machine.devices[0]
        found = self.walker.translate(device.id, iova, WRITE)
        at = found.physical - self.base if isinstance(found, Translation) else 0
        self.give(device, DATA[:length])
        # QEMU records no fault where it has cached a translation without the right.
        self.machine.unit.invalidate_all()
        before = self.digest(at, length) if at else hashlib.blake2b(memoryview(self.memory)).digest()
        device.store(iova, length)
        self.recorded(device.id, iova, found)
        if at:
            assert self.memory[at : at + length] == DATA[:length]
            assert self.digest(at, length) == before
        else:
            assert hashlib.blake2b(memoryview(self.memory)).digest() == before

    def reads(self, iova: int, length: int = 64) -> None:
        """A load of the first device does what the walker says."""
        device = self.machine.devices[0]
        found = self.walker.translate(device.id, iova, READ)
        self.give(device, DATA[:length])
        self.machine.unit.invalidate_all()
        expected = bytes(length)  # what QEMU gives for what cannot be read
        if isinstance(found, Translation):
            expected = bytes(b ^ 0xFF for b in DATA[:length])
            at = found.physical - self.base
            self.memory[at : at + length] = expected
        device.load(iova, length)
        self.recorded(device.id, iova, found)
        assert self.take(device, length) == expected

    def recorded(self, device: int, iova: int, found: Translation | Fault) -> None:
        """The machine has recorded what the walker found, as far as it does."""
        faults = self.machine.unit.faults()
        if isinstance(found, Translation):
            assert not faults
        elif isinstance(found.reason, VtdReason):
            (fault,) = faults
            assert (fault.device, fault.iova, fault.reason) == (device, iova & -4096, found.reason), found


@pytest.fixture(params=["vtd", "amd"])
def unit(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def base() -> int:
    return 0


@pytest.fixture
def bench(machine: Callable[..., Machine], unit: str, base: int, tmp_path: Path) -> Bench:
    path = sparse(tmp_path / "memory", SIZE)
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)  # closed with the last view of it
    words = memoryview(memory).cast("Q")
    kind = VtdTables if unit == "vtd" else AmdTables
    tables = kind(words, base + 8 * MiB, base)
    table, other = tables.take(), tables.take()
    view = Memory(memoryview(memory), base)
    walks = walker.Vtd(view, tables.root, width=48) if unit == "vtd" else walker.Amd(view, tables.root)
    for each, top, id in ((FIRST, table, 6), (SECOND, other, 7)):
        tables.attach(each, top, 4, id)
        tables.map(top, 4, STAGE, base + STAGE_AT, 1, READ | WRITE)
    started = machine(path, units.Vtd if unit == "vtd" else units.Amd, DEVICES, base)
    started.unit.set_root(tables.root)
    started.unit.enable()
    started.unit.invalidate_all()
    return Bench(started, walks, tables, memory, base, table, other)


@pytest.mark.parametrize("base", [pytest.param(0, id="low"), pytest.param(HIGH_MEMORY, id="high")])
def test_leaves_of_all_sizes_and_rights(bench: Bench) -> None:
    bench.map(0x1_0000, 4 * MiB, 1)
    bench.map(0x1_1000, 4 * MiB + 0x5000, 1, READ)
    bench.map(0x1_2000, 4 * MiB + 0x7000, 1, WRITE)
    bench.map(5 * GiB, 2 * MiB, 2)
    bench.map(5 * GiB + 2 * MiB, 6 * MiB, 2, READ)
    bench.map(1 << 40, 0, 3)
    for iova in (0x1_0000, 0x1_0FC0, 0x1_1000, 0x1_2000, 0x1_3000, 5 * GiB + 0x12_3440, 5 * GiB + 2 * MiB, 6 * GiB):
        bench.writes(iova)
        bench.reads(iova)
    for iova in ((1 << 40) + 12 * MiB + 0x80, (1 << 47) - 4096, 1 << 48, 1 << 57):
        bench.writes(iova)
        bench.reads(iova)


def test_an_access_across_two_pages(bench: Bench) -> None:
    bench.map(0x1_0000, 4 * MiB, 1)
    bench.map(0x1_1000, 5 * MiB, 1)
    device = bench.machine.devices[0]
    bench.give(device, DATA)
    device.store(0x1_0800, 4096)
    assert bench.memory[4 * MiB + 0x800 : 4 * MiB + 0x1000] == DATA[:0x800]
    assert bench.memory[5 * MiB : 5 * MiB + 0x800] == DATA[0x800:]


def test_domains_are_separate(bench: Bench) -> None:
    bench.map(0x1_0000, 4 * MiB, 1)
    bench.tables.map(bench.other, 4, 0x1_0000, bench.base + 5 * MiB, 1, READ | WRITE)
    for device, data in zip(bench.machine.devices, (b"first", b"other"), strict=True):
        bench.give(device, data)
        device.store(0x1_0000, 5)
    assert bench.memory[4 * MiB : 4 * MiB + 5] == b"first"
    assert bench.memory[5 * MiB : 5 * MiB + 5] == b"other"


@pytest.mark.parametrize("unit", ["vtd"])
@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("root", 1),
        ("root", 1 << 5),
        ("root", 1 << 50),
        ("root high", 1),
        ("context", 1),
        ("context", 1 << 2),
        ("context", 1 << 4),
        ("context", 1 << 11),
        ("context", 1 << 51),
        ("context high", 3),
        ("context high", 2),
        ("context high", 1 << 7),
        ("context high", 1 << 24),
        ("context high", 1 << 3),
        *(("level 4", 1 << bit) for bit in (0, 1, 7, 10, 11, 48, 52, 62, 63)),
        *(("level 3", 1 << bit) for bit in (0, 1, 7, 11, 51, 62)),
        *(("level 2", 1 << bit) for bit in (0, 1, 7, 11, 50, 62)),
        *(("level 1", 1 << bit) for bit in (0, 1, 2, 6, 7, 9, 10, 11, 49, 52, 61, 62, 63)),
        *(("large", 1 << bit) for bit in (0, 1, 7, 11, 12, 20, 62)),
    ],
)
def test_one_bit_changed(bench: Bench, where: str, change: int) -> None:
    at = bench.map(0x1_0000, 4 * MiB, 1)
    iova = 0x1_0000
    if where == "large":
        iova = 5 * GiB
        at = bench.map(iova, 6 * MiB, 2)
    elif where.startswith("level"):
        at = bench.tables.slot(bench.table, 4, iova, int(where[-1]), 0, amd=False)
    elif where.startswith("root"):
        at = bench.tables.root
    elif where.startswith("context"):
        at = bench.entry(FIRST)
    if where.endswith("high"):
        at += 8
    device = bench.machine.devices[0]
    bench.tables.store(at, bench.tables.load(at) ^ change)
    for access, dma in ((WRITE, device.store), (READ, device.load)):
        bench.machine.unit.invalidate_all()
        dma(iova, 64)
        bench.recorded(device.id, iova, bench.walker.translate(device.id, iova, access))


def test_what_is_cached_stays_until_the_right_invalidation(bench: Bench) -> None:
    device, unit = bench.machine.devices[0], bench.machine.unit
    page, block = bench.map(0x1_0000, 4 * MiB, 1), bench.map(5 * GiB, 6 * MiB, 2)
    bench.memory[4 * MiB : 4 * MiB + 4] = bench.memory[6 * MiB : 6 * MiB + 4] = b"seen"

    def reaches(iova: int) -> bool:
        bench.give(device, b"none")
        device.load(iova, 4)
        unit.faults()
        return bench.take(device, 4) == b"seen"

    assert reaches(0x1_0000)
    assert reaches(5 * GiB)
    bench.tables.store(page, 0)
    bench.tables.store(block, 0)
    unit.invalidate_pages(7, 0x1_0000, 4096)
    unit.invalidate_domain(7)
    unit.invalidate_contexts(SECOND)
    assert reaches(0x1_0000)
    assert reaches(5 * GiB)
    unit.invalidate_pages(6, 0x1_0000, 4096)
    assert not reaches(0x1_0000)
    unit.invalidate_pages(6, 5 * GiB, 2 * MiB)
    assert not reaches(5 * GiB)


def test_a_context_that_was_blocked(bench: Bench) -> None:
    device, unit = bench.machine.devices[0], bench.machine.unit
    page = bench.map(0x1_0000, 4 * MiB, 1)
    bench.give(device, b"data")
    bench.tables.store(bench.entry(FIRST), getattr(bench.tables, "BLOCKED", 0))
    unit.invalidate_contexts(FIRST)
    unit.invalidate_domain(6)
    device.store(0x1_0000, 4)
    assert bench.memory[4 * MiB : 4 * MiB + 4] == bytes(4)
    found = bench.walker.translate(FIRST, 0x1_0000, WRITE)
    assert isinstance(found, Fault)
    assert found.reason in (VtdReason.CONTEXT_NOT_PRESENT, AmdReason.ABORTED)
    bench.recorded(FIRST, 0x1_0000, found)
    assert bench.tables.load(page)


@pytest.mark.parametrize("unit", ["amd"])
def test_an_empty_device_table_entry_lets_a_device_reach_all_memory(bench: Bench) -> None:
    device = bench.machine.devices[0]
    bench.give(device, b"data")
    bench.tables.store(bench.entry(FIRST), 0)
    bench.machine.unit.invalidate_all()
    device.store(5 * MiB, 4)
    assert bench.memory[5 * MiB : 5 * MiB + 4] == b"data"
    found = bench.walker.translate(FIRST, 5 * MiB, WRITE)
    assert isinstance(found, Fault)
    assert found.reason == AmdReason.UNTRANSLATED


def test_a_device_of_another_bus(machine: Callable[..., Machine], tmp_path: Path) -> None:
    path = sparse(tmp_path / "memory", SIZE)
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    tables = VtdTables(memoryview(memory).cast("Q"), 8 * MiB)
    table = tables.take()
    tables.map(table, 4, 0x1_0000, 4 * MiB, 1, READ | WRITE)
    tables.attach(requester("02:00.0"), table, 4, 6)
    started = machine(path, units.Vtd, ("01:00.0", "02:00.0"))
    unattached, attached = started.devices
    started.unit.set_root(tables.root)
    started.unit.enable()
    memory[4 * MiB : 4 * MiB + 4] = b"data"
    attached.copy(0x1_0000, 0x1_0800, 4)
    assert started.unit.faults() == []
    assert memory[4 * MiB + 0x800 :][:4] == b"data"
    unattached.load(0x1_0000, 4)
    (fault,) = started.unit.faults()
    assert (fault.device, fault.reason) == (requester("01:00.0"), VtdReason.ROOT_NOT_PRESENT)


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_leaves_as_ranges(unit: str, levels: int) -> None:
    memory = memoryview(bytearray(SIZE))
    base = 1 << 40
    tables: Any = (VtdTables if unit == "vtd" else AmdTables)(memory.cast("Q"), base + 8 * MiB, base)
    table = tables.take()
    tables.attach(FIRST, table, levels, 6)
    for iova, physical, leaf, access in (
        (0x1000, 0x7000, 1, READ),
        (0x2000, 0x8000, 1, READ),
        (0x3000, 0x9000, 1, WRITE),
        (2 * MiB, 6 * MiB, 2, READ | WRITE),
        (4 * MiB, 8 * MiB, 1, READ | WRITE),
        (GiB, 3 * GiB, 3, READ | WRITE),
        ((1 << 12 + 9 * levels) - 4096, 0, 1, READ | WRITE),
    ):
        tables.map(table, levels, iova, physical, leaf, access)
    walks = (walker.Vtd if unit == "vtd" else walker.Amd)(Memory(memory, base), tables.root)
    assert list(joined(walks.leaves(FIRST))) == [
        Range(0x1000, 0x7000, 0x2000, READ),
        Range(0x3000, 0x9000, 0x1000, WRITE),
        Range(2 * MiB, 6 * MiB, 2 * MiB + 4096, READ | WRITE),
        Range(GiB, 3 * GiB, GiB, READ | WRITE),
        Range((1 << 12 + 9 * levels) - 4096, 0, 4096, READ | WRITE),
    ]
    assert walks.translate(FIRST, GiB + 0x1234, READ) == Translation(3 * GiB + 0x1234, GiB, READ | WRITE)


def test_levels_that_are_left_out_and_odd_sizes() -> None:
    memory = memoryview(bytearray(SIZE))
    tables = AmdTables(memory.cast("Q"), 8 * MiB)
    table, last = tables.take(), tables.take()
    tables.attach(FIRST, table, 4, 6)
    right = 3 << 61 | 1
    tables.store(table, last | right | 1 << 9)  # from level 4 to level 1
    for index in range(4):  # 16 KiB: bit 12 set, bit 13 clear
        tables.store(last + 8 * (4 + index), 0x40000 | 0x1000 | right | 7 << 9)
    walks = walker.Amd(Memory(memory), tables.root)
    assert walks.translate(FIRST, 0x6010, READ) == Translation(0x42010, 0x4000, 3)
    assert isinstance(walks.translate(FIRST, 0x206010, READ), Fault)
    assert list(walks.leaves(FIRST)) == [Range(0x4000, 0x40000, 0x4000, 3)]


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(3 << 61 | 1 | 2 << 9, id="next-level-not-below"),
        pytest.param(3 << 61 | 1 | 1 << 55, id="reserved"),
        pytest.param(3 << 61 | 1 | 1 << 12, id="large-leaf-not-aligned"),
        pytest.param(3 << 61 | 1 | 7 << 9, id="size-of-another-level"),
    ],
)
def test_entries_of_amd_that_are_refused(entry: int) -> None:
    memory = memoryview(bytearray(SIZE))
    tables = AmdTables(memory.cast("Q"), 8 * MiB)
    table = tables.take()
    tables.attach(FIRST, table, 4, 6)
    tables.store(tables.slot(table, 4, 0, 2, 3 << 61 | 1, amd=True), entry)
    found = walker.Amd(Memory(memory), tables.root).translate(FIRST, 0, READ)
    assert isinstance(found, Fault)
    assert found.reason == AmdReason.PAGE_FAULT
