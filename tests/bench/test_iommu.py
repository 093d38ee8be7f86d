"""How fast page tables are made and checked; tests/bench/iommu.py is the command."""

from __future__ import annotations

import pytest

from tests.bench import iommu


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_page_tables(pytestconfig: pytest.Config) -> None:
    print("\n\n" + iommu.measure(pytestconfig.getoption("--bench-rounds")), end="\n\n")
