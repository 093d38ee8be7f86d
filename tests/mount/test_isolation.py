"""Who may see what: memory that was another file's, the region's file, a mount of one user."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.site import PYTHON_FOR_ALL, MiB, Site, below, errno_of, run
from tests.mount.twin import Users

PAGE = 4096
PATTERN = b"a tenant's own: "
ROOT = Path(__file__).parents[2]

# -- memory -----------------------------------------------------------------------------------------------------------


def secret(size: int) -> bytes:
    """The pattern, so that any piece of it that is aligned to 16 bytes is found."""
    return PATTERN * (size // len(PATTERN))


def populate(top: Path) -> None:
    """Files of every kind, full of the pattern."""
    top.mkdir()
    for name, size in {"page": PAGE, "pages": 60 * PAGE, "grows": 200 * PAGE, "block": 2 * MiB, "cut": 5 * MiB}.items():
        (top / name).write_bytes(secret(size))
    with (top / "sparse").open("wb") as file:
        for n in range(60):
            file.seek(n * 3 * PAGE)
            file.write(secret(PAGE))
    for name in ("attributes", "replaced", "removed"):
        (top / name).touch()
        for n in range(4):
            os.setxattr(top / name, f"user.{n}", secret(500 if n == 3 else 60_000))
    (top / "victim").write_bytes(secret(3 * MiB))
    (top / "over").touch()
    (top / "short-link").symlink_to(secret(112))
    (top / "long-link").symlink_to(secret(4000))
    for n in range(200):
        (top / f"{secret(128).decode().strip()}{n}").touch()
    (top / "open").write_bytes(secret(100 * PAGE))


def free_all(top: Path) -> None:
    """Give the memory of all of it back, in every way."""
    os.truncate(top / "cut", 100 * PAGE)  # blocks become pages
    with (top / "grows").open("ab") as file:
        file.write(secret(300 * PAGE))  # pages become a block
    os.truncate(top / "block", 0)
    os.truncate(top / "pages", 1)
    os.rename(top / "over", top / "victim")
    for n in range(4):
        os.setxattr(top / "replaced", f"user.{n}", b"")
        os.removexattr(top / "removed", f"user.{n}")
    fd = os.open(top / "open", os.O_RDONLY)
    try:
        for path in below(top):
            path.unlink()
        top.rmdir()
    finally:
        os.close(fd)


def truncate_new(path: Path, size: int) -> None:
    """A file of a size."""
    path.touch()
    os.truncate(path, size)


def setxattr_new(path: Path, value: bytes) -> None:
    """A file with an attribute."""
    path.touch()
    os.setxattr(path, "user.x", value)


def take(top: Path) -> None:
    """Take memory in every way, until all is taken."""
    top.mkdir()
    (top / "last").touch()
    rng = random.Random(1)
    calls: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(b"x"),
        lambda path: truncate_new(path, rng.choice([100, 5 * PAGE + 1, MiB + 7])),
        lambda path: write_sparsely(path, 5, 7),
        lambda path: write_sparsely(path, 300, 1),
        lambda path: setxattr_new(path, b"x" * rng.choice([600, 4097, 30_001])),
        lambda path: path.symlink_to("x" * 300),
        lambda path: path.mkdir(),
    ]
    failed = 0
    for n in range(2000):
        failed += errno_of(calls[n % len(calls)], top / f"new{n}") == errno.ENOSPC
        if failed == 20:
            break
    fill = errno_of((top / "last").write_bytes, b"x" * (64 * MiB))
    assert fill == errno.ENOSPC


def write_sparsely(path: Path, pages: int, step: int) -> None:
    """A byte in the middle of every ``step``-th page."""
    with path.open("wb", buffering=0) as file:
        for n in range(pages):
            file.seek(n * step * PAGE + 77)
            file.write(b"x")


def last_page(path: Path) -> bytes:
    """The last page of a file as a mapping shows it, with what is beyond the end of the file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with path.open("rb") as file:
        at = (os.fstat(file.fileno()).st_size - 1) // PAGE * PAGE
        address = libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(at))
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        try:
            return ctypes.string_at(address, PAGE)
        finally:
            libc.munmap(ctypes.c_void_p(address), PAGE)


def look(site: Site, top: Path) -> None:
    """The pattern is in nothing that can be read, neither through the mount nor where files are in the region."""
    region = site.region.open("rb")
    for path in below(top):
        if path.is_symlink():
            assert PATTERN not in os.readlink(os.fsencode(path)), path
            continue
        for name in os.listxattr(path):
            assert PATTERN not in os.getxattr(path, name), (path, name)
        if not path.is_file():
            continue
        assert PATTERN not in path.read_bytes(), path
        if path.stat().st_size:
            assert PATTERN not in last_page(path), path
        for extent in json.loads(os.getxattr(path, "user.pkernfs.extents")):
            region.seek(extent["region_offset"])
            assert PATTERN not in region.read(extent["length"]), (path, extent)
    region.close()


