"""mount.pkernfs: what it refuses and how, its options, its life in front and in the background, kinds of regions."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkernfs.format import SUPERBLOCK, SUPERBLOCK_CHECKED, checksum
from pkernfs.region import copies_of
from pkernfs.server.bdi import raise_limits
from tests.mount.site import DEAD, PATIENCE, MiB, Result, Site, errno_of, find_program, run, wait_for
from tests.mount.twin import Users

FAILURE = 32
DAY = 86400


def refuses(result: Result, status: int, *parts: str) -> None:
    """It ended with this status and one line that says all these; nothing on standard output."""
    assert result.returncode == status, result
    assert result.stdout == ""
    for word in ("mount.pkernfs: ", *parts):
        assert word in result.line
    assert "Traceback" not in result.stderr


# -- refusals -------------------------------------------------------------------------------------------------------


def test_second_mount_names_the_holder(site: Site) -> None:
    other = site.tmp / "other"
    other.mkdir()
    pid = site.keeper()
    result = run("mount.pkernfs", "--foreground", site.region, other)
    refuses(result, FAILURE, f"process {pid}, ", str(site.region), str(site.mnt), "umount")
    refuses(site.try_mount(), FAILURE, str(site.mnt))
    assert not os.path.ismount(other)
    assert os.path.ismount(site.mnt)
    mkfs = run("mkfs.pkernfs", "--force", site.region)
    assert mkfs.returncode == 1
    assert f"process {pid}, " in mkfs.line


def test_region_locked_by_somebody_else(unmounted: Site) -> None:
    """Not only by a mount; said after a bounded wait, which ends at once when the lock goes."""
    with unmounted.region.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        digest = unmounted.digest()
        process = start_mount(unmounted)
        assert not select.select([process.pidfd], [], [], 1.0)[0], process.result()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert process.result().returncode == 0
    unmounted.umount()
    assert unmounted.digest() != digest


class Started:
    """A command that runs."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def result(self, timeout: float = PATIENCE) -> Result:
        """Its end."""
        self.process.wait(timeout)
        os.close(self.pidfd)
        return Result([], self.process.returncode, "", "")


def start_mount(site: Site, *arguments: str) -> Started:
    """Begin to mount."""
    options = f"log={site.server_log}"
    return Started([find_program("mount.pkernfs"), *arguments, str(site.region), str(site.mnt), "-o", options])


@pytest.mark.parametrize(
    ("size", "start", "parts"),
    [
        pytest.param(None, b"", ["no such region", "mkfs.pkernfs"], id="missing"),
        pytest.param(0, b"", ["multiple of 2 MiB", "found 0 bytes"], id="empty"),
        pytest.param(64 * MiB, b"", ["expected"], id="zeros"),
        pytest.param(64 * MiB, b"\x7fELF", ["expected"], id="not-a-region"),
        pytest.param(64 * MiB - 1, None, ["truncated", f"expected {64 * MiB} bytes"], id="a-byte-short"),
        pytest.param(62 * MiB, None, ["found 65011712"], id="a-block-short"),
        pytest.param(4096, None, ["4096"], id="a-page-only"),
    ],
)
@pytest.mark.parametrize("options", ["rw", "ro"])
def test_not_a_region(unmounted: Site, size: int | None, start: bytes | None, parts: list[str], options: str) -> None:
    """``start`` None: a region that was cut."""
    path = unmounted.tmp / "bad"
    if size is not None:
        path.write_bytes(start if start is not None else unmounted.region.read_bytes())
        os.truncate(path, size)
    before = path.read_bytes() if size is not None else None
    refuses(run("mount.pkernfs", path, unmounted.mnt, "-o", options), FAILURE, str(path), *parts)
    assert not os.path.ismount(unmounted.mnt)
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.parametrize(
    ("offset", "value", "word"),
    [
        pytest.param(8, 99, "version", id="version"),
        pytest.param(24, 1 << 7, "feature", id="incompatible-feature"),
        pytest.param(40, 1, "checksum", id="damage"),
    ],
)
def test_damaged_superblocks(unmounted: Site, offset: int, value: int, word: str) -> None:
    """In all copies.  The one line says what was expected and what was found."""
    data = bytearray(unmounted.region.read_bytes())
    for at in (0, *copies_of(SUPERBLOCK.unpack(bytes(data[:256])))):
        data[at + offset] = value
        if word != "checksum":
            data[at + 12 : at + 16] = bytes(4)
            data[at + 12 : at + 16] = checksum(data[at : at + SUPERBLOCK_CHECKED]).to_bytes(4, "little")
    bad = unmounted.tmp / "bad"
    bad.write_bytes(data)
    refuses(run("mount.pkernfs", bad, unmounted.mnt), FAILURE, word)
    assert bad.read_bytes() == data


