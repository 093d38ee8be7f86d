"""A host that has less than its region: memory that is missing, a file that was cut, a disk that is full or fails.

A store that finds no memory is ENOSPC for that request, and no SIGBUS for the worker; a region that cannot be used at
all is EIO in a bounded time, until it can be used again.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pkernfs import client
from pkernfs.errors import FsError
from pkernfs.fs import memory as memory_module
from pkernfs.fs.mkfs import mkfs
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import FileRegion, Region, open_region
from pkernfs.region import file as file_module
from pkernfs.region import host as host_module
from tests.mount.site import MiB, Site, errno_of, run, small_host, wait_for

PAGE = 4096
BLOCK = 2 * MiB
EHWPOISON = 133


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 MiB."""
    path = tmp_path / "host"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def fill(host: Path) -> None:
    """Take all memory that the host has left."""
    with (host / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(PAGE)):
            pass


# -- mkfs, info, status, df -------------------------------------------------------------------------------------------


def test_mkfs_says_that_the_host_has_less(host: Path) -> None:
    """It makes nothing that the host can never have, unless it is told to; of what it has not now there is a warning.

    What a file has already counts, and what is there stays.
    """
    path = host / "region"
    result = run("mkfs.pkernfs", "--size", "1T", path)
    assert result.returncode == 1
    assert re.fullmatch(
        rf"mkfs.pkernfs: {path}: expected 1 TiB of memory for the region, the host has [\d.]+ GiB in all: "
        "--sparse makes it all the same",
        result.line,
    )
    assert not path.exists()
    assert run("mkfs.pkernfs", "-q", "--size", "22M", path).returncode == 0
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 22 * MiB)
    fill(host)
    assert run("mkfs.pkernfs", "-q", "-f", path).returncode == 0
    before = path.read_bytes()
    for size in ("1T", None):
        if size is None:
            os.truncate(path, 1 << 40)
        result = run("mkfs.pkernfs", "-f", *(["--size", size] if size else []), path)
        assert (result.returncode, "the host has" in result.line) == (1, True)
        os.truncate(path, 22 * MiB)
        assert path.read_bytes() == before
    os.truncate(path, 64 * MiB)
    for options, warned in (([], True), (["-q"], False), (["--sparse"], False)):
        result = run("mkfs.pkernfs", "-f", *options, path)
        assert (result.returncode, "the host has 22" in result.stderr) == (0, warned)
    os.truncate(path, 22 * MiB)
    os.unlink(host / "filler")
    assert run("mkfs.pkernfs", "-q", "-f", "--sparse", "--size", "1T", path).returncode == 0
    assert path.stat().st_size == 1 << 40


def test_what_is_shown_is_what_is_there(unmounted: Site) -> None:
    """By df, info and status, before and after the host has nothing left."""
    site = unmounted
    with small_host(site, "24M"):
        assert json.loads(site.run_ok("pkernfs", "info", "--json", site.region))["host_free"] <= 24 * MiB
        site.mount()
        for full in (False, True):
            if full:
                fill(site.region.parent)
            figures, on_host = os.statvfs(site.mnt), os.statvfs(site.region.parent)
            info = json.loads(site.run_ok("pkernfs", "info", "--json", site.mnt))
            status = site.status()
            left = on_host.f_bavail * on_host.f_frsize
            in_slabs = figures.f_bavail * PAGE - left
            assert 0 <= in_slabs < BLOCK + BLOCK  # pages of slabs have memory already; whole blocks are not cut
            assert figures.f_bfree * PAGE > 50 * MiB
            assert info["space_free"] == figures.f_bavail * PAGE
            assert info["space_used"] == (figures.f_blocks - figures.f_bfree) * PAGE
            assert info["host_free"] == status["host_free"] == left
            assert info["memory"] == status["memory"] == site.allocated()
            text = site.run_ok("pkernfs", "info", site.mnt)
            assert ": the host has no memory for " in text
            assert "\nmemory " in text
            assert "\nmemory " in site.run_ok("pkernfs", "status", site.mnt)
        (site.region.parent / "filler").unlink()


# -- no memory --------------------------------------------------------------------------------------------------------


def copy_with_holes(site: Site) -> None:
    site.umount()
    site.wait_for_end()
    copy = site.region.with_name("copy")
    site.run_ok("cp", "--sparse=always", site.region, copy)
    copy.rename(site.region)
    site.mount()


