"""One mount in many places: moved, bound, covered, in other mount namespaces, mounted again on another directory."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.site import DEAD, Site, errno_of, find_program, run, serving, wait_for

IN_USE = re.compile("is in use: what is open there fails|the mount is left there|it goes on")


@pytest.fixture
def places(unmounted: Site) -> Iterator[Site]:
    """A site in a private tmpfs, where mounts can be moved; all that is left below it is taken away at the end."""
    top = unmounted.tmp / "top"
    top.mkdir()
    unmounted.run_ok("mount", "-t", "tmpfs", "-o", "size=1m", "top", top)
    unmounted.run_ok("mount", "--make-private", top)
    mountpoint, unmounted.mountpoint = unmounted.mountpoint, top / "a"
    for name in ("a", "b", "c"):
        (top / name).mkdir()
    unmounted.mount()
    try:
        yield unmounted
    finally:
        if unmounted.servers():
            os.kill(unmounted.keeper(), signal.SIGTERM)
        unmounted.wait_for_end()
        unmounted.run_ok("umount", "-R", "-l", top)
        unmounted.mountpoint = mountpoint


def precious(path: Path) -> Path:
    """Somebody's tmpfs, with a file."""
    done = run("mount", "-t", "tmpfs", "-o", "size=64k", "precious", path)
    assert done.returncode == 0, done
    (path / "file").touch()
    return path / "file"


def terminate(site: Site, keeper: int) -> None:
    """SIGTERM, and the end."""
    os.kill(keeper, signal.SIGTERM)
    site.wait_for_end()


def mounted(path: Path) -> bool:
    """Whether something is mounted there."""
    return os.path.ismount(path)


# -- SIGTERM takes what is its own ------------------------------------------------------------------------------------


def test_after_a_move_sigterm_unmounts_where_it_is(places: Site) -> None:
    a, b = places.mnt, places.mnt.parent / "b"
    keeper = places.status()["keeper"]
    places.run_ok("mount", "--move", a, b)
    (b / "f").write_bytes(b"content")
    kept = precious(a)
    places.mountpoint = b
    status = places.status()
    assert (status["keeper"], status["mountpoint"], status["mountpoints"]) == (keeper, str(b), [str(b)])
    terminate(places, keeper)
    assert kept.exists()
    assert not mounted(b)
    assert places.run_ok("pkernfs", "cat", f"{places.region}:/f") == "content"


def test_after_a_move_what_is_mapped_is_written_at_sigterm(places: Site) -> None:
    """In use: its end is told, what was stored in a mapped file is there."""
    places.expected = IN_USE
    a, b = places.mnt, places.mnt.parent / "b"
    keeper = places.status()["keeper"]
    places.run_ok("mount", "--move", a, b)
    with (b / "f").open("w+b") as file:
        file.truncate(65536)
        kept = mmap.mmap(file.fileno(), 65536)
    kept[:6] = b"stored"
    terminate(places, keeper)
    assert not mounted(b)
    del kept
    assert places.run_ok("pkernfs", "cat", f"{places.region}:/f").startswith("stored")


def test_after_a_rename_of_the_parent(places: Site) -> None:
    top = places.mnt.parent
    keeper = places.status()["keeper"]
    (top / "b" / "m").mkdir()
    places.run_ok("mount", "--move", top / "a", top / "b" / "m")
    (top / "b").rename(top / "d")
    (top / "b" / "m").mkdir(parents=True)
    kept = precious(top / "b" / "m")
    terminate(places, keeper)
    assert kept.exists()
    assert not mounted(top / "d" / "m")


@pytest.mark.parametrize("below", [False, True], ids=["on-it", "in-it"])
def test_what_others_have_mounted_on_it_stays(places: Site, below: bool) -> None:
    """It is in use then: what is stored is there, the servers end, and their mount stays in its place."""
    places.expected = IN_USE
    keeper = places.status()["keeper"]
    (places.mnt / "d").mkdir()
    with (places.mnt / "f").open("w+b") as file:
        file.truncate(65536)
        stored = mmap.mmap(file.fileno(), 65536)
    stored[:6] = b"stored"
    kept = precious(places.mnt / "d" if below else places.mnt)
    terminate(places, keeper)
    assert kept.exists()
    del stored
    assert places.run_ok("pkernfs", "cat", f"{places.region}:/f").startswith("stored")
    line = run("mount.pkernfs", places.region, places.mnt).stderr if below else ""
    assert not below or "precious" in line or "another mount" in line
    assert kept.exists()
    places.run_ok("umount", kept.parent)
    places.mount()  # the dead one is taken away


