"""Attributes: owners, modes, times, extended attributes; compared with tmpfs, or with what xattr(7) says."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.agent import UTIME_NOW, UTIME_OMIT, Agent
from tests.mount.site import Site, coarse_tick, errno_of
from tests.mount.twin import Twin, Users

SECOND = 10**9
#: Seconds since the epoch.
IN_1960 = -315619200
IN_2200 = 7258118400


# -- set-user-ID and set-group-ID -----------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [0, 1000], ids=["root", "user"])
@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o2745, 0o6777, 0o6644], ids=oct)
@pytest.mark.parametrize(
    "change", ["write", "truncate", "ftruncate", "open", "chown", "chown-nothing", "chmod", "shrink", "setxattr"]
)
def test_set_id_bits_are_cleared(twin: Twin, change: str, mode: int, uid: int) -> None:
    twin.file("f", b"x" * 5000)
    twin.chown("f", uid, uid)
    twin.chmod("f", mode)
    user = twin.by(uid) if uid else twin
    if change == "write":
        fd = user.open("f", os.O_WRONLY)
        user.pwrite(fd, b"y", 10)
    elif change == "truncate":
        user.truncate("f", 9000)
    elif change == "shrink":
        user.truncate("f", 10)
    elif change == "ftruncate":
        fd = user.open("f", os.O_WRONLY)
        user.ftruncate(fd, 5000)
    elif change == "open":
        user.open("f", os.O_WRONLY | os.O_TRUNC)
    elif change == "chown":
        user.chown("f", uid, uid)
    elif change == "chown-nothing":
        user.chown("f", -1, -1)
    elif change == "chmod":
        user.chmod("f", mode)
    else:
        user.setxattr("f", b"user.x", b"1")
    twin.stat("f", times=False)


def test_set_id_bits_and_a_write_by_somebody_else(twin: Twin) -> None:
    twin.file("f", b"x", 0o6777)
    for uid in (1000, 0):
        user = twin.by(uid)
        fd = user.open("f", os.O_WRONLY)
        user.write(fd, b"y")
        twin.stat("f", times=False)


def test_set_id_program_runs_as_its_owner(shared: Site, users: Users) -> None:
    program = shared.mnt / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    os.chown(program, 1001, 1002)
    program.chmod(0o6755)
    assert users.get(1000).output_of(str(program), "-u") == "1001\n"
    assert users.get(1000).output_of(str(program), "-g") == "1002\n"


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_chown(twin: Twin, kind: str) -> None:
    if kind == "file":
        twin.file("f", b"", 0o6755)
    elif kind == "directory":
        twin.mkdir("f")
        twin.chmod("f", 0o6755)
    elif kind == "link":
        twin.symlink(b"x", "f")
    else:
        twin.mkfifo("f")
        twin.chmod("f", 0o6755)
    twin.stat("f")
    twin.lchown("f", 1000, 1002)
    twin.stat("f")
    mine, other = twin.by(1000, groups=(1002, 1003)), twin.by(1001)
    mine.fails("EPERM", "lchown", "f", 1001, -1)
    mine.fails("EPERM", "lchown", "f", -1, 1004)
    other.fails("EPERM", "lchown", "f", 1001, 1001)
    other.fails("EPERM", "lchown", "f", 1000, 1002)
    mine.lchown("f", 1000, 1003)
    twin.stat("f")
    mine.lchown("f", -1, -1)
    twin.stat("f")
    other.lchown("f", -1, -1)
    twin.lchown("f", (1 << 32) - 2, (1 << 32) - 2)
    twin.stat("f")


def test_chmod(twin: Twin) -> None:
    twin.file("f")
    twin.stat("f")
    twin.chown("f", 1000, 1002)
    mine, other = twin.by(1000), twin.by(1001)
    mine.chmod("f", 0o2755)  # not of the file's group: the bit goes
    twin.stat("f")
    twin.by(1000, groups=(1002,)).chmod("f", 0o2755)
    twin.stat("f")
    mine.chmod("f", 0o1644)
    twin.stat("f")
    other.fails("EPERM", "chmod", "f", 0o777)
    twin.chmod("f", 0o7777)
    twin.stat("f")


# -- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("atime", "mtime"),
    [
        pytest.param((IN_1960, 123456789), (IN_1960, 1), id="1960"),
        pytest.param((IN_2200, 999999999), (IN_2200, 0), id="2200"),
        pytest.param((0, 0), (0, 0), id="epoch"),
        pytest.param((-1, 999999999), (-1, 1), id="just-before-the-epoch"),
        pytest.param((1 << 31, 5), ((1 << 32) + 1, 6), id="beyond-32-bits"),
        pytest.param((12, 34), (0, UTIME_OMIT), id="atime-only"),
        pytest.param((0, UTIME_OMIT), (12, 34), id="mtime-only"),
        pytest.param((0, UTIME_OMIT), (0, UTIME_OMIT), id="neither"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_utimensat(twin: Twin, kind: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    makers: dict[str, Callable[[], object]] = {
        "file": lambda: twin.file("f"),
        "directory": lambda: twin.mkdir("f"),
        "link": lambda: twin.symlink(b"x", "f"),
    }
    makers[kind]()
    twin.stat("f")
    twin.utimensat("f", [atime, mtime], follow=False)
    twin.stat("f")
    _, found = twin.both("lstat", "f")
    for name, wanted in (("st_atime_ns", atime), ("st_mtime_ns", mtime)):
        if wanted[1] != UTIME_OMIT:
            ours, theirs = (getattr(one, name) for one in found)
            assert ours == theirs == wanted[0] * SECOND + wanted[1]


def test_utimensat_now(twin: Twin) -> None:
    twin.file("f")
    twin.utimensat("f", [(1, 1), (1, 1)])
    twin.stat("f")
    twin.utimensat("f", [(0, UTIME_NOW), (0, UTIME_OMIT)])
    twin.stat("f")
    twin.utimensat("f", [(0, UTIME_OMIT), (0, UTIME_NOW)])
    twin.stat("f")
    twin.fails("EINVAL", "utimensat", "f", [(0, SECOND), (0, 0)])
    twin.fails("EINVAL", "utimensat", "f", [(0, -1), (0, 0)])


def test_utimensat_permissions(twin: Twin) -> None:
    twin.file("f", b"", 0o666)
    twin.chown("f", 1000, 1000)
    other = twin.by(1001)
    other.fails("EPERM", "utimensat", "f", [(1, 0), (1, 0)])
    other.fails("EPERM", "utimensat", "f", [(0, UTIME_NOW), (0, UTIME_OMIT)])
    other.utimensat("f", [(0, UTIME_NOW), (0, UTIME_NOW)])  # who may write may set it to now
    assert other.error == ""
    twin.chmod("f", 0o644)
    other.fails("EACCES", "utimensat", "f", [(0, UTIME_NOW), (0, UTIME_NOW)])
    twin.by(1000).utimensat("f", [(1, 0), (1, 0)])


def test_times_that_calls_change(twin: Twin) -> None:
    """Each step changes the same ones of atime, mtime and ctime as on tmpfs."""
    twin.file("f", b"x" * 100)
    twin.symlink(b"f", "s")
    twin.mkdir("d")
    paths = ("f", "s", "d", "")
    for path in paths:
        twin.stat(path)
    for step in (
        ("truncate", "f", 100),
        ("truncate", "f", 50),
        ("chmod", "f", 0o600),
        ("chown", "f", 0, 0),
        ("chown", "f", -1, -1),
        ("link", "f", "g"),
        ("unlink", "g"),
        ("rename", "f", "d/f"),
        ("rename", "d/f", "f"),
        ("setxattr", "f", b"trusted.a", b"1"),
        ("removexattr", "f", b"trusted.a"),
        ("readlink", "s"),
        ("listdir", "d"),
        ("mkdir", "d/e"),
        ("listdir", "d"),
        ("rmdir", "d/e"),
        ("access", "f", os.R_OK),
        ("statvfs", b"/"),
        ("lchown", "s", 1, 1),
    ):
        if step[0] != "statvfs":
            twin.call(*step)
        for path in paths:
            twin.stat(path)


def test_times_that_writes_change(twin: Twin) -> None:
    twin.file("f", b"x" * 10000)
    fd = twin.open("f", os.O_RDWR)
    twin.stat("f")
    for step in (
        ("pwrite", fd, b"y", 5),
        ("pwrite", fd, b"y", 20000),
        ("pwrite", fd, b"", 5),
        ("ftruncate", fd, 3),
        ("fsync", fd),
    ):
        twin.call(*step)
        twin.stat("f")
        twin.stat(fd)
    twin.close(fd)
    twin.stat("f")


def test_reading_updates_atime_as_relatime_does(twin: Twin) -> None:
    twin.file("f", b"x" * 10)
    twin.stat("f")
    for _ in range(2):
        fd = twin.open("f", os.O_RDONLY)
        twin.read(fd, 100)
        twin.close(fd)
        twin.stat("f")
    twin.utimensat("f", [(1, 0), (1, 0)])  # long ago: the next read counts
    twin.stat("f")
    twin.read_file("f")
    twin.stat("f")


def test_reading_after_writing_updates_atime(twin: Twin) -> None:
    """Also where the kernel has the page and need not ask the server."""
    twin.file("f", b"x" * 10)
    twin.read_file("f")
    twin.stat("f")
    twin.write_file("f", b"y" * 10)
    twin.stat("f")
    twin.read_file("f")
    twin.stat("f")


def test_reading_with_noatime(twin: Twin) -> None:
    twin.file("f", b"x" * 10)
    twin.stat("f")
    fd = twin.open("f", os.O_RDONLY | os.O_NOATIME)
    twin.read(fd, 10)
    twin.stat("f")
    twin.by(1000).fails("EPERM", "open", "f", os.O_RDONLY | os.O_NOATIME)


def test_store_through_a_mapping_changes_mtime(shared: Site) -> None:
    """As on ext4: mtime and ctime, at the latest with msync."""
    path = shared.mnt / "mapped"
    path.write_bytes(b"x" * 8192)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as area:
        assert area[4096] == ord("x")
        before = path.stat()
        coarse_tick()
        area[4096] = ord("y")
        area.flush()
        after = path.stat()
        assert after.st_mtime_ns > before.st_mtime_ns
        assert after.st_ctime_ns > before.st_ctime_ns
        assert after.st_atime_ns == before.st_atime_ns


def test_new_times_are_the_time_of_the_clock(shared: Site) -> None:
    """Within the clock's own step: a time stamp is never in the future, and not old."""
    before = os.stat(shared.mnt).st_mtime_ns
    coarse_tick()
    (shared.mnt / "clock").touch()
    found = os.stat(shared.mnt / "clock")
    assert before < found.st_mtime_ns <= time.time_ns()
    assert found.st_mtime_ns == found.st_ctime_ns