@pytest.mark.parametrize("copied", [False, True], ids=["sparse", "copied-with-holes"])
def test_a_full_host_is_no_space_and_nothing_else(unmounted: Site, copied: bool) -> None:
    """What was promised has memory, and the rest is ENOSPC."""
    site = unmounted
    with small_host(site, "24M"):
        site.mount()
        top, host = site.mnt, site.region.parent
        (top / "keep").write_text("kept")
        (top / "zeros").write_bytes(bytes(4 * MiB))
        (top / "ram").touch()
        os.truncate(top / "ram", 4 * MiB)
        if copied:
            copy_with_holes(site)
        fill(host)
        assert errno_of(os.truncate, top / "ram", 30 * MiB) == errno.ENOSPC
        assert errno_of((top / "new").write_bytes, bytes(12 * MiB)) == errno.ENOSPC
        for number in range(20):
            with suppress(OSError):
                (top / f"dir{number}").mkdir()
                os.setxattr(top / f"dir{number}", "user.x", b"v" * 3000)
        with (top / "zeros").open("r+b") as file:
            file.write(b"z" * (4 * MiB))
        with (top / "ram").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            for at in range(0, len(memory), PAGE):
                memory[at] = 7
            memory.flush()
            os.fsync(file.fileno())
        assert (top / "keep").read_text() == "kept"
        assert site.status()["takeovers"] == 0
        (host / "filler").unlink()
        for path in (*top.glob("dir*"), top / "new"):
            path.rmdir() if path.is_dir() else path.unlink()
        (top / "again").write_bytes(b"a" * (4 * MiB))


def test_a_copy_for_which_there_is_too_little(unmounted: Site) -> None:
    """Files' holes are ENOSPC when they are stored to, and zeros when they are read; metadata must have memory."""
    site = unmounted
    site.expected = re.compile("stores into files may fail with ENOSPC")
    with small_host(site, "24M"):
        site.mount()
        (site.mnt / "zeros").write_bytes(bytes(6 * MiB))
        site.umount()
        site.wait_for_end()
        copy = site.region.with_name("copy")
        site.run_ok("cp", "--sparse=always", site.region, copy)
        copy.rename(site.region)
        region, host = site.region, site.region.parent
        fill(host)
        result = site.try_mount()
        assert result.returncode == 32
        assert "no memory on the host for" in result.line
        # Read-only all is there: zeros take no memory.
        site.mount("ro")
        assert (site.mnt / "zeros").read_bytes() == bytes(6 * MiB)
        site.umount()
        site.wait_for_end()
        with (host / "filler").open("r+b") as file:  # enough for metadata
            file.truncate((host / "filler").stat().st_size - 7 * MiB)
        site.mount()
        fill(host)
        assert (site.mnt / "zeros").read_bytes() == bytes(6 * MiB)
        with (site.mnt / "zeros").open("r+b", buffering=0) as file:
            found = [errno_of(os.pwrite, file.fileno(), b"z" * MiB, at * MiB) for at in range(6)]
        assert found[-1] == errno.ENOSPC
        assert site.status()["takeovers"] == 0
        os.unlink(host / "filler")
        with (site.mnt / "zeros").open("r+b", buffering=0) as file:
            assert file.write(b"z" * MiB) == MiB
        assert site.region == region


def test_memory_that_is_taken_away_below_a_mount(unmounted: Site) -> None:
    """One worker dies of it (SIGBUS); the next one asks for each page, and the request that comes again is ENOSPC."""
    site = unmounted
    site.expected = re.compile("takes over|stores into files may fail with ENOSPC")
    with small_host(site, "24M"):
        site.mount()
        path, host = site.mnt / "f", site.region.parent
        path.write_bytes(b"f" * (4 * MiB))
        (extent,) = client.file(str(path)).extents
        with site.region.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as memory:
            memory.madvise(mmap.MADV_REMOVE, extent.region_offset, 4 * MiB)
        fill(host)
        with path.open("r+b", buffering=0) as file:
            for _ in range(5):
                assert errno_of(os.pwrite, file.fileno(), b"z" * PAGE, MiB) == errno.ENOSPC
        assert (site.status()["takeovers"], site.status()["last_reason"]) == (1, "signal SIGBUS")
        (host / "filler").unlink()
        path.write_bytes(b"z" * (4 * MiB))
        assert site.status()["takeovers"] == 1


# -- a region that cannot be used -------------------------------------------------------------------------------------


def fails_in_time(top: Path) -> None:
    """Calls are answered."""
    for program, path in (("ls", top), ("touch", top / "new"), ("cat", top / "f"), ("rm", top / "f")):
        result = run(program, path, timeout=20)
        assert "Input/output error" in result.stderr, result