@pytest.mark.parametrize("how", ["freed", "freed-killed", "killed-while-open"])
def test_freed_memory_is_never_seen_again(unmounted: Site, how: str) -> None:
    """Fill, free in every way, take in every way, look."""
    site = unmounted
    site.region.unlink()
    site.make("32M")
    site.mount()
    top = site.mnt / "old"
    populate(top)
    if how == "killed-while-open":
        held = [os.open(path, os.O_RDONLY) for path in below(top) if not path.is_symlink() and path.is_file()]
        shutil.rmtree(top)
        site.crash()
        for fd in held:
            errno_of(os.close, fd)
        site.mount()
    else:
        free_all(top)
        if how == "freed-killed":
            site.crash()
            site.mount()
    take(site.mnt / "new")
    look(site, site.mnt / "new")


# -- the region's file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_a_new_region_is_its_owners_alone(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "region"
    result = run("mkfs.pkernfs", "--size", "16M", path, umask=mask)
    assert (result.returncode, result.stderr) == (0, "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o600])
def test_an_existing_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    """mkfs says so when others may use it."""
    path = tmp_path / "region"
    path.touch()
    path.chmod(mode)
    os.truncate(path, 16 * MiB)
    result = run("mkfs.pkernfs", path)
    assert result.returncode == 0
    assert stat.S_IMODE(path.stat().st_mode) == mode
    if mode == 0o600:
        assert result.stderr == ""
    else:
        assert result.line == (
            f"mkfs.pkernfs: {path}: others may use it (mode {mode:04o}, expected 0600): chmod 600 {path}"
        )


# -- mounts of one user -----------------------------------------------------------------------------------------------


def test_a_mount_without_allow_other_serves_its_owner_only(unmounted: Site, users: Users) -> None:
    unmounted.mount("noallow_other")
    path = unmounted.mnt / "f"
    path.write_bytes(b"x")
    path.chmod(0o666)
    unmounted.mnt.chmod(0o777)
    other = users.get(1000)
    for name, words in {
        "listdir": (unmounted.mnt,),
        "lstat": (path,),
        "open": (path, os.O_RDONLY),
        "mkdir": (unmounted.mnt / "d",),
        "getxattr": (unmounted.mnt, "user.pkernfs.control"),
    }.items():
        with pytest.raises(OSError, check=lambda error: error.errno == errno.EACCES):
            other.call(name, *(str(word) if isinstance(word, Path) else word for word in words))
    assert other.call("statvfs", str(unmounted.mnt)).f_blocks == 0  # it does not fail, and tells nothing


USER_MOUNT = """
import os, sys
import pyfuse3, trio, pkernfs.cli.fsck, pkernfs.cli.mkfs, pkernfs.cli.mount, pkernfs.fs.mkfs, pkernfs.fsck.scrub
import pkernfs.server.bdi, pkernfs.server.control, pkernfs.server.daemon, pkernfs.server.loop, pkernfs.server.mountpoint
import pkernfs.server.operations, pkernfs.options, pkernfs.server.start, pkernfs.server.verbs
import logging.handlers, syslog
import encodings.ascii, encodings.idna
from pkernfs.cli import main_mkfs, main_mount
uid = int(sys.argv.pop(1))
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
sys.exit(main_mkfs() if sys.argv[1] == "--size" else main_mount())
"""

USER_SCRIPT = """
set -eu
uid=$1 home=$2 python=$3 code=$4
export XDG_RUNTIME_DIR=$home
mknod "$home/fuse" c 10 229
chmod 666 "$home/fuse"
mount --bind "$home/fuse" /dev/fuse
"$python" -c "$code" "$uid" --size 16M --quiet "$home/region"
"$python" -c "$code" "$uid" "$home/region" "$home/mnt" -o "log=$home/log"
trap 'umount "$home/mnt"' EXIT
as() { setpriv --reuid "$1" --regid "$1" --clear-groups "${@:2}"; }
as "$uid" sh -c "echo content >$home/mnt/f; chmod 777 $home/mnt $home/mnt/f; cat $home/mnt/f"
stat -c %a "$home/region"
for other in 0 $((uid + 1)); do
    for command in "ls $home/mnt" "cat $home/mnt/f" "touch $home/mnt/new"; do
        as "$other" $command 2>&1 && echo "$other: $command: no error"
    done
done
true
"""


@PYTHON_FOR_ALL
@pytest.mark.skipif(not shutil.which("fusermount3"), reason="needs fusermount3")
def test_a_users_mount_is_closed_to_everybody_else(unmounted: Site) -> None:
    """Mounted with fusermount3; root is somebody else."""
    uid = 1  # one that /etc/passwd knows everywhere
    home = unmounted.tmp / "home"
    (home / "mnt").mkdir(parents=True)
    for path in (home, home / "mnt"):
        os.chown(path, uid, uid)
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", USER_SCRIPT, "bash"]
    result = run(*command, str(uid), home, sys.executable, USER_MOUNT, cwd=ROOT)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result
    assert lines[:2] == ["content", "600"]
    assert len(lines) == 2 + 6
    assert all(line.endswith("Permission denied") for line in lines[2:]), lines


def test_facts_are_for_the_owner_of_the_mount(site: Site, users: Users) -> None:
    path = site.mnt / "f"
    path.write_bytes(b"x")
    os.chmod(path, 0o666)
    for where, name in ((site.mnt, "control"), (site.mnt, "region"), (path, "extents"), (path, "nonsense")):
        with pytest.raises(OSError, check=lambda error: error.errno == errno.EPERM):
            users.get(1000).call("getxattr", str(where), f"user.pkernfs.{name}")
    assert os.getxattr(site.mnt, "user.pkernfs.region") == os.fsencode(site.region)