def test_mountpoints_that_are_none(unmounted: Site) -> None:
    file = unmounted.tmp / "file"
    file.touch()
    missing = unmounted.tmp / "missing"
    refuses(run("mount.pkernfs", unmounted.region, file), FAILURE, str(file), "directory")
    refuses(run("mount.pkernfs", unmounted.region, missing), FAILURE, str(missing), "mkdir")
    unmounted.mount()  # the region was left unlocked


def test_region_that_is_something_else(unmounted: Site) -> None:
    for path in (unmounted.tmp, Path("/dev/null"), Path("/dev/loop0")):
        if path.exists():
            refuses(run("mount.pkernfs", path, unmounted.mnt), FAILURE, str(path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "nonsense"],
        ["-o", "uid=root"],
        ["-o", "mode=999"],
        ["-o", "gid=-1"],
        ["--nonsense"],
        ["one-too-many"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_wrong_usage(unmounted: Site, arguments: list[str]) -> None:
    refuses(run("mount.pkernfs", unmounted.region, unmounted.mnt, *arguments), 1)
    assert not os.path.ismount(unmounted.mnt)


def test_log_that_cannot_be_written(unmounted: Site) -> None:
    options = f"log={unmounted.tmp}/missing/log"
    refuses(run("mount.pkernfs", unmounted.region, unmounted.mnt, "-o", options), FAILURE, "missing/log")
    unmounted.mount()


# -- options --------------------------------------------------------------------------------------------------------


def test_what_mount_shows(site: Site) -> None:
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {site.mnt} " in line]
    fields = line.split()
    assert fields[fields.index("-") + 1] == "fuse.pkernfs"
    assert fields[fields.index("-") + 2] == str(site.region)
    assert "allow_other" in line
    assert "default_permissions" in line
    columns = site.run_ok("df", "--output=source,fstype", site.mnt).splitlines()[1].split()
    assert columns == [str(site.region), "fuse.pkernfs"]


def test_read_only(site: Site) -> None:
    site.umount()
    for arguments in (["-o", "ro"], ["-r"]):
        site.run_ok("mount.pkernfs", site.region, site.mnt, *arguments)
        assert os.statvfs(site.mnt).f_flag & os.ST_RDONLY
        assert errno_of((site.mnt / "f").touch) == errno.EROFS
        site.umount()


def test_who_may_enter(unmounted: Site, users: Users) -> None:
    unmounted.mount("noallow_other")
    (unmounted.mnt / "f").write_bytes(b"x")
    with pytest.raises(PermissionError):
        users.get(1000).listdir(str(unmounted.mnt))
    with pytest.raises(PermissionError):
        users.get(1000).lstat(str(unmounted.mnt / "f"))
    assert (unmounted.mnt / "f").read_bytes() == b"x"
    unmounted.umount()
    for options in ("allow_other", ""):
        unmounted.mount(options)
        assert users.get(1000).read_file(str(unmounted.mnt / "f")) == b"x"
        unmounted.umount()


def test_owner_and_mode_of_the_root(unmounted: Site, users: Users) -> None:
    unmounted.mount("uid=1000,gid=1002,mode=2750")
    for _ in range(2):
        found = unmounted.mnt.stat()
        assert (found.st_uid, found.st_gid, oct(found.st_mode)) == (1000, 1002, "0o42750")
        users.get(1000).write_file(str(unmounted.mnt / "mine"), b"x")
        assert (unmounted.mnt / "mine").stat().st_gid == 1002
        users.get().tidy()
        unmounted.umount()
        unmounted.mount()  # they stay
    unmounted.umount()
    unmounted.mount("mode=0755,uid=0")
    found = unmounted.mnt.stat()
    assert (found.st_uid, found.st_gid, oct(found.st_mode)) == (0, 1002, "0o40755")


@pytest.mark.parametrize(
    ("options", "old", "fresh"),
    [("noatime", False, False), ("relatime", True, False), ("strictatime", True, True), ("", True, False)],
)
def test_access_times(unmounted: Site, options: str, old: bool, fresh: bool) -> None:
    """Whether a read updates an access time that is older than the content, and one that is newer."""
    unmounted.mount(options)
    path = unmounted.mnt / "f"
    path.write_bytes(b"x")
    now = path.stat().st_ctime_ns
    for atime, mtime, updated in ((1, 2, old), (now + 10**9, now, fresh), (now - 2 * DAY * 10**9, 1, old)):
        os.utime(path, ns=(atime, mtime))
        before = path.stat().st_atime_ns
        path.read_bytes()
        assert (path.stat().st_atime_ns != before) == updated, (atime, mtime)


def test_suid_and_dev(unmounted: Site) -> None:
    unmounted.mount()
    device = unmounted.mnt / "null"
    os.mknod(device, 0o20666, os.makedev(1, 3))
    device.write_bytes(b"x")
    unmounted.umount()
    unmounted.mount("nodev,nosuid,noexec")
    flags = os.statvfs(unmounted.mnt).f_flag
    assert flags & os.ST_NODEV
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NOEXEC
    with pytest.raises(PermissionError):
        device.write_bytes(b"x")


def test_options_of_fstab_are_ignored(unmounted: Site) -> None:
    unmounted.mount("defaults,nofail,_netdev,x-systemd.automount,noauto,user,rw")


def test_log_file(site: Site) -> None:
    """It says who serves what; the end is in it."""
    site.umount()
    text = site.server_log.read_text()
    assert str(site.region) in text
    assert "unmounted" in text


def bdi(site: Site) -> dict[str, int]:
    """The limits of the mount's backing device."""
    device = site.mnt.stat().st_dev
    folder = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    return {name: int((folder / name).read_text()) for name in ("read_ahead_kb", "strict_limit", "max_ratio")}


def test_limits_of_the_backing_device(unmounted: Site) -> None:
    unmounted.mount("notune")
    default = bdi(unmounted)
    unmounted.umount()
    unmounted.mount()
    assert bdi(unmounted) == {"read_ahead_kb": 1024, "strict_limit": 0, "max_ratio": 100}
    assert default != bdi(unmounted)


def test_limits_that_a_kernel_does_not_have(tmp_path: Path) -> None:
    """Linux 6.1 has no strict_limit: the others are raised.  One that cannot be raised leaves the others to be."""
    for name in ("read_ahead_kb", "max_ratio", "min_ratio"):
        (tmp_path / name).write_text("1")
    assert raise_limits(str(tmp_path)) == ""
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "read_ahead_kb": "1024",
        "max_ratio": "100",
        "min_ratio": "1",
    }
    (tmp_path / "read_ahead_kb").unlink()
    (tmp_path / "read_ahead_kb").mkdir()
    (tmp_path / "max_ratio").write_text("1")
    assert "(Is a directory): random writes to mapped files will be slow" in raise_limits(str(tmp_path))
    assert (tmp_path / "max_ratio").read_text() == "100"
    assert "(No such file or directory)" in raise_limits(str(tmp_path / "none"))


# -- in front, in the background, and the end -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "SIGINT"])
def test_in_front(unmounted: Site, how: str) -> None:
    process = start_mount(unmounted, "-f")
    wait_for(lambda: os.path.ismount(unmounted.mnt), "the mount")
    (unmounted.mnt / "f").write_bytes(b"content")
    assert process.process.poll() is None
    if how == "umount":
        unmounted.umount()
    else:
        process.process.send_signal(getattr(signal, how))
    assert process.result().returncode == 0
    assert not os.path.ismount(unmounted.mnt)
    unmounted.mount()
    assert (unmounted.mnt / "f").read_bytes() == b"content"


def test_in_front_with_an_error(unmounted: Site) -> None:
    unmounted.region.unlink()
    refuses(run("mount.pkernfs", "-f", unmounted.region, unmounted.mnt), FAILURE, "no such region")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signal_unmounts(site: Site, name: str) -> None:
    (site.mnt / "f").write_bytes(b"content")
    pid = site.keeper()
    os.kill(pid, getattr(signal, name))
    wait_for(lambda: not site.servers(), "the end of the server")
    assert not os.path.ismount(site.mnt)
    assert f"{name}: unmounting" in site.server_log.read_text()
    site.mount()
    assert (site.mnt / "f").read_bytes() == b"content"


def test_signal_while_a_file_is_open(site: Site) -> None:
    """The mount is detached, the server ends (and says so), and the next mount has what was written."""
    site.expected = re.compile("is in use: what is open there fails from now on")
    fd = os.open(site.mnt / "f", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"content")
    pid = site.keeper()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not site.servers(), "the end of the server")
    assert not os.path.ismount(site.mnt)
    for call in (lambda: os.write(fd, b"more"), lambda: os.close(fd)):
        assert errno_of(call) in DEAD
    site.mount()
    assert (site.mnt / "f").read_bytes() == b"content"


