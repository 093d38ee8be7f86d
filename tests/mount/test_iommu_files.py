"""Files of page tables through a mount, with and without -o writeback: what users may do, and what they read."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs import client
from pkernfs.format import BLOCK
from pkernfs.fs.filesystem import Filesystem
from pkernfs.region import open_region
from tests.core.support import map_file, mkdomain, open_fs, unmap
from tests.mount.site import MiB, Site, errno_of, run
from tests.mount.site import site as new_site

PAGE = 4096


@pytest.fixture(params=["", "writeback"], ids=["plain", "writeback"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A region of 64 MiB, mounted."""
    with new_site(options=request.param) as made:
        made.mount()
        yield made


@pytest.fixture
def domain(site: Site) -> Path:
    """A domain with its first block."""
    path = site.mnt / "iommu/dom-0"
    site.run_ok("touch", path)
    site.run_ok("truncate", "-s", "2M", path)
    return path


def offline(site: Site, change: Callable[[Filesystem], object]) -> None:
    """Change the region between two mounts, as the API of the IOMMU would."""
    site.umount()
    with open_region(str(site.region)) as region:
        fs = open_fs(region)
        change(fs)
        fs.volume.mark_unmounted()
    site.mount()


def store(site: Site, path: Path, offset: int, data: bytes) -> None:
    """Store into the memory of a file past the mount, as hardware does."""
    (extent,) = json.loads(os.getxattr(path, "user.pkernfs.extents"))
    with site.region.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        at = extent["region_offset"] + offset
        memory[at : at + len(data)] = data


def test_a_domain_by_touch_and_truncate(site: Site, domain: Path) -> None:
    facts = json.loads(site.run_ok("pkernfs", "info", "--json", domain))
    assert facts["flags"] == ["file", "iommu-domain-pgtables"]
    (extent,) = facts["extents"]
    assert (extent["region_offset"] % BLOCK, extent["length"]) == (0, BLOCK)
    assert domain.read_bytes() == b"\1" + bytes(BLOCK - 1)
    site.run_ok("truncate", "-s", "2M", domain)
    site.restart()
    assert domain.read_bytes() == b"\1" + bytes(BLOCK - 1)
    site.verify()


@pytest.mark.parametrize("size", [0, PAGE, 4 * MiB])
def test_other_sizes_are_refused(site: Site, domain: Path, size: int) -> None:
    assert errno_of(os.truncate, domain, size) == errno.EPERM
    assert errno_of(os.truncate, site.mnt / "iommu/root-pgtables", size or BLOCK) == errno.EPERM
    assert errno_of(os.open, domain, os.O_WRONLY | os.O_TRUNC) == errno.EPERM
    assert domain.stat().st_size == BLOCK


def test_only_the_api_changes_tables(domain: Path) -> None:
    """write(2) fails at once, and not when it is written back."""
    assert errno_of(os.open, domain, os.O_RDWR) == errno.EPERM
    fd = os.open(domain, os.O_WRONLY)
    assert errno_of(os.pwrite, fd, b"x" * 10, PAGE) == errno.EPERM
    assert errno_of(os.pwrite, fd, b"x" * MiB, 0) == errno.EPERM
    assert errno_of(os.write, fd, b"x") == errno.EPERM
    assert errno_of(os.ftruncate, fd, 4 * MiB) == errno.EPERM
    assert errno_of(mmap.mmap, fd, BLOCK, mmap.MAP_SHARED, mmap.PROT_WRITE) == errno.EACCES
    os.fsync(fd)
    os.close(fd)
    assert domain.read_bytes() == b"\1" + bytes(BLOCK - 1)
    assert run("pkernfs", "direct", domain, "on").returncode


def test_a_file_that_could_be_written_through_a_mapping_is_not_made(site: Site) -> None:
    made = site.mnt / "iommu/dom-1"
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL):
        assert errno_of(os.open, made, flags) == errno.EPERM
        assert not made.exists()
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.ftruncate(fd, BLOCK)
    assert errno_of(os.write, fd, b"x") == errno.EPERM
    os.close(fd)
    with made.open("ab") as file:
        assert errno_of(os.write, file.fileno(), b"x") == errno.EPERM


@pytest.mark.parametrize("opened", ["before", "anew"])
def test_reads_see_the_tables_as_they_are(site: Site, domain: Path, opened: str) -> None:
    fd = os.open(domain, os.O_RDONLY)
    assert os.pread(fd, BLOCK, 0) == b"\1" + bytes(BLOCK - 1)
    for number in range(30):
        data = b"%8d" % number
        store(site, domain, PAGE + 8 * number, data)
        if opened == "anew":
            os.close(fd)
            fd = os.open(domain, os.O_RDONLY)
        assert os.pread(fd, 8, PAGE + 8 * number) == data
    os.close(fd)


