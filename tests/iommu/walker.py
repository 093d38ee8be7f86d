"""A second walker of IOMMU page tables, written from the specifications of the hardware alone, without pkernfs.

Intel VT-d, revision 4.1: legacy mode, sections 3.4 (root and context entries), 3.7 (second-stage translation), 7.1.3
(fault reasons), 9.1, 9.3 and 9.8 (entries).  AMD I/O Virtualization Technology 48882, revision 3.08: sections 2.2.2
(device table), 2.2.3 (page tables), 2.5 (events).

It is as strict as hardware that has none of the optional features, and stricter where the specifications leave it open.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple, Protocol

READ, WRITE = 1, 2
PAGE = 4096
ENTRIES = 512  #: of one table
ADDRESS = ((1 << 52) - 1) & -PAGE  #: bits of an entry that are an address, in all formats


class VtdReason(IntEnum):
    """Fault reasons of VT-d, as its fault recording registers give them."""

    ROOT_NOT_PRESENT = 0x1
    CONTEXT_NOT_PRESENT = 0x2
    CONTEXT_INVALID = 0x3
    BEYOND_WIDTH = 0x4
    NO_WRITE = 0x5
    NO_READ = 0x6
    TABLE_OUTSIDE_MEMORY = 0x7
    ROOT_OUTSIDE_MEMORY = 0x8
    CONTEXT_OUTSIDE_MEMORY = 0x9
    ROOT_RESERVED = 0xA
    CONTEXT_RESERVED = 0xB
    ENTRY_RESERVED = 0xC


class AmdReason(IntEnum):
    """Event codes of AMD-Vi, and what has none: a request that is aborted, or passes, without an event."""

    ILLEGAL_DEVICE_ENTRY = 0x1
    PAGE_FAULT = 0x2
    DEVICE_TABLE_OUTSIDE_MEMORY = 0x3
    TABLE_OUTSIDE_MEMORY = 0x4
    ABORTED = 0x100
    UNTRANSLATED = 0x101  #: the device reaches all of memory by physical addresses


class Fault(NamedTuple):
    """Why there is no translation."""

    reason: VtdReason | AmdReason
    address: int  #: physical, of the entry that was looked at last
    entry: int  #: its value; 0 where it could not be read


class Translation(NamedTuple):
    """Where one access goes."""

    physical: int
    size: int  #: bytes of the leaf
    access: int  #: READ | WRITE, all levels taken together


class Range(NamedTuple):
    """Addresses that translate to as many consecutive bytes of memory."""

    iova: int
    physical: int
    length: int  #: bytes
    access: int


class Malformed(Exception):
    """An entry that hardware does not accept, or the lack of one."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"{fault.reason.name}: entry {fault.entry:#x} at {fault.address:#x}")
        self.fault = fault


class Memory:
    """Physical memory from ``base`` on.  Each load of an entry is one load of 8 bytes."""

    def __init__(self, view: memoryview, base: int = 0) -> None:
        self.words = view.cast("B").cast("Q")
        self.base = base

    def load(self, address: int, outside: VtdReason | AmdReason) -> int:
        """The 8 bytes at an address; raises Malformed with ``outside`` where there is no memory."""
        index, rest = divmod(address - self.base, 8)
        if rest or not 0 <= index < len(self.words):
            raise Malformed(Fault(outside, address, 0))
        return self.words[index]


class Pages(Protocol):
    """The page tables of one domain."""

    levels: int

    def step(self, table: int, level: int, index: int) -> Step | None:
        """What an entry says; None: nothing.  Raises Malformed."""

    def fault(self, access: int, step: Step | None, address: int) -> Fault:
        """How hardware tells that an access is not allowed."""


class Step(NamedTuple):
    """A present entry of a page table."""

    address: int
    entry: int
    target: int  #: physical address of the next table, or of memory
    access: int
    level: int  #: of the next table; 0: ``target`` is memory
    size: int  #: bytes of memory that it is, for a leaf


def translate(pages: Pages, root: int, iova: int, access: int, allowed: int = READ | WRITE) -> Translation | Fault:
    """Where an access goes that begins at a table of ``pages.levels``; ``allowed`` is what the device may at most."""
    table, level = root, pages.levels
    try:
        while True:
            index = iova >> 3 + 9 * level & ENTRIES - 1
            step = pages.step(table, level, index)
            if step is None or access & ~step.access & (READ | WRITE):
                return pages.fault(access, step, table + 8 * index)
            allowed &= step.access
            if step.level == 0:
                return Translation(step.target + iova % step.size, step.size, allowed)
            if iova >> 12 + 9 * step.level & (1 << 9 * (level - step.level - 1)) - 1:
                return pages.fault(access, step, step.address)
            table, level = step.target, step.level
    except Malformed as error:
        return error.fault


def leaves(pages: Pages, root: int, allowed: int = READ | WRITE) -> Iterator[Range]:
    """All leaves in the order of their addresses, those without any right left out.  Raises Malformed."""

    def below(table: int, level: int, start: int, allowed: int) -> Iterator[Range]:
        covers = 1 << 3 + 9 * level
        for index in range(ENTRIES):
            step = pages.step(table, level, index)
            if step is None or not step.access & allowed:
                continue
            iova = start + index * covers
            if step.level:
                yield from below(step.target, step.level, iova, step.access & allowed)
            elif iova % step.size == 0:
                yield Range(iova, step.target, step.size, step.access & allowed)

    return below(root, pages.levels, 0, allowed)


def joined(parts: Iterator[Range]) -> Iterator[Range]:
    """The same, with neighbours that go on in memory as one."""
    last: Range | None = None
    for part in parts:
        if (
            last
            and last.access == part.access
            and part.iova - last.iova == part.physical - last.physical == last.length
        ):
            last = last._replace(length=last.length + part.length)
            continue
        if last:
            yield last
        last = part
    if last:
        yield last


class VtdPages:
    """Second-stage page tables.  ``width``: bits of a physical address that the platform has."""

    def __init__(self, memory: Memory, levels: int, width: int = 52) -> None:
        self.memory, self.levels = memory, levels
        # Bits 51:width; 11, SNP, where snooping cannot be controlled; and 62, TM, where there are no device TLBs.
        self.reserved = 1 << 62 | 1 << 11 | (1 << 52) - (1 << width)

    def step(self, table: int, level: int, index: int) -> Step | None:
        address = table + 8 * index
        entry = self.memory.load(address, VtdReason.TABLE_OUTSIDE_MEMORY)
        if not entry & 3:
            return None
        reserved = self.reserved
        leaf = level == 1
        size = 1 << 3 + 9 * level
        if level in (2, 3) and entry & 1 << 7:
            leaf = True
            reserved |= size - PAGE
        elif level > 3:
            reserved |= 1 << 7
        if entry & reserved:
            raise Malformed(Fault(VtdReason.ENTRY_RESERVED, address, entry))
        return Step(address, entry, entry & ADDRESS, entry & 3, 0 if leaf else level - 1, size if leaf else 0)

    def fault(self, access: int, step: Step | None, address: int) -> Fault:
        lacking = access & ~step.access if step else access
        reason = VtdReason.NO_WRITE if lacking & WRITE else VtdReason.NO_READ
        return Fault(reason, address, step.entry if step else 0)


class VtdContext(NamedTuple):
    """A present context entry in legacy mode."""

    table: int
    levels: int
    id: int  #: of the domain


class Vtd:
    """What an IOMMU of Intel does, given the root table that RTADDR names."""

    def __init__(self, memory: Memory, root: int, width: int = 52) -> None:
        self.memory, self.root, self.width = memory, root, width
        self.beyond = -1 << width & (1 << 64) - 1

    def context(self, device: int) -> VtdContext:
        """The context of bus << 8 | device << 3 | function.  Raises Malformed."""
        load = self.memory.load
        at = self.root + 16 * (device >> 8)
        low, high = (load(at + n, VtdReason.ROOT_OUTSIDE_MEMORY) for n in (0, 8))
        if not low & 1:
            raise Malformed(Fault(VtdReason.ROOT_NOT_PRESENT, at, low))
        if high or low & (0xFFE | self.beyond):
            raise Malformed(Fault(VtdReason.ROOT_RESERVED, at, low))
        at = (low & ADDRESS) + 16 * (device & 0xFF)
        low, high = (load(at + n, VtdReason.CONTEXT_OUTSIDE_MEMORY) for n in (0, 8))
        if not low & 1:
            raise Malformed(Fault(VtdReason.CONTEXT_NOT_PRESENT, at, low))
        if low & (0xFF0 | self.beyond) or high & ~(0xFFFF << 8 | 0x7F):
            raise Malformed(Fault(VtdReason.CONTEXT_RESERVED, at, low))
        levels = (high & 7) + 2
        if low >> 2 & 3 or not 3 <= levels <= 5:
            raise Malformed(Fault(VtdReason.CONTEXT_INVALID, at, low))
        return VtdContext(low & ADDRESS, levels, high >> 8 & 0xFFFF)

    def pages(self, context: VtdContext) -> VtdPages:
        return VtdPages(self.memory, context.levels, self.width)

    def translate(self, device: int, iova: int, access: int) -> Translation | Fault:
        """Where an access of a device goes."""
        try:
            context = self.context(device)
        except Malformed as error:
            return error.fault
        if iova >> 12 + 9 * context.levels:
            return Fault(VtdReason.BEYOND_WIDTH, context.table, 0)
        return translate(self.pages(context), context.table, iova, access)

    def leaves(self, device: int) -> Iterator[Range]:
        """All that a device can reach.  Raises Malformed."""
        context = self.context(device)
        return leaves(self.pages(context), context.table)


class AmdPages:
    """Version 1 page tables, with default and other page sizes, and levels that are left out."""

    def __init__(self, memory: Memory, levels: int) -> None:
        self.memory, self.levels = memory, levels

    def step(self, table: int, level: int, index: int) -> Step | None:
        address = table + 8 * index
        entry = self.memory.load(address, AmdReason.TABLE_OUTSIDE_MEMORY)
        if not entry & 1:
            return None
        following = entry >> 9 & 7
        target, size = entry & ADDRESS, 1 << 3 + 9 * level
        reserved = 0x7F << 52
        if following == 7:
            # The size is told by the lowest bit of the address that is 0: 8 KiB when it is bit 12.
            size = 2 * ((target | PAGE - 1) + 1 & ~(target | PAGE - 1))
            target &= -size
            bad = not 1 << 3 + 9 * level < size < 1 << 12 + 9 * level
        elif following == 0:
            bad = level == 6 or target % size != 0
        else:
            reserved |= 3 << 59
            bad = following >= level
        if bad or entry & reserved:
            raise Malformed(Fault(AmdReason.PAGE_FAULT, address, entry))
        leaf = following in (0, 7)
        return Step(address, entry, target, entry >> 61 & 3, 0 if leaf else following, size if leaf else 0)

    def fault(self, _access: int, step: Step | None, address: int) -> Fault:
        return Fault(AmdReason.PAGE_FAULT, address, step.entry if step else 0)


class AmdDevice(NamedTuple):
    """A device table entry with a valid translation."""

    table: int
    levels: int
    id: int  #: of the domain
    access: int


class Amd:
    """What an IOMMU of AMD does, given the device table that DevTabBase names, and its size in entries."""

    def __init__(self, memory: Memory, root: int, entries: int = 1 << 16) -> None:
        self.memory, self.root, self.entries = memory, root, entries

    def device(self, device: int) -> AmdDevice:
        """The entry of bus << 8 | device << 3 | function.  Raises Malformed."""
        at = self.root + 32 * device
        if device >= self.entries:
            raise Malformed(Fault(AmdReason.ILLEGAL_DEVICE_ENTRY, at, 0))
        words = [self.memory.load(at + 8 * n, AmdReason.DEVICE_TABLE_OUTSIDE_MEMORY) for n in range(4)]
        entry = words[0]
        if not entry & 1:
            raise Malformed(Fault(AmdReason.UNTRANSLATED, at, entry))
        # Bits 6:2 and 63 are reserved; 8:7, 60:52 and all of the other words but the domain's id, and how interrupts
        # pass, ask for features that have to be enabled first.
        if entry & (1 << 63 | 0x1FF << 52 | 0x1FC) or words[1] >> 16 or words[2] & ~(0x37 << 56 | 3 << 62):
            raise Malformed(Fault(AmdReason.ILLEGAL_DEVICE_ENTRY, at, entry))
        access, levels = entry >> 61 & 3, entry >> 9 & 7
        if not entry & 2 or (levels == 0 and not access):
            raise Malformed(Fault(AmdReason.ABORTED, at, entry))
        if levels == 0:
            raise Malformed(Fault(AmdReason.UNTRANSLATED, at, entry))
        if levels == 7:
            raise Malformed(Fault(AmdReason.ILLEGAL_DEVICE_ENTRY, at, entry))
        return AmdDevice(entry & ADDRESS, levels, words[1] & 0xFFFF, access)

    def translate(self, device: int, iova: int, access: int) -> Translation | Fault:
        """Where an access of a device goes."""
        try:
            entry = self.device(device)
        except Malformed as error:
            return error.fault
        if iova >> 12 + 9 * entry.levels or access & ~entry.access:
            return Fault(AmdReason.PAGE_FAULT, self.root + 32 * device, 0)
        return translate(AmdPages(self.memory, entry.levels), entry.table, iova, access, entry.access)

    def leaves(self, device: int) -> Iterator[Range]:
        """All that a device can reach.  Raises Malformed."""
        entry = self.device(device)
        return leaves(AmdPages(self.memory, entry.levels), entry.table, entry.access)