def test_usable_when_the_command_returns(unmounted: Site) -> None:
    """And unmounted and mountable again at once, twenty times over, with no wait in between."""
    for number in range(20):
        unmounted.mount()
        assert os.path.ismount(unmounted.mnt)
        (unmounted.mnt / f"f{number}").write_bytes(b"%d" % number)
        assert len(os.listdir(unmounted.mnt)) == number + 2
        assert run("umount", unmounted.mnt).returncode == 0
    unmounted.mount()
    for number in range(20):
        assert (unmounted.mnt / f"f{number}").read_bytes() == b"%d" % number


def test_daemon_lets_go_of_everything(unmounted: Site) -> None:
    """Standard descriptors, terminal, working directory: nobody waits for the server by accident."""
    result = subprocess.run(
        [find_program("mount.pkernfs"), unmounted.region, unmounted.mnt, "-o", f"log={unmounted.server_log}"],
        cwd=unmounted.tmp, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert (result.stdout, result.stderr) == (b"", b"")
    pid = unmounted.keeper()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    for number in range(3):
        assert os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null"


def test_nothing_is_said_when_all_is_well(unmounted: Site) -> None:
    """Also without a log file, whether there is a journal or not."""
    result = run("mount.pkernfs", unmounted.region, unmounted.mnt)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_umount_while_a_file_is_open(site: Site) -> None:
    with (site.mnt / "f").open("wb") as file:
        file.write(b"content")
        result = run("umount", site.mnt)
        assert result.returncode == FAILURE
        assert "busy" in result.stderr
        file.write(b" and more")
    site.umount()
    site.mount()
    assert (site.mnt / "f").read_bytes() == b"content and more"


def test_lazy_umount_serves_until_the_last_user_goes(site: Site) -> None:
    with (site.mnt / "f").open("w+b", buffering=0) as file:
        site.run_ok("umount", "-l", site.mnt)
        assert not os.path.ismount(site.mnt)
        file.write(b"content")
        file.seek(0)
        assert file.read() == b"content"
        assert site.servers()
    site.wait_for_end()
    site.mount()
    assert (site.mnt / "f").read_bytes() == b"content"


def test_umount_returns_when_everything_is_in_the_region(site: Site) -> None:
    """Dirty pages of a mapping too: the bytes are in the region file when umount has returned."""
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); os.ftruncate(fd, 1 << 21); "
        "area = mmap.mmap(fd, 1 << 21); area[:] = b'needle in the region' * 104857 + b'............'; os._exit(0)"
    )
    assert run(sys.executable, "-c", code, site.mnt / "f").returncode == 0
    assert run("umount", site.mnt).returncode == 0
    assert site.region.read_bytes().count(b"needle in the region") == 104857