def test_tables_can_be_mapped_for_reading(site: Site, domain: Path) -> None:
    """Not shared: such a mapping showed what had been there, and went on to."""
    for number in range(3):
        store(site, domain, 3 * PAGE, b"%8d" % number)
        with domain.open("rb") as file:
            assert errno_of(mmap.mmap, file.fileno(), BLOCK, mmap.MAP_SHARED, mmap.PROT_READ) == errno.ENODEV
        with domain.open("rb") as file, mmap.mmap(file.fileno(), BLOCK, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
            assert memory[0] == 1
            assert memory[3 * PAGE : 3 * PAGE + 8] == b"%8d" % number
            assert os.pread(file.fileno(), 8, 3 * PAGE) == b"%8d" % number


def test_names_stay_in_iommu(site: Site, domain: Path) -> None:
    iommu = site.mnt / "iommu"
    file = site.mnt / "file"
    file.write_bytes(b"x")
    for call, *words in [
        (os.mkdir, iommu / "d"),
        (os.symlink, "x", iommu / "l"),
        (os.mkfifo, iommu / "p"),
        (os.link, file, iommu / "f"),
        (os.link, domain, site.mnt / "f"),
        (os.link, domain, iommu / "f"),
        (os.rename, domain, site.mnt / "f"),
        (os.rename, file, iommu / "f"),
        (os.rename, file, domain),
        (os.unlink, iommu / "root-pgtables"),
    ]:
        assert errno_of(call, *words) == errno.EPERM, (call, words)  # type: ignore[arg-type]
    os.rename(domain, iommu / "dom-1")
    os.mknod(iommu / "dom-2")
    os.rename(iommu / "dom-1", iommu / "dom-2")
    assert sorted(path.name for path in iommu.iterdir()) == ["dom-2", "root-pgtables"]


def test_a_domain_with_a_device_is_busy(site: Site, domain: Path) -> None:
    site.run_ok("pkernfs", "iommu", "attach", domain, "00:05.0")
    (site.mnt / "iommu/dom-1").touch()
    assert errno_of(os.unlink, domain) == errno.EBUSY
    assert errno_of(os.rename, site.mnt / "iommu/dom-1", domain) == errno.EBUSY


def mapped(site: Site) -> Path:
    """A file of 8 pages of which a domain maps pages 2 to 4."""
    path = site.mnt / "ram"
    path.write_bytes(b"R" * 8 * PAGE)
    offline(site, lambda fs: map_file(fs, mkdomain(fs), 0x100, fs.resolve(b"ram"), 2, 3))
    return path


def test_what_is_mapped_stays(site: Site) -> None:
    """Through truncate(2), unlink(2), the end of the server, and a mount."""
    path = mapped(site)
    assert errno_of(os.truncate, path, 4 * PAGE) == errno.EBUSY
    assert errno_of(os.open, path, os.O_WRONLY | os.O_TRUNC) == errno.EBUSY
    os.truncate(path, 5 * PAGE)
    (pin,) = json.loads(site.run_ok("pkernfs", "info", "--json", path))["pins"]
    assert pin == {"domain": "dom-0", "iova": 0x100000, "offset": 2 * PAGE, "length": 3 * PAGE, "access": "rw"}
    assert "pinned by domain dom-0: IOVA 0x100000, offset 0x2000, length 0x3000, rw" in site.run_ok(
        "pkernfs", "info", path
    )
    (extent,) = client.file(str(path)).extents
    path.unlink()
    for step in (site.restart, site.umount, site.mount):
        step()
        assert site.region.read_bytes()[extent.region_offset :][: 5 * PAGE] == b"R" * 5 * PAGE
    before = site.free()
    offline(site, lambda fs: unmap(fs, fs.resolve(b"iommu/dom-0"), 0x100))
    assert site.free() == before + 5 + 1


def test_removing_the_domain_lets_the_file_go(site: Site) -> None:
    """At once, also while it is open."""
    path = mapped(site)
    with (site.mnt / "iommu/dom-0").open("rb") as domain:
        os.unlink(domain.name)
        assert client.file(str(path)).pins == []
        os.truncate(path, 0)
        assert domain.read(1) == b"\1"
    site.verify()
