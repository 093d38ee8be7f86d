"""Names: creating, linking, removing and renaming files of every type, compared with tmpfs."""

from __future__ import annotations

import os
import stat
from itertools import product

import pytest

from tests.mount.agent import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.mount.twin import Twin

CREATE = os.O_CREAT | os.O_WRONLY
EXCLUSIVE = CREATE | os.O_EXCL


def test_create_exclusive(twin: Twin) -> None:
    fd = twin.open("f", EXCLUSIVE, 0o640)
    twin.write(fd, b"abc")
    twin.stat("f")
    twin.fails("EEXIST", "open", "f", EXCLUSIVE, 0o640)
    twin.symlink(b"f", "link")
    twin.fails("EEXIST", "open", "link", EXCLUSIVE, 0o640)
    twin.symlink(b"nowhere", "dangling")
    twin.fails("EEXIST", "open", "dangling", EXCLUSIVE, 0o640)
    twin.mkdir("d")
    twin.fails("EEXIST", "open", "d", EXCLUSIVE, 0o640)
    twin.stat(fd)
    twin.close(fd)
    twin.stat("f")


def test_create_through_a_dangling_link(twin: Twin) -> None:
    twin.symlink(b"target", "link")
    twin.close(twin.open("link", CREATE, 0o600))
    twin.stat("target")


def test_create_changes_the_times_of_the_directory(twin: Twin) -> None:
    twin.mkdir("d", 0o755)
    twin.stat("d")
    twin.close(twin.open("d/f", EXCLUSIVE, 0o644))
    twin.stat("d")
    twin.close(twin.open("d/f", CREATE, 0o644))
    twin.stat("d")
    twin.unlink("d/f")
    twin.stat("d")
    twin.fails("ENOENT", "unlink", "d/f")
    twin.stat("d")


def test_open_truncating(twin: Twin) -> None:
    twin.file("f", b"x" * 10000)
    twin.stat("f")
    twin.close(twin.open("f", os.O_WRONLY | os.O_TRUNC))
    twin.stat("f")
    twin.close(twin.open("f", os.O_WRONLY | os.O_TRUNC))
    twin.stat("f")
    twin.close(twin.open("f", CREATE | os.O_TRUNC, 0o777))
    twin.stat("f")


@pytest.mark.parametrize(
    ("path", "flags", "wanted"),
    [
        pytest.param("d", os.O_WRONLY, "EISDIR", id="directory-for-writing"),
        pytest.param("d", CREATE, "EISDIR", id="directory-with-creat"),
        pytest.param("f", os.O_RDONLY | os.O_DIRECTORY, "ENOTDIR", id="file-as-directory"),
        pytest.param("f/x", os.O_RDONLY, "ENOTDIR", id="below-a-file"),
        pytest.param("f/", os.O_RDONLY, "ENOTDIR", id="file-with-slash"),
        pytest.param("new/", CREATE, "EISDIR", id="new-with-slash"),
        pytest.param("link", os.O_RDONLY | os.O_NOFOLLOW, "ELOOP", id="link-not-followed"),
        pytest.param("loop", os.O_RDONLY, "ELOOP", id="loop"),
        pytest.param("missing", os.O_RDONLY, "ENOENT", id="missing"),
        pytest.param("missing/x", CREATE, "ENOENT", id="in-a-missing-directory"),
        pytest.param("socket", os.O_RDONLY, "ENXIO", id="socket"),
        pytest.param("fifo", os.O_WRONLY | os.O_NONBLOCK, "ENXIO", id="fifo-without-reader"),
        pytest.param("n" * 256, CREATE, "ENAMETOOLONG", id="name-of-256"),
        pytest.param("/".join(["n" * 255] * 17), os.O_RDONLY, "ENAMETOOLONG", id="path-of-4351"),
    ],
)
def test_open_fails(twin: Twin, path: str, flags: int, wanted: str) -> None:
    twin.mkdir("d")
    twin.file("f")
    twin.symlink(b"f", "link")
    twin.symlink(b"loop", "loop")
    twin.mknod("socket", stat.S_IFSOCK | 0o600)
    twin.mkfifo("fifo", 0o600)
    twin.fails(wanted, "open", path, flags, 0o644)


