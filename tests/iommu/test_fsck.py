"""fsck looks at what devices can reach, and makes it right again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkernfs.format import BLOCK, MAPPING
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import FILESYSTEM
from pkernfs.fsck.check import check as check_all
from pkernfs.fsck.check.tables import page_tables
from pkernfs.fsck.findings import Finding
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair import Repair, repair_region
from pkernfs.iommu.records import Records
from pkernfs.iommu.walk import walk_device
from pkernfs.region import Region
from tests.core.support import check, open_fs
from tests.core.test_fsck import Counts
from tests.iommu.space import DEVICE, OTHER, KiB, MiB
from tests.iommu.test_audit import FAULTS, IOVA, SMALL, prepared, records
from tests.mount.site import run

#: What the records say wrong themselves is for the checks before.
OF_RECORDS = {"mapping-of-nothing", "attached-to-no-domain"}


def check_tables(region: Region) -> list[Finding]:
    """What the pass over the page tables finds by itself."""
    return check_all(Volume(region), (page_tables,))


def mend_tables(region: Region) -> list[Repair]:
    """What the stage for page tables does by itself."""
    return repair_region(region, passes=(page_tables,)).repairs


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - OF_RECORDS))
def test_a_run_audits_the_tables_where_all_else_is_sound(name: str) -> None:
    """As an ordinary pass and an ordinary stage."""
    fs = prepared()
    FAULTS[name][1](fs)
    region = fs.region
    found = check_all(Volume(region))
    if name != "table-marked-as-free":
        assert found == check_tables(region)
        assert {finding.code for finding in found} == {Code.IOMMU_TABLES}
    outcome = repair_region(region)
    assert (outcome.found, outcome.left) == (found, [])
    assert {repair.code for repair in outcome.repairs} <= {Code.IOMMU_TABLES, Code.IOMMU_BITMAP}
    assert check_all(Volume(region)) == []


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - OF_RECORDS))
def test_a_fault_is_mended(name: str) -> None:
    fs = prepared()
    FAULTS[name][1](fs)
    region = fs.region
    assert check_tables(region)
    assert check(fs.volume) == [] or name == "table-marked-as-free"
    assert mend_tables(region)
    assert check_tables(region) == []
    assert mend_tables(region) == []
    fs = open_fs(region)
    assert check(fs.volume) == []
    assert walk_device(fs, DEVICE, SMALL + 5 * KiB).offset == 65 * KiB
    assert walk_device(fs, DEVICE, IOVA + 3 * MiB).physical is not None
    assert walk_device(fs, OTHER, MiB).fault is None


def test_a_mapping_that_is_dropped_leaves_no_translation() -> None:
    """Its memory can be freed then."""
    fs = prepared()
    key = IOVA // 4096

    def spoil(found: Records, tx: Transaction) -> None:
        value = found.get(key)
        assert value is not None
        found.put(tx, key, MAPPING.pack(MAPPING.unpack(value)._replace(reserved=1)))

    records(b"iommu/dom-0", spoil)(fs)
    region = fs.region
    assert repair_region(region, passes=FILESYSTEM).left == []
    assert {problem.text.split(":")[0] for problem in check_tables(region)} == {"foreign"}
    mend_tables(region)
    fs = open_fs(region)
    fs.setattr(fs.resolve(b"guest"), SetAttr(size=0))
    assert check_tables(region) == []
    assert walk_device(fs, DEVICE, IOVA).fault == "not present at level 3"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = prepared()
    FAULTS["leaf-to-other-file"][1](fs)
    path = tmp_path / "region"
    path.write_bytes(fs.region.view)
    path.chmod(0o600)
    found = run("fsck.pkernfs", "-n", "--json", path)
    assert found.returncode == 4
    (problem,) = json.loads(found.stdout)["problems"]
    assert (problem["checker"], problem["path"]) == ("iommu-tables", "/iommu/dom-0")
    assert problem["text"].startswith("foreign: IOVAs 0x1000000")
    checks, audits = Counts(monkeypatch).of("-n", str(path))
    assert (checks, audits) == (1, 1)
    image = path.read_bytes()
    assert Counts(monkeypatch).of("-y", str(path)) == (2, 2)
    path.write_bytes(image)
    done = run("fsck.pkernfs", "-y", path)
    assert (done.returncode, "were made anew" in done.stdout) == (1, True)
    assert run("fsck.pkernfs", "-n", path).returncode == 0
    assert path.stat().st_size % BLOCK == 0