def test_hidden_below_another_mount(places: Site) -> None:
    """It shows nowhere: it ends as one in use does, and what hides it stays."""
    places.expected = IN_USE
    top = places.mnt.parent
    keeper = places.status()["keeper"]
    (top / "b" / "m").mkdir()
    places.run_ok("mount", "--move", places.mnt, top / "b" / "m")
    with (top / "b" / "m" / "f").open("w+b") as file:
        file.truncate(65536)
        stored = mmap.mmap(file.fileno(), 65536)
    stored[:6] = b"stored"
    kept = precious(top / "b")
    (top / "b" / "m").mkdir()
    assert run("pkernfs", "status", top / "b" / "m").returncode == 2
    assert json.loads(places.run_ok("pkernfs", "status", "--json", places.region))["keeper"] == keeper
    terminate(places, keeper)
    assert kept.exists()
    del stored
    assert places.run_ok("pkernfs", "cat", f"{places.region}:/f").startswith("stored")
    places.run_ok("umount", top / "b")
    places.run_ok("umount", top / "b" / "m")


def test_bind_mounts_are_its_own(places: Site) -> None:
    """The mount lives as long as one of them, and all of them go at SIGTERM."""
    a, b, c = (places.mnt.parent / name for name in "abc")
    keeper = places.status()["keeper"]
    (a / "d").mkdir()
    places.run_ok("mount", "--bind", a, b)
    places.run_ok("mount", "--bind", a / "d", c)
    places.run_ok("umount", a)
    for path in (b, c, places.region):
        assert json.loads(places.run_ok("pkernfs", "status", "--json", path))["keeper"] == keeper
    places.mountpoint = b
    assert places.status()["mountpoint"] == str(b)
    assert sorted(places.status()["mountpoints"]) == [str(b), str(c)]
    places.expected = re.compile("takes over")
    os.kill(places.worker(), signal.SIGKILL)
    (c / "f").write_bytes(b"content")
    assert (b / "d" / "f").read_bytes() == b"content"
    terminate(places, keeper)
    assert not mounted(b)
    assert not mounted(c)


def test_a_busy_bind_mount_keeps_all(places: Site) -> None:
    """As before: the mount ends when told so, and each of its places goes."""
    places.expected = IN_USE
    a, b = places.mnt, places.mnt.parent / "b"
    keeper = places.status()["keeper"]
    places.run_ok("mount", "--bind", a, b)
    fd = os.open(b / "f", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"content")
    terminate(places, keeper)
    for call in (lambda: os.write(fd, b"more"), lambda: os.close(fd)):
        assert errno_of(call) in DEAD
    assert not mounted(a)
    assert not mounted(b)
    assert places.run_ok("pkernfs", "cat", f"{places.region}:/f") == "content"


def test_the_metrics_follow_a_move(places: Site) -> None:
    """Those of a region go on wherever it is mounted, and the mount asks for those."""
    a, b = places.mnt, places.mnt.parent / "b"
    places.umount()
    places.mount(f"metrics={places.tmp}/mount.prom")
    wait_for(lambda: str(places.region) in exporter(places.keeper()), "the process that gives the metrics")
    target = places.tmp / "region.prom"
    command = [find_program("pkernfs"), "metrics", "--file", str(target), "--every", "0.02", str(places.region)]
    with subprocess.Popen(command) as process:
        try:
            wait_for(target.exists, "metrics")
            places.run_ok("mount", "--move", a, b)
            places.mountpoint = b
            wait_for(lambda: f'pkernfs_up{{mountpoint="{b}"}} 1.0' in target.read_text(), "those of the new place")
            assert process.poll() is None
        finally:
            process.terminate()


def exporter(keeper: int) -> str:
    """The command line of a keeper's process that gives the metrics; "" while there is none."""
    for child in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
        line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if " metrics " in line:
            return line
    return ""


