"""pkernfs quota, through the command and system calls."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mount.site import MiB, Site, errno_of, run


def quota(*words: str | Path) -> dict[str, int | str] | None:
    """What `pkernfs quota --json` prints."""
    done = run("pkernfs", "quota", "--json", *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, int | str] | None = json.loads(done.stdout)["quota"]
    return found


@pytest.fixture
def tenant(site: Site) -> Path:
    """A directory with a quota of 4 MiB."""
    path = site.mnt / "tenant"
    path.mkdir()
    assert quota(path, "4M") == {"directory": str(path), "limit": 4 * MiB, "used": 256}
    return path


def fill(path: Path) -> int:
    """Write to a file until it fails; the errno."""
    with open(path, "wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 100_000)
            except OSError as error:
                return error.errno or -1


def test_one_tenant_cannot_take_all(site: Site, tenant: Path) -> None:
    assert fill(tenant / "f") == errno.EDQUOT
    size = (tenant / "f").stat().st_size
    assert 4 * MiB - 32768 < size <= 4 * MiB
    assert (tenant / "f").read_bytes() == b"x" * size
    assert errno_of(os.truncate, tenant / "f", 5 * MiB) == errno.EDQUOT
    for n in range(1000):
        if failed := errno_of((tenant / f"n{n}").touch):
            assert failed == errno.EDQUOT
            break
    else:
        pytest.fail("as many files as one likes")
    (site.mnt / "other").write_bytes(b"y" * (8 * MiB))
    shutil.rmtree(tenant)
    assert (site.mnt / "other").read_bytes() == b"y" * (8 * MiB)


def test_removed_files_make_room_at_once(tenant: Path) -> None:
    for n in range(20):
        (tenant / "f").write_bytes(b"x" * (3 * MiB + n))
        os.unlink(tenant / "f")
    assert quota(tenant) == {"directory": str(tenant), "limit": 4 * MiB, "used": 256}


def test_an_open_file_counts(tenant: Path) -> None:
    with open(tenant / "f", "wb", buffering=0) as file:
        file.write(b"x" * (3 * MiB))
        os.unlink(tenant / "f")
        assert fill(tenant / "g") == errno.EDQUOT
        assert (tenant / "g").stat().st_size < 2 * MiB
    (tenant / "h").write_bytes(b"x" * (2 * MiB))


@pytest.mark.parametrize(("where", "mib"), [("tenant", 8), (".", 80)], ids=["quota", "region"])
def test_mmap_beyond_the_space(site: Site, tenant: Path, where: str, mib: int) -> None:
    """Holes of a file that are stored into through a mapping: msync says what could not be kept; no signal."""
    program = """
import mmap, os, sys
size = int(sys.argv[2]) * 2**20
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b"z", size - 1)
m = mmap.mmap(fd, size)
for at in range(0, size - 2**20, 4096):
    m[at] = 1
try:
    m.flush()
except OSError as error:
    print(error.errno)
"""
    words = ["python3", "-c", program, str(site.mnt / where / "f"), str(mib)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EDQUOT if where == 'tenant' else errno.ENOSPC}\n"
    found = quota(tenant)
    assert found
    assert int(found["used"]) <= 4 * MiB


def test_mv_copies_from_one_quota_to_another(site: Site, tenant: Path) -> None:
    (site.mnt / "f").write_bytes(b"x" * MiB)
    assert errno_of(os.rename, site.mnt / "f", tenant / "f") == errno.EXDEV
    assert errno_of(os.link, site.mnt / "f", tenant / "f") == errno.EXDEV
    subprocess.run(["mv", site.mnt / "f", tenant / "g"], check=True)
    assert (tenant / "g").read_bytes() == b"x" * MiB
    assert not (site.mnt / "f").exists()
    found = quota(tenant)
    assert found
    assert int(found["used"]) > MiB


def test_a_quota_survives(site: Site, tenant: Path) -> None:
    (tenant / "f").write_bytes(b"x" * MiB)
    before = quota(tenant)
    site.restart()
    assert quota(tenant) == before
    assert fill(tenant / "g") == errno.EDQUOT


def test_what_the_command_says(site: Site, tenant: Path) -> None:
    (tenant / "d").mkdir()
    (tenant / "d/f").write_bytes(b"x" * 10_000)
    assert run("pkernfs", "quota", tenant / "d").stdout == f"{tenant}: 20.8 KiB of 4 MiB used\n"
    assert run("pkernfs", "quota", site.mnt).stdout == f"{site.mnt}: no quota\n"
    assert quota(site.mnt) is None
    assert quota(tenant, "0x600000") == {"directory": str(tenant), "limit": 6 * MiB, "used": 21248}
    assert quota(tenant, "none") is None
    (tenant / "g").write_bytes(b"x" * (8 * MiB))
    # Of what is there already, and more than the limit.
    assert fill(tenant / "h") == errno.ENOSPC
    (tenant / "h").unlink()
    found = quota(tenant, "1M")
    assert found
    assert int(found["used"]) > 8 * MiB
    assert errno_of((tenant / "new").touch) == errno.EDQUOT


def test_what_the_command_refuses(site: Site, tenant: Path) -> None:
    (tenant / "f").touch()
    os.link(tenant / "f", tenant / "g")
    for words, status, text in (
        ((tenant / "f", "1M"), 2, "expected a directory"),
        ((tenant, "much"), 2, "expected a size"),
        ((tenant, "-1"), 2, ""),
        (("/tmp", "1M"), 2, "expected a path in a pkernfs mount"),
        ((site.mnt / "missing",), 2, "expected a directory"),
    ):
        done = run("pkernfs", "quota", *words)
        assert (done.returncode, done.stdout) == (status, "")
        assert text in done.line
    run("pkernfs", "quota", tenant, "none")
    os.link(tenant / "f", site.mnt / "h")
    done = run("pkernfs", "quota", tenant, "1M")
    assert done.returncode == 1
    assert "elsewhere" in done.line
    assert quota(tenant) is None