def test_a_region_that_was_cut_below_its_mount(unmounted: Site) -> None:
    """EIO for everybody, status says why, the region is served again when it is whole, and umount works."""
    site = unmounted
    site.expected = re.compile(
        "takes over|takeover failed|requests fail with EIO|can be used again|copy of the superblock"
    )
    site.mount()
    (site.mnt / "f").write_bytes(b"f" * 100_000)
    kept = site.region.read_bytes()
    os.truncate(site.region, 8 * MiB)
    assert errno_of((site.mnt / "g").write_bytes, b"g") == errno.EIO  # a name, in what is gone
    wait_for(lambda: "truncated" in site.status()["refused"], "the keeper says why")
    assert "the region is truncated: expected 67108864 bytes, found 8388608" in site.run_ok(
        "pkernfs", "status", site.mnt
    )
    fails_in_time(site.mnt)
    with site.region.open("r+b") as file:
        file.write(kept)
    wait_for(lambda: not site.status()["refused"], "the region is served again")
    assert (site.mnt / "f").read_bytes() == b"f" * 100_000
    site.umount()


@pytest.mark.parametrize("lazily", [False, True])
def test_the_end_of_a_mount_that_nobody_can_serve(unmounted: Site, lazily: bool) -> None:
    """Unmounted it is, whoever waits, and the keeper ends and gives the lock back."""
    site = unmounted
    site.expected = re.compile("takes over|takeover failed|requests fail with EIO")
    site.mount()
    (site.mnt / "f").write_text("f")
    kept = site.region.read_bytes()
    os.truncate(site.region, 8 * MiB)
    os.kill(site.worker(), signal.SIGKILL)
    wait_for(lambda: site.status()["refused"], "the keeper says why")
    site.run_ok("umount", *["-l"] * lazily, site.mnt)
    site.wait_for_end()
    site.region.write_bytes(kept)
    site.verify()


@contextmanager
def loop_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 32 MiB on a loop device.  Skips where there is none."""
    if not shutil.which("mkfs.ext4") or not shutil.which("losetup"):
        pytest.skip("needs mkfs.ext4 and losetup")
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 * MiB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    disk.mkdir()
    mounted = run("mount", "-o", "loop", image, disk)
    if mounted.returncode:
        pytest.skip(f"no loop device: {mounted.stderr}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk(unmounted: Site, tmp_path: Path) -> None:
    """A sparse region on a disk: what cannot be written is ENOSPC; what was promised is there."""
    site = unmounted
    with loop_disk(tmp_path) as disk:
        site.region.unlink()
        site.region = disk / "region"
        result = run("mkfs.pkernfs", "--size", "64M", site.region)
        assert "of room on its disk for the region, the host has" in result.line
        site.make("64M")
        site.mount()
        (site.mnt / "ram").touch()
        os.truncate(site.mnt / "ram", 4 * MiB)
        fill(disk)
        assert errno_of((site.mnt / "new").write_bytes, bytes(12 * MiB)) == errno.ENOSPC
        assert errno_of(os.truncate, site.mnt / "ram", 16 * MiB) == errno.ENOSPC
        with (site.mnt / "ram").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[:] = b"r" * len(memory)
            memory.flush()
        assert site.status()["takeovers"] == 0
        os.unlink(disk / "filler")
        (site.mnt / "again").write_bytes(b"a" * (4 * MiB))
        site.umount()
        site.wait_for_end()
        site.verify()


# -- the region itself: each refusal at each place --------------------------------------------------------------------


class Bad:
    """A mapping in which the pages of a range cannot be had."""

    def __init__(self, mapping: mmap.mmap, number: int, first: int, end: int) -> None:
        self.mapping, self.number, self.first, self.end = mapping, number, first, end

    def madvise(self, option: int, offset: int, length: int) -> None:
        populates = option in (file_module.MADV_POPULATE_READ, file_module.MADV_POPULATE_WRITE)
        if populates and offset < self.end and self.first < offset + length:
            raise OSError(self.number, os.strerror(self.number))
        self.mapping.madvise(option, offset, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mapping, name)


def region_with(host: Path) -> Path:
    """A region with a file "f" of 4 MiB, closed."""
    path = host / "region"
    path.touch()
    os.truncate(path, 20 * MiB)
    with open_region(str(path)) as region:
        mkfs(region)
        with_file(region)
    return path


def with_file(region: Region) -> None:
    from pkernfs.fs.names import Caller

    fs = open_filesystem(region)
    ino = fs.create(1, b"f", 0o100600, Caller(0, 0))  # type: ignore[arg-type]
    fs.write(ino, 0, b"f" * (4 * MiB))


#: what the kernel says of a page, and what a store into it is then
REFUSALS = {errno.EFAULT: errno.EIO, errno.ENOMEM: errno.ENOSPC, EHWPOISON: errno.EIO}


@pytest.mark.parametrize("number", REFUSALS, ids=["EFAULT", "ENOMEM", "EHWPOISON"])
def test_a_page_that_cannot_be_had(host: Path, number: int) -> None:
    """By a worker that was started after one had died of SIGBUS: the request fails, its neighbours do not."""
    path = region_with(host)
    with open_region(str(path)) as region:
        region.careful = True
        fs = open_filesystem(region)
        ino = fs.resolve(b"f")
        at = fs.content.extents(ino)[0].page * PAGE
        region._map = Bad(region._map, number, at + PAGE, at + 2 * PAGE)  # type: ignore[assignment, arg-type]
        for offset, length, bad in ((0, PAGE, False), (PAGE, 5, True), (0, 3 * PAGE, True), (2 * PAGE, PAGE, False)):
            if bad:
                with pytest.raises(FsError) as caught:
                    fs.write(ino, offset, b"x" * length)
                assert caught.value.errno == REFUSALS[number]
            else:
                assert fs.write(ino, offset, b"x" * length) == length
        # Read past the mapping, which this page is fine for: it is the kernel that would say so.
        assert bytes(fs.read(ino, 0, 3 * PAGE)) == b"x" * PAGE + b"f" * PAGE + b"x" * PAGE


def test_what_was_cut_is_an_error(host: Path) -> None:
    """Of every kind of access, and nothing makes the file longer again."""
    path = region_with(host)
    with open_region(str(path)) as region:
        region.whole = False
        os.truncate(path, 10 * MiB)
        calls: list[Callable[[], object]] = [
            lambda: region.store(12 * MiB, b"x"),
            lambda: region.store_word(12 * MiB, 1),
            lambda: region.read(12 * MiB, 10),
            lambda: region.word(12 * MiB),
            lambda: region.present(12 * MiB, MiB),
            lambda: region.reserve(12 * MiB, BLOCK),
            lambda: region.secure(12 * MiB, BLOCK),
            lambda: region.zero(12 * MiB, BLOCK),
        ]
        for call in calls:
            with pytest.raises(FsError) as caught:
                call()
            assert caught.value.errno == errno.EIO
        assert path.stat().st_size == 10 * MiB


@pytest.mark.parametrize("most", [0, MiB * 1024])
def test_where_much_is_missing_pages_get_memory_one_by_one(
    host: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Opening takes no longer for a guest that has given its memory back."""
    path = region_with(host)
    with open_region(str(path)) as region:
        at = open_filesystem(region).content.extents(open_filesystem(region).resolve(b"f"))[0].page * PAGE
        region.discard(at, 4 * MiB)
    before = path.stat().st_blocks * 512
    monkeypatch.setattr(memory_module, "MOST", most)
    with open_region(str(path)) as region:
        fs = open_filesystem(region)
        assert region.whole == bool(most)
        assert path.stat().st_blocks * 512 - before == (4 * MiB if most else 0)
        fs.write(fs.resolve(b"f"), MiB, b"x")
        assert path.stat().st_blocks * 512 - before >= PAGE