# -- extended attributes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", [b"trusted", b"security", b"user"])
@pytest.mark.parametrize("size", [0, 1, 512, 513, 4096, 65536])
def test_xattr_values(shared: Site, namespace: bytes, size: int) -> None:
    path = shared.mnt / f"x-{namespace.decode()}-{size}"
    path.write_bytes(b"content")
    name, value = namespace + b".name", os.urandom(size)
    os.setxattr(path, name, value)
    assert os.getxattr(path, name) == value
    assert os.listxattr(path) == [name.decode()]
    os.setxattr(path, name, value[::-1], os.XATTR_REPLACE)
    assert os.getxattr(path, name) == value[::-1]
    os.removexattr(path, name)
    assert os.listxattr(path) == []
    assert path.read_bytes() == b"content"


def fails(wanted: int, function: Callable[..., object], *args: object, **kwargs: object) -> None:
    """The call fails with this errno."""
    found = errno_of(function, *args, **kwargs)
    assert errno.errorcode.get(found, found) == errno.errorcode[wanted]


def test_xattr_errors(shared: Site) -> None:
    """As xattr(7) and setxattr(2) have them."""
    path = shared.mnt / "x-errors"
    path.touch()
    os.setxattr(path, "user.a", b"1234")
    fails(errno.ENODATA, os.getxattr, path, "user.none")
    fails(errno.ENODATA, os.removexattr, path, "user.none")
    fails(errno.EEXIST, os.setxattr, path, "user.a", b"", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, path, "user.none", b"", os.XATTR_REPLACE)
    fails(errno.E2BIG, os.setxattr, path, "user.a", bytes(65537))
    fails(errno.ERANGE, os.setxattr, path, "user." + "n" * 251, b"")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "nonsense.a", b"")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "system.nonsense", b"")
    fails(errno.EINVAL, os.setxattr, path, "user.", b"")
    fails(errno.ENOENT, os.setxattr, shared.mnt / "missing", "user.a", b"")
    os.setxattr(path, "user." + "n" * 250, b"long name")
    assert os.getxattr(path, "user." + "n" * 250) == b"long name"


