"""The host around a mount: what others mount, map and name there, and what it has not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.site import MiB, Site, run

#: Mounts a tmpfs without a source at its argument, as containers do: no command can.
WITHOUT_SOURCE = """\
import ctypes, sys
if ctypes.CDLL(None).mount(b"", sys.argv[1].encode(), b"tmpfs", 0, b"size=64k"): sys.exit("mount")
"""
#: A user maps a file and says so.
MAPS = """\
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    kept = mmap.mmap(file.fileno(), 4096)
print(flush=True)
sys.stdin.read()
"""


def answers(site: Site) -> None:
    """What looks at the host on its way."""
    for words in (["status"], ["info"], ["metrics"], ["iommu", "list"]):
        site.run_ok("pkernfs", *words, site.mnt)
    site.run_ok("pkernfs", "info", site.region)
    site.run_ok("fsck.pkernfs", "-n", site.region)


def test_a_mount_without_a_source_disturbs_nobody(unmounted: Site) -> None:
    other = unmounted.tmp / "other"
    other.mkdir()
    unmounted.run_ok(sys.executable, "-c", WITHOUT_SOURCE, other)
    try:
        unmounted.mount()
        answers(unmounted)
        unmounted.restart()
        answers(unmounted)
        unmounted.umount()
    finally:
        unmounted.run_ok("umount", other)


@contextmanager
def mapped(path: str) -> Iterator[None]:
    """Another process that maps a file of this name."""
    command = [sys.executable, "-c", MAPS, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            other.stdout.readline()
            yield
        finally:
            other.communicate()


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "a b", "\udcff\x1b[31m", "00000000 00:01 7 "])
def test_a_mapped_file_of_any_name_disturbs_nobody(site: Site, name: str) -> None:
    for file in ("ram", "other"):
        (site.mnt / file).touch()
        os.truncate(site.mnt / file, 4 * MiB)
        site.run_ok("pkernfs", "direct", site.mnt / file, "on")
    with mapped(str(site.tmp / name)):
        answers(site)
        os.truncate(site.mnt / "other", 0)
        (site.mnt / "ram").unlink()


def without_proc(words: list[str | Path]) -> tuple[int, str]:
    """A command where /proc is not mounted: its status, and what it says."""
    script = 'umount -l /proc && exec "$@"'
    path = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    result = run("unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *words, env=environment)
    return result.returncode, result.stdout + result.stderr


def test_without_proc_a_region_is_looked_at_all_the_same(unmounted: Site) -> None:
    region = unmounted.region
    made = unmounted.shm / "made"
    commands: list[list[str | Path]] = [
        ["fsck.pkernfs", "-n", region],
        ["fsck.pkernfs", "-y", region],
        ["pkernfs", "ls", "-lR", region],
        ["pkernfs", "info", region],
        ["pkernfs", "explain", region, "0"],
        ["pkernfs", "scrub", region],
        ["pkernfs", "iommu", "list", region],
        ["mkfs.pkernfs", "-q", "--size", "32M", made],
    ]
    for words in commands:
        status, said = without_proc(words)
        assert status == 0, said
    assert made.stat().st_size == 32 * MiB


def test_without_proc_what_needs_it_says_so(site: Site) -> None:
    commands: list[list[str | Path]] = [
        ["pkernfs", "info", site.mnt],
        ["pkernfs", "status", site.mnt],
        ["pkernfs", "upgrade", site.mnt],
        ["mount.pkernfs", site.region, site.tmp],
    ]
    for words in commands:
        status, said = without_proc(words)
        assert status in (1, 32), (words, said)
        assert said.count("\n") == 1
        assert "/proc is not mounted" in said


def test_any_name_is_printed(unmounted: Site) -> None:
    """Where standard output takes UTF-8 only, and where it takes ASCII only; nothing reaches the terminal as it is."""
    region = unmounted.shm / os.fsdecode(b"r\xe9\x1b[31m")
    mountpoint = unmounted.tmp / os.fsdecode(b"m\xe9\x1b[31m")
    mountpoint.mkdir()
    for encoding in ("utf-8:strict", "ascii:strict"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}

        def tried(*words: str | os.PathLike[str], raw: bool = False, env: dict[str, str] = environment) -> None:
            result = run(*words, env=env)
            assert result.returncode == 0, result
            said = result.stdout + result.stderr
            assert "Traceback" not in said
            assert raw or "\x1b" not in said, said

        tried("mkfs.pkernfs", "--size", "32M", "-f", region)
        tried("fsck.pkernfs", "-n", "-v", region)
        tried("mount.pkernfs", "-v", region, mountpoint)
        try:
            (mountpoint / "f\x1b").touch()
            os.truncate(mountpoint / "f\x1b", 2 * MiB)
            for verb in ("status", "info", "scrub", "metrics", "quota"):
                tried("pkernfs", verb, mountpoint)
            tried("pkernfs", "info", mountpoint / "f\x1b")
            tried("pkernfs", "upgrade", "--probation", "0.1", mountpoint)
            tried("pkernfs", "qemu-args", mountpoint / "f\x1b", raw=True)
            tried("pkernfs", "ls", "-l", region)
        finally:
            unmounted.run_ok("umount", mountpoint)
        tried("pkernfs", "info", region)
        tried("fsck.pkernfs", "-y", region)
