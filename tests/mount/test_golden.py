"""Regions that earlier releases made, mounted: everything is there as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.image import HERE, to_region, versions
from tests.golden.manifest import manifest
from tests.mount.site import Site, find_program


@pytest.mark.parametrize("version", versions())
def test_a_region_of_each_version_has_what_it_had(version: int, unmounted: Site) -> None:
    site = unmounted
    site.region.unlink()
    to_region((HERE / f"format-{version}.txt").read_text(), site.region)
    assert "clean" in site.run_ok("fsck.pkernfs", "-n", "-f", site.region)
    wanted = json.loads((HERE / f"format-{version}.json").read_text())
    for _ in range(2):
        site.mount()
        assert manifest(Path(site.mnt), find_program("pkernfs")) == wanted
        site.run_ok("pkernfs", "iommu", "audit", site.mnt)
        site.umount()
        site.run_ok("fsck.pkernfs", "-n", "-f", site.region)