def test_xattr_size_queries(shared: Site, users: Users) -> None:
    """A size of 0 asks how much there is; too small a buffer is ERANGE."""
    path = str(shared.mnt / "x-sizes")
    agent = users.get()
    agent.write_file(path, b"")
    os.setxattr(path, "user.a", b"1234567890")
    os.setxattr(path, "user.bc", b"")
    assert agent.raw_getxattr(path, b"user.a", 0) == 10
    assert agent.raw_getxattr(path, b"user.a", 10) == 10
    fails(errno.ERANGE, agent.raw_getxattr, path, b"user.a", 9)
    length = len(b"user.a\0user.bc\0")
    assert agent.raw_listxattr(path, 0) == length
    assert agent.raw_listxattr(path, length) == length
    fails(errno.ERANGE, agent.raw_listxattr, path, length - 1)


def test_xattr_by_users(shared: Site, users: Users) -> None:
    path = str(shared.mnt / "x-users")
    user, root = users.get(1000), users.get()
    root.write_file(path, b"")
    os.chmod(path, 0o666)
    os.setxattr(path, "trusted.t", b"secret")
    os.setxattr(path, "security.s", b"label")
    os.setxattr(path, "user.u", b"mine")
    assert sorted(user.listxattr(path)) == ["security.s", "user.u"]
    assert sorted(root.listxattr(path)) == ["security.s", "trusted.t", "user.u"]
    fails(errno.ENODATA, user.getxattr, path, "trusted.t")
    fails(errno.EPERM, user.setxattr, path, "trusted.t", b"")
    fails(errno.EPERM, user.removexattr, path, "trusted.t")
    assert user.getxattr(path, "security.s") == b"label"
    fails(errno.EPERM, user.setxattr, path, "security.s", b"")
    user.setxattr(path, "user.u", b"yours")
    os.chmod(path, 0o644)
    fails(errno.EACCES, user.setxattr, path, "user.u", b"")
    assert user.getxattr(path, "user.u") == b"yours"
    os.chmod(path, 0o600)
    fails(errno.EACCES, user.getxattr, path, "user.u")


