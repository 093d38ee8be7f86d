"""The mount outlives its server: a worker that is killed, at any moment, is replaced, and nobody sees an error."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.load import Load
from tests.mount.model import KINDS
from tests.mount.site import MiB, Site, errno_of, strike, wait_for

TAKEOVER = re.compile("takes over|takeover failed")
LOADS = 4  #: processes of a load


def kill_worker(site: Site) -> None:
    """kill -9 of the worker, and wait until another one serves."""
    before = site.status()
    os.kill(before["worker"], signal.SIGKILL)
    wait_for(lambda: site.status()["takeovers"] > before["takeovers"], "a takeover")


def append(path: Path, data: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        assert file.write(data) == len(data)


def populate(site: Site) -> None:
    (site.mnt / "f").write_bytes(b"content")
    os.setxattr(site.mnt / "f", "user.here", b"1")
    (site.mnt / "d").mkdir()
    os.symlink("target", site.mnt / "s")


#: handler -> (call, what must hold then)
ONCE: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], bool]]] = {
    "mkdir": ("mkdir", lambda m: os.mkdir(m / "new"), lambda m: (m / "new").is_dir()),
    "create": (
        "create",
        lambda m: os.close(os.open(m / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
        lambda m: (m / "new").is_file(),
    ),
    "mknod": ("mknod", lambda m: os.mkfifo(m / "new"), lambda m: (m / "new").is_fifo()),
    "symlink": ("symlink", lambda m: os.symlink("x", m / "new"), lambda m: os.readlink(m / "new") == "x"),
    "link": ("link", lambda m: os.link(m / "f", m / "new"), lambda m: (m / "f").stat().st_nlink == 2),
    "unlink": ("unlink", lambda m: os.unlink(m / "f"), lambda m: not (m / "f").exists()),
    "rmdir": ("rmdir", lambda m: os.rmdir(m / "d"), lambda m: not (m / "d").exists()),
    "rename": ("rename", lambda m: os.rename(m / "f", m / "new"), lambda m: (m / "new").read_bytes() == b"content"),
    "rename-over": ("rename", lambda m: os.rename(m / "f", m / "s"), lambda m: (m / "s").read_bytes() == b"content"),
    "setxattr": (
        "setxattr",
        lambda m: os.setxattr(m / "f", "user.new", b"1"),
        lambda m: os.getxattr(m / "f", "user.new") == b"1",
    ),
    "setxattr-create": (
        "setxattr",
        lambda m: os.setxattr(m / "f", "user.new", b"1", os.XATTR_CREATE),
        lambda m: os.getxattr(m / "f", "user.new") == b"1",
    ),
    "setxattr-replace": (
        "setxattr",
        lambda m: os.setxattr(m / "f", "user.here", b"2", os.XATTR_REPLACE),
        lambda m: os.getxattr(m / "f", "user.here") == b"2",
    ),
    "removexattr": (
        "removexattr",
        lambda m: os.removexattr(m / "f", "user.here"),
        lambda m: os.listxattr(m / "f") == [],
    ),
    "truncate": ("setattr", lambda m: os.truncate(m / "f", 3), lambda m: (m / "f").read_bytes() == b"con"),
    "chmod": ("setattr", lambda m: os.chmod(m / "f", 0o600), lambda m: (m / "f").stat().st_mode & 0o777 == 0o600),
    "append": ("write", lambda m: append(m / "f", b" and more"), lambda m: (m / "f").stat().st_size == 16),
    "readdir": ("readdir", os.listdir, lambda m: sorted(os.listdir(m)) == ["d", "f", "iommu", "s"]),
    "statfs": ("statfs", os.statvfs, lambda m: True),
}


@pytest.mark.parametrize(("handler", "call", "holds"), ONCE.values(), ids=ONCE)
def test_done_and_not_answered(
    mounted: Site, handler: str, call: Callable[[Path], object], holds: Callable[[Path], bool]
) -> None:
    """It is answered as done, once."""
    populate(mounted)
    strike(mounted, f"{handler} kill")
    call(mounted.mnt)
    wait_for(lambda: mounted.status()["takeovers"] == 1, "one takeover")
    assert holds(mounted.mnt)


def test_what_fails_fails_once(mounted: Site) -> None:
    """An answer that comes after a takeover is that of the call, not of one before."""
    populate(mounted)
    os.mkdir(mounted.mnt / "new")
    strike(mounted, "mkdir kill")
    assert errno_of(os.mkdir, mounted.mnt / "new") == errno.EEXIST


@pytest.mark.parametrize("name", ["mkdir", "unlink", "rename", "write", "readdir", "statfs"])
def test_killed_before_it_is_done(mounted: Site, name: str) -> None:
    """It is done by the next worker."""
    populate(mounted)
    _, call, holds = {"write": ONCE["append"]}.get(name) or ONCE[name]
    strike(mounted, f"{name} die")
    call(mounted.mnt)
    assert holds(mounted.mnt)


def test_the_same_name_again(mounted: Site) -> None:
    """What was answered as done does not make the next call of the same kind done."""
    strike(mounted, "mkdir kill")
    os.mkdir(mounted.mnt / "new")
    os.rmdir(mounted.mnt / "new")
    os.mkdir(mounted.mnt / "new")
    assert (mounted.mnt / "new").is_dir()
    assert errno_of(os.mkdir, mounted.mnt / "new") == errno.EEXIST
    strike(mounted, "unlink kill")
    assert errno_of(os.unlink, mounted.mnt / "missing") == errno.ENOENT
    (mounted.mnt / "f").touch()
    os.unlink(mounted.mnt / "f")
    assert not (mounted.mnt / "f").exists()


def test_a_request_that_kills_every_worker(mounted: Site) -> None:
    """It is answered with EIO and named in the log; all else goes on."""
    mounted.expected = re.compile("takes over|takeover failed|has ended 4 workers")
    populate(mounted)
    strike(mounted, "rmdir die!")
    assert errno_of(os.rmdir, mounted.mnt / "d") == errno.EIO
    (mounted.tmp / "strike").unlink()
    assert "RMDIR of inode 1" in mounted.server_log.read_text()
    os.mkdir(mounted.mnt / "e")
    os.rmdir(mounted.mnt / "d")


def test_what_is_open_stays(site: Site) -> None:
    """Files, one without a name, a directory in mid-read, a mapping, locks, a working directory."""
    site.expected = TAKEOVER
    for n in range(1000):
        (site.mnt / f"{n:04}").touch()
    with (
        open(site.mnt / "gone", "w+b", buffering=0) as gone,
        open(site.mnt / "mapped", "w+b", buffering=0) as mapped,
        open(site.mnt / "locked", "w") as locked,
        os.scandir(site.mnt) as entries,
        subprocess.Popen(
            ["sh", "-c", "while read name; do cat ./$name; done"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=site.mnt, bufsize=0,
        ) as shell,
    ):  # fmt: skip
        gone.write(b"x" * (3 * MiB))
        os.unlink(site.mnt / "gone")
        mapped.truncate(MiB)
        fcntl.flock(locked, fcntl.LOCK_EX)
        fcntl.lockf(mapped, fcntl.LOCK_EX)
        names = [next(entries).name for _ in range(100)]
        with mmap.mmap(mapped.fileno(), MiB) as memory:
            memory[:5] = b"first"
            for round_ in range(5):
                kill_worker(site)
                assert os.pread(gone.fileno(), 3 * MiB, 0) == b"x" * (3 * MiB)
                memory[round_ * 4096 + 10] = round_
                memory.flush()
                (site.mnt / "relative").write_bytes(b"%d" % round_)
                assert shell.stdin
                assert shell.stdout
                shell.stdin.write(b"relative\n")
                assert shell.stdout.read(1) == b"%d" % round_
            names += [entry.name for entry in entries]
            assert memory[:5] == b"first"
        assert {*names, "relative"} == set(os.listdir(site.mnt))
        assert len(names) == len(set(names))
        with open(site.mnt / "locked") as other:
            assert errno_of(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == errno.EWOULDBLOCK
        free = site.free()
    wait_for(lambda: site.free() >= free + 3 * MiB // 4096, "the memory of the file without a name")


def test_killed_under_a_load(unmounted: Site) -> None:
    """Calls of all kinds, while workers are killed: none fails, and all that they did is there, once.

    The long form: tests/run -m slow -k takeover --kills=200 --kill-seed=1
    """
    kill_under_load(unmounted, rounds=12, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_killed_under_a_load_many_times(unmounted: Site, pytestconfig: pytest.Config) -> None:
    """As many takeovers as --kills says."""
    kill_under_load(unmounted, rounds=pytestconfig.getoption("--kills"), seed=pytestconfig.getoption("--kill-seed"))


def kill_under_load(site: Site, rounds: int, seed: int) -> None:
    """Kill a worker at ``rounds`` random moments, then everything, and compare what is there with a model."""
    site.expected = TAKEOVER
    site.region.unlink()
    site.make("512M")
    site.mount()
    rng = random.Random(seed)
    with Load(site.mnt / "load", seed, site.shm / "journals", LOADS) as load:
        for _ in range(rounds):
            load.wait_for(load.returned() + int(2 ** rng.uniform(2, 8)), rng.choice(["", *KINDS]))
            kill_worker(site)
        before = [load.words[2 * worker] for worker in range(LOADS)]
        wait_for(lambda: all(load.words[2 * at] > count for at, count in enumerate(before)), "each process to go on")
        site.kill(site.servers())
        load.end()
        site.mount()
        assert load.verify() > rounds


def test_a_process_that_never_sees_the_takeovers(site: Site) -> None:
    """A program without any retry, from its beginning to its end."""
    site.expected = TAKEOVER
    program = """
import os, sys
for n in range(1500):
    name = f"{n % 37}"
    with open(name, "ab", buffering=0) as file:
        file.write(b"%06d" % n)
    os.rename(name, "moved-" + name)
    os.link("moved-" + name, name)
    os.unlink("moved-" + name)
print("done")
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=site.mnt, stdout=subprocess.PIPE, text=True) as load:
        while load.poll() is None:
            kill_worker(site)
        assert load.stdout
        assert load.stdout.read() == "done\n"
    assert site.status()["takeovers"] > 3
    for n in range(37):
        data = (site.mnt / f"{n}").read_bytes()
        assert data == b"".join(b"%06d" % at for at in range(n, 1500, 37))