@pytest.mark.parametrize("mode", [0o000, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777], ids=oct)
def test_modes_of_new_files(twin: Twin, mode: int) -> None:
    twin.umask(0)
    user = twin.by(1000)
    user.umask(0)
    for who, name in ((twin, "root"), (user, "user")):
        who.close(who.open(f"{name}.f", EXCLUSIVE, mode))
        who.mkdir(f"{name}.d", mode)
        who.mkfifo(f"{name}.p", mode)
        who.mknod(f"{name}.s", stat.S_IFSOCK | mode)
        for suffix in "fdps":
            twin.stat(f"{name}.{suffix}")
            who.chmod(f"{name}.{suffix}", mode)
            twin.stat(f"{name}.{suffix}")


def test_umask(twin: Twin) -> None:
    user = twin.by(1000)
    for mask in (0, 0o022, 0o077, 0o777):
        user.umask(mask)
        user.close(user.open(f"f{mask:o}", EXCLUSIVE, 0o666))
        user.mkdir(f"d{mask:o}", 0o777)
        twin.stat(f"f{mask:o}")
        twin.stat(f"d{mask:o}")


@pytest.mark.parametrize(
    ("kind", "device"),
    [
        pytest.param(stat.S_IFIFO, 0, id="fifo"),
        pytest.param(stat.S_IFSOCK, 0, id="socket"),
        pytest.param(stat.S_IFREG, 0, id="regular"),
        pytest.param(stat.S_IFCHR, os.makedev(1, 3), id="character-device"),
        pytest.param(stat.S_IFBLK, os.makedev(7, 200), id="block-device"),
        pytest.param(stat.S_IFCHR, os.makedev(4095, 1048575), id="largest-device-number"),
    ],
)
def test_mknod(twin: Twin, kind: int, device: int) -> None:
    twin.mknod("n", kind | 0o640, device)
    twin.stat("n")
    twin.fails("EEXIST", "mknod", "n", kind | 0o640, device)
    twin.by(1000).mknod("u", kind | 0o600, device)
    twin.stat("u")
    twin.unlink("n")
    twin.stat("n")


def test_device_nodes_work(twin: Twin) -> None:
    twin.mknod("zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    fd = twin.open("zero", os.O_RDONLY)
    assert twin.read(fd, 8) == bytes(8)
    twin.close(fd)


def test_fifo_carries_data(twin: Twin) -> None:
    twin.mkfifo("p")
    twin.chmod("p", 0o666)
    reader = twin.open("p", os.O_RDONLY | os.O_NONBLOCK)
    user = twin.by(1000)
    writer = user.open("p", os.O_WRONLY)
    user.write(writer, b"through the fifo")
    assert twin.read(reader, 100) == b"through the fifo"
    user.close(writer)
    assert twin.read(reader, 100) == b""
    twin.close(reader)


def test_socket_accepts(twin: Twin) -> None:
    listener = twin.bind_socket("s")
    twin.stat("s")
    user = twin.by(1000)
    user.fails("EACCES", "connect_socket", "s")
    twin.chmod("s", 0o777)
    assert user.connect_socket("s")
    twin.fails("EADDRINUSE", "bind_socket", "s")
    del listener


# -- directories ----------------------------------------------------------------------------------------------------


def test_mkdir_and_rmdir(twin: Twin) -> None:
    twin.stat("")
    twin.mkdir("d", 0o750)
    twin.stat("d")
    twin.stat("")
    twin.mkdir("d/e", 0o750)
    twin.stat("d")
    twin.fails("EEXIST", "mkdir", "d")
    twin.fails("ENOTEMPTY", "rmdir", "d")
    twin.fails("EINVAL", "rmdir", "d/.")
    twin.fails("ENOTEMPTY", "rmdir", "d/e/..")
    twin.fails("EISDIR", "unlink", "d")
    twin.file("f")
    twin.fails("ENOTDIR", "rmdir", "f")
    twin.fails("EEXIST", "mkdir", "f")
    twin.fails("ENOTDIR", "mkdir", "f/d")
    twin.fails("ENOENT", "mkdir", "missing/d")
    twin.rmdir("d/e")
    twin.stat("d")
    twin.rmdir("d/")
    twin.stat("d")
    twin.stat("")
    twin.fails("ENOENT", "rmdir", "d")


def test_removed_directory_that_is_open(twin: Twin) -> None:
    twin.mkdir("d")
    fd = twin.open("d", os.O_RDONLY | os.O_DIRECTORY)
    twin.rmdir("d")
    twin.stat(fd)
    for name in ("f", "."):
        errors, _ = twin.both("open", name.encode(), CREATE, 0o644, dir_fd=fd)
        assert errors.ours == errors.theirs, name
    errors, _ = twin.both("mkdir", b"x", dir_fd=fd)
    assert errors.ours == errors.theirs == "ENOENT"
    assert twin.call("listdir", fd) == []
    twin.close(fd)


def test_working_directory_below_a_removed_one(twin: Twin) -> None:
    twin.makedirs("a/b")
    twin.fchdir(twin.open("a/b", os.O_RDONLY))
    twin.rmdir("a/b")
    errors, _ = twin.both("stat", b"..")
    assert errors.ours == errors.theirs
    twin.chdir(b"/")


def test_dot_and_dot_dot(twin: Twin) -> None:
    twin.makedirs("a/b/c")
    for path in ("a/b/.", "a/b/..", "a/b/c/../..", "a/./b/./c"):
        twin.stat(path)
    _, values = twin.both("stat", "a/b/..")
    assert values.ours.st_ino == os.stat(f"{twin.roots.ours}/a").st_ino
    twin.rename("a/b/c", "c")
    assert os.stat(f"{twin.roots.ours}/c/..").st_ino == os.stat(twin.roots.ours).st_ino


# -- names and links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(b"n" * 255, id="255-bytes"),
        pytest.param(b"\xff\xfe\x80", id="not-utf-8"),
        pytest.param("é€🙂".encode(), id="utf-8"),
        pytest.param(b" leading and trailing ", id="spaces"),
        pytest.param(b"new\nline\ttab\x01", id="control-characters"),
        pytest.param(b"...", id="three-dots"),
        pytest.param(b"-rf", id="dash"),
        pytest.param(b"a\\b'c\"d$e`f", id="shell-characters"),
    ],
)
def test_unusual_names(twin: Twin, name: bytes) -> None:
    path = os.fsdecode(name)
    twin.file(path, name)
    twin.mkdir("d")
    twin.link(path, f"d/{path}")
    twin.symlink(name, "link")
    assert twin.readlink("link") == path or twin.readlink("link") == name
    twin.stat(path)
    assert twin.listdir("d") == [path]
    twin.rename(path, f"d/{path[:-1]}x")
    twin.tree()


