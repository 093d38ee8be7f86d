"""Page tables made by hand, in a few lines, to check the walker and the machine with."""

from __future__ import annotations

from tests.iommu.walker import ENTRIES, PAGE


class Tables:
    """Tables in the memory ``words`` (8-byte words from ``base`` on), whose pages are taken from ``free`` on."""

    def __init__(self, words: memoryview, free: int, base: int = 0) -> None:
        self.words, self.free, self.base = words, free, base

    def take(self, pages: int = 1) -> int:
        """Zeroed pages, aligned to their size."""
        at = -(-self.free // (pages * PAGE)) * pages * PAGE
        self.free = at + pages * PAGE
        for n in range(pages * ENTRIES):
            self.store(at + 8 * n, 0)
        return at

    def load(self, address: int) -> int:
        value: int = self.words[(address - self.base) // 8]
        return value

    def store(self, address: int, value: int) -> None:
        self.words[(address - self.base) // 8] = value

    def slot(self, table: int, levels: int, iova: int, leaf: int, link: int, amd: bool) -> int:
        """The address of an entry of level ``leaf``; tables on the way are made, with the bits ``link``."""
        for level in range(levels, leaf, -1):
            at = table + 8 * (iova >> 3 + 9 * level & ENTRIES - 1)
            if not self.load(at):
                self.store(at, self.take() | link | (level - 1 << 9 if amd else 0))
            table = self.load(at) & (1 << 52) - PAGE
        return table + 8 * (iova >> 3 + 9 * leaf & ENTRIES - 1)


class VtdTables(Tables):
    """Root table, one context table for each bus, and tables of domains."""

    def __init__(self, words: memoryview, free: int, base: int = 0) -> None:
        super().__init__(words, free, base)
        self.root = self.take()

    def attach(self, device: int, table: int, levels: int, id: int) -> None:
        at = self.root + 16 * (device >> 8)
        if not self.load(at):
            self.store(at, self.take() | 1)
        at = (self.load(at) & -PAGE) + 16 * (device & 0xFF)
        self.store(at + 8, id << 8 | levels - 2)
        self.store(at, table | 1)

    def map(self, table: int, levels: int, iova: int, physical: int, leaf: int, access: int) -> int:
        """One leaf, of level ``leaf``; the address of its entry."""
        at = self.slot(table, levels, iova, leaf, link=3, amd=False)
        self.store(at, physical | access | (1 << 7 if leaf > 1 else 0))
        return at


class AmdTables(Tables):
    """A device table that lets nothing pass, and tables of domains."""

    BLOCKED = 3  #: V and TV, mode 0, neither IR nor IW

    def __init__(self, words: memoryview, free: int, base: int = 0) -> None:
        super().__init__(words, free, base)
        self.root = self.take(512)
        for device in range(1 << 16):
            self.store(self.root + 32 * device, self.BLOCKED)

    def attach(self, device: int, table: int, levels: int, id: int) -> None:
        at = self.root + 32 * device
        self.store(at + 8, id)
        self.store(at, table | 3 << 61 | levels << 9 | 3)

    def map(self, table: int, levels: int, iova: int, physical: int, leaf: int, access: int) -> int:
        """One leaf, of level ``leaf``; the address of its entry."""
        at = self.slot(table, levels, iova, leaf, link=3 << 61 | 1, amd=True)
        self.store(at, physical | access << 61 | 1)
        return at
