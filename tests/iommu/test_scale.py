"""What large address spaces cost is counted in what is stored and read: tables, not the memory they point to."""

from __future__ import annotations

import pytest

from pkernfs.format import PAGE, Ino, TiB
from pkernfs.iommu import domain, mapping, replace, views
from pkernfs.iommu.guard import open_filesystem
from tests.bench.iommu import SparseRegion, filesystem
from tests.core.support import ME


class CountingRegion(SparseRegion):
    """Counts the bytes that are stored and read."""

    moved = 0

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.moved += len(data)
        super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        self.moved += 8
        super().store_word(offset, value)

    def read(self, offset: int, length: int) -> bytes:
        self.moved += length
        return super().read(offset, length)


@pytest.mark.parametrize(("leaf", "tables"), [(3, 3), (2, 1027)], ids=["1GiB", "2MiB"])
def test_a_tebibyte_costs_its_tables(leaf: int, tables: Ino) -> None:
    """Mapping it, finding it there after a restart, and taking it away."""
    fs, guest = filesystem(TiB, CountingRegion)
    region = fs.region
    assert isinstance(region, CountingRegion)
    dom = domain.create(fs, b"dom-0", "vtd", 4, ME)
    replace.replace(fs, dom, leaf)
    region.moved = 0
    mapping.map_file(fs, dom, TiB, guest)
    assert views.domain_facts(fs, dom, "").tables == tables
    budget = (tables + 64) * PAGE
    assert region.moved < 2 * budget
    region.moved = 0
    fs = open_filesystem(region)
    opening, region.moved = region.moved, 0
    assert opening < TiB // 2**20  # a byte for each block, and little more
    mapping.map_file(fs, dom, TiB, guest, live_update=True)
    assert region.moved < budget
    region.moved = 0
    mapping.unmap(fs, dom, TiB, TiB)
    assert region.moved < 3 * budget
    assert views.audit(fs).bytes == 0