def test_names_too_long(twin: Twin) -> None:
    long = "n" * 256
    twin.file("f")
    twin.mkdir("d")
    for call in (
        ("mkdir", long),
        ("symlink", b"x", long),
        ("link", "f", long),
        ("mknod", long),
        ("rename", "f", long),
        ("rename", long, "g"),
        ("unlink", long),
        ("rmdir", long),
        ("lstat", long),
        ("renameat2", "f", long, RENAME_NOREPLACE),
    ):
        twin.fails("ENAMETOOLONG", *call)


def test_hard_links(twin: Twin) -> None:
    twin.file("a", b"content")
    twin.stat("a")
    twin.link("a", "b")
    twin.stat("a")
    twin.fails("EEXIST", "link", "a", "b")
    twin.mkdir("d")
    twin.fails("EPERM", "link", "d", "e")
    twin.fails("ENOENT", "link", "missing", "e")
    twin.fails("ENOTDIR", "link", "a", "b/e")
    twin.fails("EEXIST", "link", "a", "d")
    twin.link("a", "d/c")
    twin.unlink("a")
    twin.stat("b")
    assert twin.read_file("d/c") == b"content"
    twin.unlink("b")
    twin.stat("d/c")
    for kind in (stat.S_IFIFO, stat.S_IFSOCK):
        twin.mknod(f"k{kind}", kind | 0o600)
        twin.link(f"k{kind}", f"l{kind}")
        twin.stat(f"l{kind}")
    twin.symlink(b"nowhere", "s")
    twin.link("s", "t", follow_symlinks=False)
    twin.stat("t")


def test_links_of_a_removed_file(twin: Twin) -> None:
    twin.file("f")
    fd = twin.open("f", os.O_RDWR)
    twin.unlink("f")
    twin.stat(fd)
    twin.fails("ENOENT", "link_open_file", fd, "g")
    twin.close(fd)