def test_xattr_on_other_types(twin: Twin) -> None:
    """user.* is for files and directories only; trusted.* for everything."""
    twin.symlink(b"x", "link")
    twin.mkfifo("fifo")
    twin.mknod("device", stat.S_IFCHR, os.makedev(1, 3))
    twin.mkdir("d")
    for name in ("link", "fifo", "device"):
        twin.fails("EPERM", "setxattr", name, b"user.a", b"", follow_symlinks=False)
        twin.fails("ENODATA", "getxattr", name, b"user.a", follow_symlinks=False)
        twin.setxattr(name, b"trusted.a", b"value", follow_symlinks=False)
        assert twin.getxattr(name, b"trusted.a", follow_symlinks=False) == b"value"
    twin.setxattr("d", b"user.a", b"value")
    twin.mkdir("sticky")
    twin.chmod("sticky", 0o1777)
    twin.by(1000).fails("EPERM", "setxattr", "sticky", b"user.a", b"")


def test_many_xattrs_end_with_an_error_and_stay(shared: Site) -> None:
    """listxattr can tell 64 KiB of names: one more is refused, and those that are there go on working."""
    path = shared.mnt / "x-many"
    path.touch()
    count = 0
    while not (found := errno_of(os.setxattr, path, f"user.{count:03}" + "n" * 240, b"v")):
        count += 1
    assert found in (errno.ENOSPC, errno.E2BIG)
    assert len(os.listxattr(path)) == count
    assert count > 250
    assert os.getxattr(path, f"user.{count - 1:03}" + "n" * 240) == b"v"
    path.unlink()


def test_capabilities_are_kept_and_cleared_by_a_write(shared: Site, users: Users) -> None:
    """security.capability goes when somebody without privilege writes, as on every filesystem."""
    path = shared.mnt / "x-capability"
    path.write_bytes(b"program")
    path.chmod(0o777)
    value = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(path, "security.capability", value)
    assert os.getxattr(path, "security.capability") == value
    user: Agent = users.get(1000)
    fd = user.open(str(path), os.O_WRONLY)
    user.write(fd, b"changed")
    user.close_fd(fd)
    fails(errno.ENODATA, os.getxattr, path, "security.capability")