# -- mounting what is served already ----------------------------------------------------------------------------------


@contextmanager
def namespace(name: str = "guest") -> Iterator[subprocess.Popen[bytes]]:
    """A guest in a mount namespace of its own, with a copy of what is mounted now; lines that it reads are commands."""
    shell = f'exec -a qemu-system-x86_64 {sys.executable} -c "$CODE" -name guest={name},debug-threads=on'
    code = "import os, sys\nprint('up', flush=True)\nfor line in sys.stdin: print(os.system(line), flush=True)"
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "bash", "-c", shell],
        env={**os.environ, "CODE": code},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as guest:
        try:
            assert guest.stdout
            assert guest.stdout.readline() == b"up\n"
            yield guest
        finally:
            guest.communicate()


def tell(guest: subprocess.Popen[bytes], command: str) -> int:
    """The status of a shell command in a guest's mount namespace."""
    assert guest.stdin
    assert guest.stdout
    guest.stdin.write(command.encode() + b"\n")
    guest.stdin.flush()
    return int(guest.stdout.readline())


def test_a_second_directory(site: Site) -> None:
    """As with a disk's filesystem: the same mount, with flags of its own."""
    other = site.tmp / "other"
    other.mkdir()
    keeper = site.keeper()
    result = run("mount.pkernfs", "-o", f"ro,nosuid,log={site.server_log}", site.region, other)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (site.mnt / "f").write_bytes(b"content")
    assert (other / "f").read_bytes() == b"content"
    assert os.stat(other).st_dev == os.stat(site.mnt).st_dev
    assert errno_of((other / "g").touch) == errno.EROFS
    assert os.statvfs(other).f_flag & os.ST_NOSUID
    assert not os.statvfs(site.mnt).f_flag & (os.ST_NOSUID | os.ST_RDONLY)
    assert site.status()["mountpoints"] == [str(site.mnt), str(other)]
    columns = site.run_ok("df", "--output=source,fstype", other).splitlines()[1].split()
    assert columns == [str(site.region), "fuse.pkernfs"]
    site.run_ok("umount", site.mnt)
    assert site.keeper() == keeper
    assert (other / "f").read_bytes() == b"content"
    site.mount()
    assert (site.mnt / "f").read_bytes() == b"content"
    site.run_ok("umount", other)


def test_a_second_directory_says_what_is_another(site: Site) -> None:
    other = site.tmp / "other"
    other.mkdir()
    result = run("mount.pkernfs", "-o", "hang=7,writeback,atime", site.region, other)
    assert result.returncode == 0
    assert "hang=30, not 7" in result.line
    assert "writeback=False, not True" in result.line
    site.run_ok("umount", other)
    assert (run("mount.pkernfs", site.region, site.mnt)).returncode == 32


def test_what_is_served_for_reading_is_not_mounted_for_writing(unmounted: Site) -> None:
    other = unmounted.tmp / "other"
    other.mkdir()
    unmounted.mount("ro")
    result = run("mount.pkernfs", unmounted.region, other)
    assert result.returncode == 32
    assert "for reading only" in result.line
    assert run("mount.pkernfs", "-r", unmounted.region, other).returncode == 0
    unmounted.run_ok("umount", other)