@pytest.mark.parametrize("length", [1, 120, 121, 4095])
def test_symbolic_links(twin: Twin, length: int) -> None:
    target = (b"x" * 99 + b"/") * (length // 100) + b"y" * (length % 100)
    twin.symlink(target, "s")
    twin.stat("s")
    assert os.fsencode(twin.readlink("s")) == target
    twin.fails("EEXIST", "symlink", target, "s")
    twin.unlink("s")
    twin.stat("s")


def test_symbolic_link_errors(twin: Twin) -> None:
    twin.fails("ENAMETOOLONG", "symlink", b"x" * 4096, "s")
    twin.fails("ENOENT", "symlink", b"", "s")
    twin.file("f")
    twin.fails("EINVAL", "readlink", "f")
    twin.symlink(b"f", "s")
    twin.fails("ENOTDIR", "open", "s/x", os.O_RDONLY)
    twin.lchown("s", 1000, 1000)
    twin.stat("s")
    twin.stat("f")


# -- renaming -------------------------------------------------------------------------------------------------------

KINDS = ("missing", "file", "empty", "full", "link", "fifo")
FLAGS = (0, RENAME_NOREPLACE, RENAME_EXCHANGE)


def make(twin: Twin, kind: str, path: str) -> None:
    """Something of this kind."""
    if kind == "file":
        twin.write_file(path, path.encode())
    elif kind == "link":
        twin.symlink(path.encode(), path)
    elif kind == "fifo":
        twin.mkfifo(path, 0o600)
    elif kind in ("empty", "full"):
        twin.mkdir(path)
        if kind == "full":
            twin.mkdir(f"{path}/below")
            twin.write_file(f"{path}/file", b"inside")


@pytest.mark.parametrize("flags", FLAGS, ids=["plain", "noreplace", "exchange"])
@pytest.mark.parametrize("kind", KINDS)
def test_rename(twin: Twin, kind: str, flags: int) -> None:
    """Every type onto every type, within one directory and into another."""
    for other, apart in product(KINDS, (False, True)):
        case = f"{other}-{apart:d}"
        twin.mkdir(case)
        twin.mkdir(f"{case}/to")
        target = f"{case}/to/b" if apart else f"{case}/b"
        make(twin, kind, f"{case}/a")
        make(twin, other, target)
        for path in (case, f"{case}/to", f"{case}/a", target):
            twin.stat(path)
        twin.renameat2(f"{case}/a", target, flags)
        for path in (case, f"{case}/to", f"{case}/a", target):
            twin.stat(path)
    twin.tree()


def test_rename_corner_cases(twin: Twin) -> None:
    twin.makedirs("a/b/c")
    twin.makedirs("x")
    twin.fails("EINVAL", "rename", "a", "a/b/d")
    twin.fails("EINVAL", "rename", "a", "a/b")
    twin.fails("ENOTEMPTY", "rename", "a/b/c", "a")
    twin.fails("EINVAL", "renameat2", "a", "a/b/c", RENAME_EXCHANGE)
    twin.fails("EINVAL", "renameat2", "a/b/c", "a", RENAME_EXCHANGE)
    twin.fails("EINVAL", "renameat2", "a", "x", RENAME_EXCHANGE | RENAME_NOREPLACE)
    twin.fails("EINVAL", "renameat2", "a", "x", 1 << 20)
    twin.fails("EBUSY", "rename", "a/.", "y")
    twin.fails("EBUSY", "rename", "a/b/..", "y")
    twin.file("f", b"f")
    twin.link("f", "g")
    twin.stat("f")
    twin.rename("f", "g")  # two names of one file: nothing happens
    twin.stat("f")
    twin.stat("g")
    twin.rename("f", "f")
    twin.renameat2("f", "g", RENAME_EXCHANGE)
    twin.fails("ENOTDIR", "rename", "f/", "h")
    twin.fails("ENOTDIR", "rename", "f", "h/")
    twin.rename("a/b", "x/b")
    twin.stat("a")
    twin.stat("x")
    assert os.stat(f"{twin.roots.ours}/x/b/..").st_ino == os.stat(f"{twin.roots.ours}/x").st_ino
    twin.tree()


def test_rename_over_an_open_file(twin: Twin) -> None:
    twin.file("old", b"old")
    twin.file("new", b"new")
    fd = twin.open("old", os.O_RDWR)
    twin.rename("new", "old")
    assert twin.pread(fd, 10, 0) == b"old"
    twin.pwrite(fd, b"still", 0)
    twin.stat(fd)
    assert twin.read_file("old") == b"new"
    twin.close(fd)


def test_exchange_of_directories_keeps_what_is_in_them(twin: Twin) -> None:
    twin.makedirs("a/one/deep")
    twin.makedirs("b/two")
    twin.file("b/two/f", b"f")
    twin.renameat2("a/one", "b/two", RENAME_EXCHANGE)
    for path in ("a", "b", "a/one", "b/two"):
        twin.stat(path)
    assert twin.listdir("b/two") == ["deep"]
    assert os.stat(f"{twin.roots.ours}/a/one/..").st_ino == os.stat(f"{twin.roots.ours}/a").st_ino


# -- sticky and setgid directories ----------------------------------------------------------------------------------


def test_sticky_directory(twin: Twin) -> None:
    twin.mkdir("s")
    twin.chmod("s", 0o1777)
    mine, other = twin.by(1000), twin.by(1001)
    for name in "abcde":
        mine.file(f"s/{name}", b"mine")
        mine.mkdir(f"s/d{name}")
    other.file("s/other")
    other.fails("EPERM", "unlink", "s/a")
    other.fails("EPERM", "rmdir", "s/da")
    other.fails("EPERM", "rename", "s/a", "s/z")
    other.fails("EPERM", "rename", "s/other", "s/a")
    other.fails("EPERM", "renameat2", "s/other", "s/a", RENAME_EXCHANGE)
    mine.rename("s/a", "s/z")
    mine.unlink("s/b")
    mine.rmdir("s/db")
    twin.unlink("s/c")
    twin.chown("s", 1001, 1001)  # the owner of the directory may
    other.unlink("s/d")
    other.rmdir("s/dd")
    twin.tree()


def test_setgid_directory(twin: Twin) -> None:
    twin.mkdir("g")
    twin.chown("g", 0, 1002)
    twin.chmod("g", 0o2777)
    for uid, groups in ((1000, ()), (1001, (1002,))):
        user = twin.by(uid, groups=groups)
        user.umask(0)
        user.close(user.open(f"g/f{uid}", EXCLUSIVE, 0o2775))
        user.close(user.open(f"g/p{uid}", EXCLUSIVE, 0o664))
        user.mkdir(f"g/d{uid}", 0o775)
        user.mkdir(f"g/d{uid}/deeper", 0o755)
        user.symlink(b"x", f"g/l{uid}")
        user.mkfifo(f"g/q{uid}", 0o2755)
        for name in "fpdlq":
            twin.stat(f"g/{name}{uid}")
        twin.stat(f"g/d{uid}/deeper")


# -- permissions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o040, 0o004, 0o600, 0o060, 0o006, 0o700, 0o070, 0o007, 0o111], ids=oct)
def test_permission_bits(twin: Twin, mode: int) -> None:
    """Owner, group member and others, on a file and on a directory, by open and by access(2)."""
    for kind in "fd":
        twin.mkdir(kind) if kind == "d" else twin.file(kind)
        if kind == "d":
            twin.file("d/inside", b"x", 0o666)
        twin.chown(kind, 1000, 1002)
        twin.chmod(kind, mode)
    for user in (twin.by(1000), twin.by(1001, groups=(1002,)), twin.by(1001), twin):
        for how in (os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK | os.X_OK):
            user.access("f", how)
            user.access("d", how)
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            fd = user.open("f", flags)
            if fd:
                user.close(fd)
        user.listdir("d")
        user.access("d/inside", os.R_OK)
        user.mkdir("d/new")
        user.rmdir("d/new")
        user.link("d/inside", "d/second")
        user.unlink("d/second")
        user.chmod("f", mode)
        user.chown("f", -1, 1002)
    twin.chmod("d", 0o755)


def test_removing_needs_the_directory_only(twin: Twin) -> None:
    twin.mkdir("d")
    twin.chmod("d", 0o777)
    twin.file("d/f", b"x", 0o000)
    other = twin.by(1001)
    other.fails("EACCES", "open", "d/f", os.O_RDONLY)
    other.unlink("d/f")
    twin.chmod("d", 0o755)
    twin.file("d/f", b"x", 0o666)
    other.fails("EACCES", "unlink", "d/f")
    other.fails("EACCES", "rename", "d/f", "d/g")
    other.fails("EACCES", "link", "d/f", "d/g")
