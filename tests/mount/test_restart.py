"""What is there after the server's end: orderly, killed at rest, killed under load; and read-only mounts."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.mount.load import Load
from tests.mount.site import DEAD, MiB, Site, below, errno_of


def populate(top: Path) -> None:
    """One of everything that must survive."""
    top.mkdir()
    (top / "file").write_bytes(os.urandom(100_000))
    (top / "empty").touch()
    with (top / "sparse").open("wb") as file:
        file.seek(3 * MiB)
        file.write(b"end")
    (top / "grown").touch()
    os.truncate(top / "grown", 5 * MiB)
    os.link(top / "file", top / "second-name")
    os.symlink("target" * 100, top / "long-link")
    os.symlink("file", top / "link")
    os.mkfifo(top / "fifo", 0o600)
    os.mknod(top / "device", stat.S_IFCHR | 0o640, os.makedev(10, 229))
    (top / "d" / "e").mkdir(parents=True)
    (top / "d" / "e" / "deep").write_bytes(b"deep")
    os.chown(top / "file", 1000, 1002)
    os.chmod(top / "file", 0o4750)
    os.chmod(top / "d", 0o3775)
    for name, value in (("user.a", b"1"), ("user.large", os.urandom(30_000)), ("trusted.t", b""), ("security.s", b"x")):
        os.setxattr(top / "file", name, value)
    os.setxattr(top / "d", "user.dir", b"on a directory")
    os.utime(top / "file", ns=(123456789_123456789, -987654321_123456789))
    os.utime(top / "link", ns=(1, 2), follow_symlinks=False)
    os.utime(top / "d", ns=(5, 1))
    os.utime(top / "empty", ns=(5, 7258118400_000000001))


def snapshot(top: Path) -> dict[str, Any]:
    """All that can be known of everything below a directory."""
    rows = {}
    for path in [top, *below(top)]:
        found = os.lstat(path)
        row: dict[str, Any] = {
            name: getattr(found, name)
            for name in (
                *("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_rdev", "st_blocks", "st_ino"),
                *("st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
            )
        }
        if stat.S_ISLNK(found.st_mode):
            row["target"] = os.readlink(path)
        else:
            row["xattrs"] = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        if stat.S_ISREG(found.st_mode):
            fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
            row["content"] = hash(os.read(fd, found.st_size))
            os.close(fd)
        rows[str(path.relative_to(top))] = row
    return rows


@pytest.mark.parametrize("how", ["umount", "kill", "kill-and-replay"])
def test_everything_survives(site: Site, how: str) -> None:
    top = site.mnt / "top"
    populate(top)
    snapshot(top)  # reading directories and links sets their access times
    before = snapshot(top)
    if how == "umount":
        site.umount()
    else:
        site.crash()
    if how == "kill-and-replay":
        site.commit_again()
    site.mount()
    assert ("replayed the journal" in site.said) == (how == "kill-and-replay")
    assert snapshot(top) == before
    figures = os.statvfs(site.mnt)
    site.umount()
    site.mount()
    assert os.statvfs(site.mnt) == figures


@pytest.mark.parametrize("cached", [False, True], ids=["root-not-cached", "root-cached"])
def test_plain_mount_on_a_dead_mountpoint(site: Site, cached: bool) -> None:
    (site.mnt / "f").write_bytes(b"content")
    for _ in range(3):
        if cached:
            os.stat(site.mnt)
        site.crash()
        assert errno_of(os.listdir, site.mnt) in DEAD
        site.mount()
        assert "taking that mount away" in site.said
        assert (site.mnt / "f").read_bytes() == b"content"


def test_dead_mountpoint_with_files_still_open(site: Site) -> None:
    """Descriptors, a mapping and a working directory from before the crash do not hinder the next mount."""
    path = site.mnt / "f"
    path.write_bytes(b"old" * 10_000)
    fd = os.open(path, os.O_RDWR)
    here = os.open(".", os.O_RDONLY)
    os.chdir(site.mnt)
    try:
        site.restart()
        assert errno_of(os.fsync, fd) in DEAD
        assert path.read_bytes() == b"old" * 10_000
        path.write_bytes(b"new")
    finally:
        os.chdir(here)
        os.close(here)
        assert errno_of(os.close, fd) in (0, *DEAD)  # what the flush at the end met


def test_orphans_are_freed_at_the_next_mount(site: Site) -> None:
    before = os.statvfs(site.mnt)
    fds = []
    for index in range(40):
        path = site.mnt / f"f{index}"
        path.write_bytes(b"x" * (index * 20_000))
        os.setxattr(path, "user.big", bytes(10_000))
        fds.append(os.open(path, os.O_RDWR))
        path.unlink()
    folder = site.mnt / "d"
    folder.mkdir()
    fds.append(os.open(folder, os.O_RDONLY))
    folder.rmdir()
    assert before.f_bfree - site.free() > 40
    site.crash()
    for fd in fds:
        assert errno_of(os.close, fd) in (0, *DEAD)
    site.mount()
    after = os.statvfs(site.mnt)
    assert (after.f_bfree, after.f_ffree) == (before.f_bfree, before.f_ffree)


def test_killed_while_many_files_are_made(site: Site) -> None:
    """A process makes files and directories, the server is killed, and all that were made are there."""
    made: list[str] = []
    with Load(site.mnt / "load", 7, site.tmp / "journals", workers=1) as load:
        folder = site.mnt / "many"
        folder.mkdir()
        while len(made) < 700:
            path = folder / f"name-{len(made)}"
            os.mknod(path) if len(made) % 3 else os.mkdir(path)
            made.append(path.name)
        site.crash()
        load.end()
    site.mount()
    assert sorted(os.listdir(site.mnt / "many")) == sorted(made)


# -- read-only mounts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["umount", "kill-under-load", "kill-and-replay", "kill-with-orphans"])
def test_read_only_mount_changes_no_byte(site: Site, how: str) -> None:
    populate(site.mnt / "top")
    if how == "kill-under-load":
        with Load(site.mnt / "top" / "load", 11, site.tmp / "journals") as load:
            load.wait_for(100)
            site.crash()
            load.end()
    else:
        fd = os.open(site.mnt / "top" / "empty", os.O_RDWR)
        if how == "kill-with-orphans":
            os.write(fd, bytes(MiB))
            os.unlink(site.mnt / "top" / "empty")
        else:
            os.mkdir(site.mnt / "top" / "last")
        if how == "umount":
            os.close(fd)
            site.umount()
        else:
            site.crash()
            assert errno_of(os.close, fd) in (0, *DEAD)
    if how == "kill-and-replay":
        site.commit_again()
    digest, times = site.digest(), site.region.stat()
    site.mount("ro")
    names = snapshot(site.mnt / "top")
    assert names == snapshot(site.mnt / "top")
    assert ("last" in names) == (how in ("umount", "kill-and-replay"))
    for call in (
        (site.mnt / "new").touch,
        lambda: os.unlink(site.mnt / "top" / "file"),
        lambda: os.truncate(site.mnt / "top" / "file", 0),
        lambda: os.chmod(site.mnt / "top", 0o700),
        lambda: os.utime(site.mnt / "top"),
        lambda: os.rename(site.mnt / "top", site.mnt / "pot"),
        lambda: os.setxattr(site.mnt / "top", "user.x", b""),
        lambda: os.open(site.mnt / "top" / "file", os.O_WRONLY),
    ):
        assert errno_of(call) == errno.EROFS
    assert (site.mnt / "top" / "file").read_bytes()
    site.run_ok("pkernfs", "info", site.mnt)
    site.run_ok("pkernfs", "info", site.mnt / "top" / "file")
    site.umount()
    assert site.digest() == digest
    assert site.region.stat().st_mtime_ns == times.st_mtime_ns
    assert site.region.stat().st_blocks == times.st_blocks
    site.mount("ro")
    site.crash()
    site.mount()
    (site.mnt / "new").touch()


def test_two_read_only_mounts_at_once(site: Site) -> None:
    (site.mnt / "f").write_bytes(b"content")
    site.umount()
    site.mount("ro")
    second = site.tmp / "second"
    second.mkdir()
    site.run_ok("mount.pkernfs", "-o", f"ro,log={site.server_log}", site.region, second)
    try:
        assert (second / "f").read_bytes() == (site.mnt / "f").read_bytes() == b"content"
        assert len(site.servers()) == 2, "one keeper and its worker serve both"
    finally:
        site.run_ok("umount", second)
    assert (site.mnt / "f").read_bytes() == b"content"