def test_control_socket_goes_with_the_mount(site: Site) -> None:
    path = os.fsdecode(os.getxattr(site.mnt, "user.pkernfs.control"))
    assert os.path.exists(path)
    assert os.stat(path).st_mode & 0o077 == 0
    site.umount()
    assert not os.path.exists(path)


def test_remount(site: Site) -> None:
    site.run_ok("mount.pkernfs", "-o", "remount,ro", site.region, site.mnt)
    assert errno_of((site.mnt / "f").touch) == errno.EROFS
    site.run_ok("mount.pkernfs", "-o", "remount,rw", site.region, site.mnt)
    (site.mnt / "f").touch()


# -- regions --------------------------------------------------------------------------------------------------------


@contextmanager
def moved(site: Site, region: Path) -> Iterator[Site]:
    """The site with its region elsewhere, for a while."""
    old, site.region = site.region, region
    try:
        yield site
        if site.is_mounted():
            site.umount()
        site.verify()
    finally:
        if site.is_mounted():
            run("umount", "-l", site.mnt)
        site.kill(site.servers())
        region.unlink(missing_ok=True)
        site.region = old


def use(site: Site) -> None:
    """Make, mount, kill, mount: what is written is there."""
    site.make("24M")
    site.mount()
    (site.mnt / "f").write_bytes(b"content" * 10_000)
    (site.mnt / "ram").touch()
    os.truncate(site.mnt / "ram", 4 * MiB)
    for how in (site.crash, site.umount):
        how()
        site.mount()
        assert (site.mnt / "f").read_bytes() == b"content" * 10_000
        assert (site.mnt / "ram").stat().st_size == 4 * MiB
    site.run_ok("pkernfs", "info", site.region)
    site.run_ok("pkernfs", "info", site.mnt / "ram")