def test_a_mount_that_lives_in_another_namespace_only(site: Site) -> None:
    """It is found by its region, its holder is named, it is upgraded, and comes back on any directory."""
    (site.mnt / "f").write_bytes(b"content")
    keeper = site.keeper()
    with namespace("g\x1b1") as guest:
        site.run_ok("umount", site.mnt)
        name = rf"process {guest.pid}, qemu-system-x86 -name g\x1b1"
        assert tell(guest, f"test -e {site.mnt}/f") == 0
        status = json.loads(site.run_ok("pkernfs", "status", "--json", site.region))
        assert (status["keeper"], status["mountpoints"], status["elsewhere"]) == (keeper, [], [name])
        assert f"elsewhere  in the mount namespace of {name}" in site.run_ok("pkernfs", "status", site.region)
        assert f"still mounted in the mount namespace of {name}" in site.run_ok("pkernfs", "info", site.region)
        assert json.loads(site.run_ok("pkernfs", "info", "--json", site.region))["mountpoint"] is None
        site.run_ok("pkernfs", "scrub", site.region)
        site.run_ok("pkernfs", "iommu", "list", site.region)
        site.run_ok("pkernfs", "upgrade", "--probation", "0.1", site.region)
        for words in (["mkfs.pkernfs", "-f"], ["fsck.pkernfs", "-y"]):
            refused = run(*words, site.region)
            assert refused.returncode in (1, 8)
            assert f"still mounted in the mount namespace of {name}" in refused.line
            assert "end it" not in refused.line
            assert "kill" not in refused.line
        site.run_ok("pkernfs", "upgrade", "--keeper", site.region)
        result = site.try_mount("nodev")
        assert result.returncode == 0
        assert f"still mounted in the mount namespace of {name}" in result.line
        assert (site.mnt / "f").read_bytes() == b"content"
        assert os.statvfs(site.mnt).f_flag & os.ST_NODEV
        assert tell(guest, f"echo more >>{site.mnt}/f") == 0
        assert (site.mnt / "f").read_bytes() == b"contentmore\n"
    assert site.status()["elsewhere"] == []
    site.umount()
    site.wait_for_end()


def test_sigterm_does_not_end_what_others_have(site: Site) -> None:
    """The keeper unmounts in its own mount namespace, says who has it still, and serves that until it ends."""
    site.expected = IN_USE
    (site.mnt / "f").write_bytes(b"content")
    keeper = site.keeper()
    with namespace() as guest:
        os.kill(keeper, signal.SIGTERM)
        wait_for(lambda: not mounted(site.mnt), "the end of the mount here")
        said = f"still mounted in the mount namespace of process {guest.pid}, qemu-system-x86 -name guest: it goes on"
        wait_for(lambda: said in site.server_log.read_text(), "what the keeper says")
        assert tell(guest, f"grep -q content {site.mnt}/f") == 0
        assert site.keeper() == keeper
    site.wait_for_end()


def test_what_was_unmounted_lazily_comes_back(site: Site) -> None:
    """It is in no mount namespace any more, but in use."""
    with (site.mnt / "f").open("wb", buffering=0) as file:
        site.run_ok("umount", "-l", site.mnt)
        file.write(b"one ")
        assert "nowhere, but in use" in site.run_ok("pkernfs", "info", site.region)
        keeper = site.keeper()
        site.mount()
        assert site.keeper() == keeper
        file.write(b"two")
        assert (site.mnt / "f").read_bytes() == b"one two"


def test_a_second_directory_while_the_first_ends(unmounted: Site) -> None:
    """Mounted again at once after umount, on another directory: served by the old or by a new keeper, but mounted."""
    other = unmounted.tmp / "other"
    other.mkdir()
    for number in range(6):
        unmounted.mount()
        unmounted.run_ok("umount", unmounted.mnt)
        unmounted.run_ok("mount.pkernfs", unmounted.region, other, "-o", f"log={unmounted.server_log}")
        (other / f"f{number}").touch()
        unmounted.run_ok("umount", other)
    unmounted.wait_for_end()


def test_a_path_that_only_looks_like_one_in_the_mount(site: Site) -> None:
    """Another filesystem on the directory of the mount: what is below belongs to that."""
    (site.mnt / "f").touch()
    kept = precious(site.mnt)
    try:
        for path in (kept, site.mnt):
            result = run("pkernfs", "status", path)
            assert result.returncode == 2
            assert "expected a path in a pkernfs mount" in result.line
        assert json.loads(site.run_ok("pkernfs", "status", "--json", site.region))["mountpoints"] == [str(site.mnt)]
    finally:
        site.run_ok("umount", site.mnt)
    assert (site.mnt / "f").exists()


def test_a_renamed_region_is_found(site: Site) -> None:
    """And one of the name that it had is not taken for it."""
    renamed = site.region.with_name("renamed")
    site.region.rename(renamed)
    try:
        assert json.loads(site.run_ok("pkernfs", "status", "--json", renamed))["keeper"] in serving(renamed)
        site.run_ok("mkfs.pkernfs", "-q", "--size", "32M", site.region)
        assert run("pkernfs", "status", site.region).returncode == 2
        site.region.unlink()
    finally:
        renamed.rename(site.region)
