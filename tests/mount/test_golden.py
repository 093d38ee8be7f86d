"""Regions that earlier releases made, mounted: everything is there as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.image import HERE, images, to_region
from tests.golden.manifest import manifest
from tests.mount.site import Site, find_program


@pytest.mark.parametrize("name", images())
def test_a_region_of_each_version_has_what_it_had(name: str, unmounted: Site) -> None:
    site = unmounted
    site.region.unlink()
    to_region((HERE / f"format-{name}.txt").read_text(), site.region)
    assert "clean" in site.run_ok("fsck.pkernfs", "-n", "-f", site.region)
    wanted = json.loads((HERE / f"format-{name}.json").read_text())
    for _ in range(2):
        site.mount()
        assert manifest(Path(site.mnt), find_program("pkernfs")) == wanted
        site.run_ok("pkernfs", "iommu", "audit", site.mnt)
        site.umount()
        site.run_ok("fsck.pkernfs", "-n", "-f", site.region)