@pytest.mark.parametrize(
    "name", ["with space", "with,comma", "back\\slash", "a,b c\\d:e", "é🙂", "#hash", "new\nline", "\udcff-not-utf-8"]
)
def test_unusual_region_paths(unmounted: Site, name: str) -> None:
    with moved(unmounted, unmounted.tmp / name):
        use(unmounted)


@pytest.mark.parametrize("name", ["with space", "with,comma", "back\\slash", "é🙂"])
def test_unusual_mountpoints(unmounted: Site, name: str) -> None:
    mountpoint = unmounted.tmp / name
    mountpoint.mkdir()
    old, unmounted.mountpoint = unmounted.mountpoint, mountpoint
    try:
        unmounted.mount()
        (mountpoint / "f").write_bytes(b"x")
        unmounted.restart()
        assert (mountpoint / "f").read_bytes() == b"x"
        assert str(mountpoint) in unmounted.run_ok("pkernfs", "info", unmounted.region)
        unmounted.umount()
    finally:
        run("umount", "-l", mountpoint)
        unmounted.mountpoint = old


def test_relative_paths_and_links(unmounted: Site) -> None:
    os.symlink(unmounted.region, unmounted.tmp / "link")
    options = f"log={unmounted.server_log}"
    unmounted_run = run("mount.pkernfs", "link", "mnt", "-o", options, cwd=unmounted.tmp)
    assert unmounted_run.returncode == 0, unmounted_run
    assert unmounted.servers()
    assert os.path.ismount(unmounted.mnt)


def test_region_on_a_disk(unmounted: Site) -> None:
    for folder in ("/var/tmp", "/tmp"):
        if "tmpfs" not in unmounted.run_ok("df", "--output=fstype", folder):
            with moved(unmounted, Path(folder) / f"{unmounted.tmp.name}-region"):
                use(unmounted)
            return
    pytest.skip("neither /var/tmp nor /tmp is on a disk")


def test_region_on_hugetlbfs(unmounted: Site) -> None:
    """Pages of 2 MiB, no read(2) and write(2) there."""
    count = Path("/proc/sys/vm/nr_hugepages")
    before = count.read_text()
    folder = unmounted.tmp / "huge"
    folder.mkdir()
    try:
        count.write_text("16")
    except OSError as error:
        pytest.skip(f"cannot set pages aside: {error}")
    try:
        if (
            int(count.read_text()) < 16
            or run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", folder).returncode
        ):
            pytest.skip("no 16 huge pages of 2 MiB, or no hugetlbfs")
        try:
            with moved(unmounted, folder / "region"):
                use(unmounted)
                assert "hugetlbfs" in unmounted.run_ok("pkernfs", "info", unmounted.region)
                (unmounted.mnt / "f").unlink()
                (unmounted.mnt / "ram").unlink()
        finally:
            unmounted.run_ok("umount", folder)
    finally:
        count.write_text(before)


def test_mount_by_mount8(unmounted: Site) -> None:
    """`mount -t pkernfs`, where mount_helpers has put the helper in place."""
    if not any(os.path.exists(f"{folder}/mount.pkernfs") for folder in ("/sbin", "/usr/sbin")):
        pytest.skip("no /sbin/mount.pkernfs: mount_helpers/install makes it")
    options = f"log={unmounted.server_log},noatime"
    unmounted.run_ok("mount", "-t", "pkernfs", "-o", options, unmounted.region, unmounted.mnt)
    (unmounted.mnt / "f").touch()
    unmounted.run_ok("umount", unmounted.mnt)
    unmounted.wait_for_end()
