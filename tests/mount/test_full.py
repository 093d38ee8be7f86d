"""Full regions through system calls: ENOSPC and no change, or it works; deleting always works, and df is true."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import open_region
from tests.core.support import full
from tests.core.tight import STATES
from tests.mount.site import MiB, Site, below, errno_of, small_host

PAGE = 4096
EXCHANGE = 2


def write(path: Path, at: int, data: bytes) -> None:
    """pwrite(2) of all of it."""
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, at) == len(data)
    finally:
        os.close(fd)


def exchange(one: Path, two: Path) -> None:
    """renameat2(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(two), EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


LONG = "new" + "n" * 200
SPACE = "pages inodes journal"
INODE = "inodes journal"
Change = Callable[[Path], object]

#: What changes the files of tests.core.tight.cast, and the states in which there is no room for it.
CALLS: dict[str, tuple[Change, str]] = {
    "create": (lambda top: (top / "d" / "new").touch(exist_ok=False), INODE),
    "create-first": (lambda top: (top / "empty" / "new").touch(exist_ok=False), SPACE),
    "create-splitting": (lambda top: (top / "split" / LONG).touch(exist_ok=False), SPACE),
    "mkdir": (lambda top: os.mkdir(top / "d" / "new"), INODE),
    "mknod": (lambda top: os.mkfifo(top / "d" / "new"), INODE),
    "symlink": (lambda top: os.symlink("t", top / "d" / "new"), INODE),
    "symlink-long": (lambda top: os.symlink("t" * 200, top / "d" / "new"), SPACE),
    "link": (lambda top: os.link(top / "d" / "f", top / "d" / "new"), "journal"),
    "link-first": (lambda top: os.link(top / "d" / "f", top / "empty" / "new"), SPACE),
    "rename": (lambda top: os.rename(top / "d" / "f", top / "d" / "new"), "journal"),
    "rename-first": (lambda top: os.rename(top / "d" / "f", top / "empty" / "new"), SPACE),
    "rename-over": (lambda top: os.rename(top / "d" / "f", top / "d" / "large"), "journal"),
    "rename-over-directory": (lambda top: os.rename(top / "empty", top / "d" / "sub2"), "journal"),
    "exchange": (lambda top: exchange(top / "d" / "f", top / "empty"), "journal"),
    "overwrite": (lambda top: write(top / "d" / "f", 1, b"BC"), ""),
    "write-in-the-last-page": (lambda top: write(top / "d" / "f", 1000, b"BC"), ""),
    "write-another-page": (lambda top: write(top / "d" / "f", PAGE, b"BC"), SPACE),
    "write-in-a-hole": (lambda top: write(top / "d" / "five", PAGE, b"BC"), SPACE),
    "grow": (lambda top: os.truncate(top / "d" / "f", PAGE + 1), SPACE),
    "grow-much": (lambda top: os.truncate(top / "d" / "f", 5 * MiB), SPACE),
    "chmod": (lambda top: os.chmod(top / "d" / "f", 0o400), "journal"),
    "utime": (lambda top: os.utime(top / "d" / "f", ns=(7, 7)), "journal"),
    "setxattr": (lambda top: os.setxattr(top / "d" / "attrs", "user.new", b"v"), "journal"),
    "setxattr-first": (lambda top: os.setxattr(top / "d" / "f", "user.new", b"v"), SPACE),
    "setxattr-large": (lambda top: os.setxattr(top / "d" / "attrs", "user.new", b"v" * 9000), SPACE),
    "setxattr-replacing": (lambda top: os.setxattr(top / "d" / "attrs", "user.large", b"v" * 9000), SPACE),
    "removexattr": (lambda top: os.removexattr(top / "d" / "attrs", "user.other"), "journal"),
    "cut-to-nothing": (lambda top: os.truncate(top / "d" / "g", 0), "journal"),
    "cut-in-a-block": (lambda top: os.truncate(top / "d" / "large", 2 * MiB + 5), "journal"),
    "cut-sparse": (lambda top: os.truncate(top / "d" / "sparse", 81 * PAGE + 1), "journal"),
    "unlink": (lambda top: os.unlink(top / "d" / "many-attrs"), "journal"),
    "unlink-one-of-two": (lambda top: os.unlink(top / "d" / "hard"), "journal"),
    "rmdir": (lambda top: os.rmdir(top / "d" / "sub"), "journal"),
}


def seen(top: Path) -> object:
    """All that must not change."""
    figures = os.statvfs(top)
    rows = []
    for path in below(top):
        found = os.lstat(path)
        xattrs = [] if path.is_symlink() else [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
        fields = found.st_mode, found.st_nlink, found.st_size, found.st_blocks, found.st_mtime_ns, found.st_ctime_ns
        rows.append((path, fields, xattrs))
    return figures.f_bfree, figures.f_ffree, rows


@pytest.mark.parametrize("state", ["pages", "inodes", "journal"])
def test_no_room(unmounted: Site, state: str) -> None:
    site, top = unmounted, unmounted.mnt
    site.region.unlink()
    site.make("20M")
    with open_region(str(site.region)) as region:
        fs = open_filesystem(region)
        empty = fs.statfs()
        STATES[state](fs)
    site.mount_faulty("short-journal") if state == "journal" else site.mount()
    before = seen(top)
    for name, (call, states) in CALLS.items():
        if state in states.split():
            assert errno_of(call, top) == errno.ENOSPC, name
            assert seen(top) == before, name
    site.verify()
    if state == "journal":
        site.umount()
        site.mount()
    for name, (call, states) in CALLS.items():
        if state not in states.split() and not name.startswith(("rename", "exchange")):
            assert errno_of(call, top) == 0, name
            new = top / "d" / "new"
            if os.path.lexists(new):
                new.rmdir() if new.is_dir() else new.unlink()
    for name in ("exchange", "exchange", "rename-over-directory", "rename-over"):
        assert errno_of(CALLS[name][0], top) == 0, name
    site.verify()
    empty_again(site, empty.free)


def empty_again(site: Site, free: int) -> None:
    """Remove everything; then as many pages can be written as were free in the beginning."""
    for name in set(os.listdir(site.mnt)) - {"iommu"}:
        path = site.mnt / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    site.wait_for_free(free)
    path = site.mnt / "all"
    path.touch()
    figures = os.statvfs(site.mnt)
    fd = os.open(path, os.O_RDWR)
    try:
        left = figures.f_bavail * PAGE
        while left:
            left -= os.write(fd, b"\x55" * min(MiB, left))
        assert os.statvfs(site.mnt).f_bavail == 0
        assert errno_of(os.write, fd, b"x") == errno.ENOSPC
    finally:
        os.close(fd)


def test_a_write_at_the_limit_is_short(unmounted: Site) -> None:
    """It stores what fits and says how much; the next one fails."""
    site = unmounted
    with open_region(str(site.region)) as region:
        full(open_filesystem(region), leave=5)
    site.mount()
    path = site.mnt / "fill-small5"
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        left = 64 * PAGE
        while not (found := errno_of(os.write, fd, b"\x55" * left)):
            left = 65 * PAGE - os.fstat(fd).st_size
        assert (found, left) == (errno.ENOSPC, (64 - 5) * PAGE)
    finally:
        os.close(fd)
    assert path.read_bytes() == b"\xaa" * PAGE + b"\x55" * (5 * PAGE)
    assert site.free() == 0


def test_a_host_without_memory(unmounted: Site) -> None:
    """A region on a tmpfs that is smaller: what needs memory is ENOSPC, what frees works, and nobody gets SIGBUS."""
    site = unmounted
    with small_host(site, "16M"):
        site.mount()
        empty = site.free()
        (site.mnt / "large").write_bytes(b"x" * (3 * MiB))
        # Whatever else is on the host: its memory is gone.
        assert errno_of((site.tmp / "host/other").write_bytes, bytes(16 * MiB)) == errno.ENOSPC
        names = 0
        while not (found := errno_of((site.mnt / f"small{names}").write_bytes, b"y" * 5000)):
            names += 1
        assert found == errno.ENOSPC
        large = site.mnt / "large"
        for call in (lambda: os.truncate(large, 9 * MiB), lambda: write(large, 8 * MiB, b"z" * MiB)):
            before = seen(site.mnt)
            assert errno_of(call) == errno.ENOSPC
            assert seen(site.mnt) == before
        assert large.read_bytes() == b"x" * (3 * MiB)
        os.truncate(large, 2 * MiB + 1)
        for path in site.mnt.glob("small*"):
            path.unlink()
        large.unlink()
        site.wait_for_free(empty)
        site.verify()
        site.crash()
        site.mount()
        site.umount()
        site.verify()