def test_holes_on_a_full_host(host: Path) -> None:
    """Reading one takes no memory, storing into one is ENOSPC."""
    path = host / "region"
    path.touch()
    os.truncate(path, 20 * MiB)
    with open_region(str(path)) as region, open_region(str(path), readonly=True, locked=False) as reader:
        assert isinstance(region, FileRegion)
        fill(host)
        before = path.stat().st_blocks
        for one in (region, reader):
            assert one.read(0, 10) == bytes(10)
            assert one.word(4 * MiB) == 0
            assert bytes(one.present(8 * MiB, MiB)) == bytes(MiB)
        calls: list[Callable[[], object]] = [
            lambda: region.store(0, b"x"),
            lambda: region.store_word(4 * MiB, 1),
            lambda: region.zero(0, PAGE),
            lambda: region.reserve(0, BLOCK),
            lambda: region.secure(0, BLOCK),
        ]
        for call in calls:
            with pytest.raises(FsError) as caught:
                call()
            assert caught.value.errno == errno.ENOSPC
        assert path.stat().st_blocks == before


def test_the_limits_of_cgroups(tmp_path: Path) -> None:
    """Of each around the process, with what it could give up; a word instead of a number is no limit."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:name=systemd:/other\n0::/outer/inner\n")
    for folder, limit, used, stat in (
        (inner, "max", 5, ""),
        (inner.parent, "1000", 900, "anon 700\ninactive_file 30\nactive_file 20\nodd\n"),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)
    assert list(host_module._cgroups(str(tmp_path / "cgroup"), str(tmp_path))) == [150]
    assert list(host_module._cgroups(str(tmp_path / "missing"), str(tmp_path))) == []
