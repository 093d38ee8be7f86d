"""pkernfs hold, release and create-ram, through the commands and system calls."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs import api, client
from pkernfs.client import ControlError
from tests.mount.agent import Agent
from tests.mount.site import MiB, Site, errno_of, run
from tests.mount.twin import Users

TAKEOVER = re.compile("takes over")


@pytest.fixture
def saved(site: Site) -> Path:
    """A file that is held, in a directory."""
    (site.mnt / "vms").mkdir()
    path = site.mnt / "vms/ram"
    path.write_bytes(b"RAM" * 10_000)
    os.setxattr(path, "user.x", b"y")
    site.run_ok("pkernfs", "hold", path, "--reason", "g1 is saved")
    return path


def attempts(path: Path) -> dict[str, int]:
    """What a user may try on a file, and with which errno it fails."""
    other = path.with_name("other")
    other.write_bytes(b"other")
    return {
        "open for writing": errno_of(os.open, path, os.O_WRONLY),
        "open for both": errno_of(os.open, path, os.O_RDWR),
        "open for appending": errno_of(os.open, path, os.O_WRONLY | os.O_APPEND),
        "open and truncate": errno_of(os.open, path, os.O_WRONLY | os.O_TRUNC),
        "open or create": errno_of(os.open, path, os.O_RDWR | os.O_CREAT, 0o600),
        "truncate": errno_of(os.truncate, path, 5),
        "unlink": errno_of(os.unlink, path),
        "rename": errno_of(os.rename, path, path.with_name("new")),
        "rename over": errno_of(os.rename, other, path),
        "link": errno_of(os.link, path, path.with_name("new")),
        "chmod": errno_of(os.chmod, path, 0o777),
        "chown": errno_of(os.chown, path, 5, 5),
        "utime": errno_of(os.utime, path),
        "utime of a time": errno_of(os.utime, path, (5, 5)),
        "setxattr": errno_of(os.setxattr, path, "user.x", b"z"),
        "removexattr": errno_of(os.removexattr, path, "user.x"),
        "setxattr of its record": errno_of(os.setxattr, path, "trusted.pkernfs.hold", b"z"),
    }


def test_root_cannot_change_a_held_file(site: Site, saved: Path) -> None:
    """Now, after a takeover, and after all processes were killed and the region was mounted again."""
    site.expected = TAKEOVER
    before = saved.stat()

    def take_over() -> None:
        os.kill(site.worker(), 9)
        site.wait_for_takeovers(1)

    ends: list[Callable[[], object]] = [lambda: None, take_over, site.restart]
    for end in ends:
        end()
        found = attempts(saved)
        assert found == dict.fromkeys(found, errno.EPERM)
        assert saved.read_bytes() == b"RAM" * 10_000
        now = saved.stat()
        # All but the number of the mount, which another mount may have got meanwhile, and the access time.
        for field in ("mode", "ino", "nlink", "uid", "gid", "size", "mtime_ns", "ctime_ns"):
            assert getattr(now, f"st_{field}") == getattr(before, f"st_{field}"), field
        assert os.listxattr(saved) == ["user.x"]
        assert errno_of(os.getxattr, saved, "pkernfs.hold") == errno.EOPNOTSUPP
        assert json.loads(os.getxattr(saved, "user.pkernfs.held"))["reason"] == "g1 is saved"


def test_rm_leaves_what_is_held(site: Site, saved: Path) -> None:
    (saved.parent / "more").mkdir()
    (site.mnt / "vms/more/file").write_bytes(b"x")
    (site.mnt / "elsewhere").write_bytes(b"x")
    done = run("rm", "-rf", site.mnt / "vms", site.mnt / "elsewhere")
    assert done.returncode == 1
    assert "Operation not permitted" in done.line
    assert [path.name for path in (site.mnt / "vms").iterdir()] == ["ram"]
    assert not (site.mnt / "elsewhere").exists()
    (site.mnt / "vms").rename(site.mnt / "moved")
    assert (site.mnt / "moved/ram").read_bytes() == b"RAM" * 10_000


def test_it_is_shown_and_released(site: Site, saved: Path) -> None:
    listed = json.loads(site.run_ok("pkernfs", "hold", "--list", site.mnt, "--json"))
    assert [(one["file"], one["reason"], one["ino"]) for one in listed] == [
        ("vms/ram", "g1 is saved", saved.stat().st_ino)
    ]
    assert f"{saved}: held since " in site.run_ok("pkernfs", "hold", "--list", site.mnt)
    assert "g1 is saved" in site.run_ok("pkernfs", "info", saved)
    assert "held files" in site.run_ok("pkernfs", "info", site.mnt)
    rows = {row["name"]: row for row in json.loads(run("pkernfs", "ls", "-R", "--json", site.region).stdout)}
    assert rows["ram"]["held"]["reason"] == "g1 is saved"
    assert rows["vms"]["held"] is None
    assert "(held: g1 is saved)" in run("pkernfs", "ls", f"{site.region}:vms").stdout
    for _ in range(2):
        assert site.run_ok("pkernfs", "release", saved) == f"{saved}: not held\n"
    assert json.loads(site.run_ok("pkernfs", "hold", "--list", site.mnt, "--json")) == []
    saved.write_bytes(b"anew")
    saved.unlink()


def test_several_files_and_those_that_cannot_be(site: Site) -> None:
    paths = [site.mnt / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(b"x")
    link = site.mnt / "link"
    link.symlink_to("c")
    done = run("pkernfs", "hold", *paths[:2], site.mnt, site.mnt / "none", link, "--reason", "two\u00e4")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert [errno_of(path.unlink) for path in paths] == [errno.EPERM] * 3
    assert run("pkernfs", "hold", paths[0], "--reason", "another").returncode == 1
    assert run("pkernfs", "hold", paths[0], "--reason", "two\u00e4").returncode == 0
    for reason in ("", "x" * 256, "a\nb"):
        assert run("pkernfs", "hold", paths[0], "--reason", reason).returncode == 1
    site.run_ok("pkernfs", "release", *paths)
    assert run("pkernfs", "hold", site.mnt / "iommu/root-pgtables", "--reason", "x").returncode == 1


def hold_fails(path: Path, pid: int) -> None:
    done = run("pkernfs", "hold", path, "--reason", "x")
    assert done.returncode == 1
    assert f"open for writing, by process {pid}" in done.line


def test_a_writer_is_named(site: Site) -> None:
    """A descriptor for writing or both, and a shared mapping without one; none of them loses what it writes."""
    path = site.mnt / "f"
    path.write_bytes(bytes(MiB))
    with Agent() as agent:
        pid = agent.process.pid
        for flags in (os.O_WRONLY, os.O_RDWR | os.O_APPEND):
            fd = agent.open(str(path), flags)
            hold_fails(path, pid)
            agent.write(fd, b"x")
            agent.close_fd(fd)
        handle = agent.map_file(str(path), MiB)
        hold_fails(path, pid)
        agent.map_store(handle, 4096, b"stored")
    reader = os.open(path, os.O_RDONLY)
    with mmap.mmap(reader, MiB, prot=mmap.PROT_READ) as memory:
        site.run_ok("pkernfs", "hold", path, "--reason", "x")
        assert memory[4096:4102] == b"stored"
    os.close(reader)
    site.restart()
    assert path.read_bytes()[4096:4102] == b"stored"


def test_what_was_written_just_before_is_there(unmounted: Site) -> None:
    """With -o writeback the kernel has it yet; nothing of it is refused later."""
    unmounted.mount("writeback")
    path = unmounted.mnt / "f"
    path.write_bytes(b"w" * 300_000)
    unmounted.run_ok("pkernfs", "hold", path, "--reason", "x")
    assert path.stat().st_size == 300_000
    unmounted.restart()
    assert path.read_bytes() == b"w" * 300_000
    assert errno_of(os.open, path, os.O_WRONLY) == errno.EPERM


def test_read_only_mount(site: Site, saved: Path) -> None:
    site.umount()
    site.mount("ro")
    assert run("pkernfs", "release", saved).returncode == 1
    assert "g1 is saved" in site.run_ok("pkernfs", "info", saved)
    assert saved.read_bytes() == b"RAM" * 10_000


# -- create-ram -------------------------------------------------------------------------------------------------------


def test_create_ram(site: Site) -> None:
    path = site.mnt / "guest ram"
    old = os.umask(0)
    try:
        said = site.run_ok("pkernfs", "create-ram", path, "9M")
    finally:
        os.umask(old)
    assert "9 MiB in one piece" in said
    status = path.stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode), status.st_uid) == (9 * MiB, 0o600, os.getuid())
    assert status.st_blocks * 512 >= 9 * MiB
    assert not any(path.read_bytes())
    assert json.loads(site.run_ok("pkernfs", "info", "--json", path))["contiguous"]
    site.run_ok("pkernfs", "direct", path, "on")
    site.run_ok("pkernfs", "qemu-args", path, "--direct")
    assert run("pkernfs", "create-ram", path, "2M").returncode == 1
    assert path.stat().st_size == 9 * MiB
    made = json.loads(
        site.run_ok(
            *("pkernfs", "create-ram", site.mnt / "two", "0x400000", "--json"),
            *("--owner", "1000", "--group", "1001", "--mode", "0640"),
        )
    )
    status = (site.mnt / "two").stat()
    assert (status.st_ino, status.st_uid, status.st_gid, oct(status.st_mode)) == (made["ino"], 1000, 1001, "0o100640")


def test_create_ram_of_what_cannot_be(site: Site) -> None:
    (site.mnt / "d").mkdir()
    free = site.free()
    for words, status in (
        ((site.mnt / "ram", "1T"), 1),
        ((site.mnt / "ram", "60M"), 1),
        ((site.mnt / "ram", "5000"), 2),
        ((site.mnt / "ram", "0"), 2),
        ((site.mnt / "none/ram", "2M"), 2),
        ((site.mnt / "d", "2M"), 1),
        ((site.mnt / "iommu/ram", "2M"), 1),
        ((site.tmp / "ram", "2M"), 2),
        ((site.mnt / "ram", "2M", "--owner", "no-such-user"), 2),
    ):
        done = run("pkernfs", "create-ram", *words)
        assert done.returncode == status, done
        assert done.line
    assert sorted(os.listdir(site.mnt)) == ["d", "iommu"]
    site.wait_for_free(free)


def test_create_ram_that_comes_again_is_done_once(site: Site) -> None:
    """As a client asks again whose server was killed between commit and answer."""
    request = api.CreateRam(name="ram", size=2 * MiB, owner=0, group=0, key=12345)
    site.expected = TAKEOVER
    first = client.ask(str(site.mnt), request)
    os.kill(site.worker(), 9)
    site.wait_for_takeovers(1)
    assert client.ask(str(site.mnt), request).ino == first.ino == (site.mnt / "ram").stat().st_ino
    request.key = 54321
    with pytest.raises(ControlError) as found:
        client.ask(str(site.mnt), request)
    assert found.value.errno == errno.EEXIST


def test_create_ram_below_a_name_that_was_missed(site: Site) -> None:
    """The kernel has kept that there is no such name."""
    path = site.mnt / "ram"
    assert errno_of(path.stat) == errno.ENOENT
    before = site.mnt.stat().st_size
    site.run_ok("pkernfs", "create-ram", path, "2M")
    assert path.stat().st_size == 2 * MiB
    assert site.mnt.stat().st_size > before


def test_a_new_mount_is_for_root_alone(unmounted: Site, users: Users) -> None:
    """The quick start of README: what root puts into a new mount nobody else reads."""
    unmounted.region.unlink()
    unmounted.run_ok("mkfs.pkernfs", "--size", "64M", unmounted.region)
    unmounted.mount()
    path = unmounted.mnt / "guest-ram"
    path.touch()
    os.truncate(path, 2 * MiB)
    other = users.get(1000)
    with pytest.raises(PermissionError):
        other.read_file(str(path))
    with pytest.raises(PermissionError):
        other.listdir(str(unmounted.mnt))
    unmounted.run_ok("pkernfs", "create-ram", unmounted.mnt / "ram", "2M")
    for mode, seen in (("0711", True), ("0755", True), ("0700", False)):
        unmounted.umount()
        unmounted.mount(f"mode={mode}")
        assert oct(unmounted.mnt.stat().st_mode)[-3:] == mode[1:]
        assert (errno_of(other.read_file, str(path)) == 0) == seen
        assert errno_of(other.read_file, str(unmounted.mnt / "ram")) == errno.EACCES
