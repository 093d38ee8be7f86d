"""What destroys a region's content refuses, by name, while a process maps it: a guest on the direct map, say."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.core.support import MiB, digest

#: Maps a file, shared ("s") or privately ("p"), says so, and stays until its input ends.
MAPPER = """
import mmap, sys
how, path = sys.argv[1:3]
file = open(path, "r+b")
flags = mmap.MAP_SHARED if how == "s" else mmap.MAP_PRIVATE
memory = mmap.mmap(file.fileno(), 2 << 20, flags=flags, offset=4 << 20)
file.close()
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def region(tmp_path: Path) -> Path:
    """A region in a file."""
    path = tmp_path / "region"
    assert run("mkfs.pkernfs", "--size", "16M", path).returncode == 0
    return path


def run(program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end."""
    command = [Path(sysconfig.get_path("scripts")) / program, *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@contextmanager
def mapped(path: Path, how: str = "s", *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that maps a part of the region, as QEMU does with a guest's RAM."""
    command = ["qemu-system-x86_64", "-c", MAPPER, how, str(path), *words]  # by this name others see it
    with subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield process
        finally:
            process.kill()


#: What makes a region anew, or changes it; and its exit status when that is refused.
DESTROYERS: dict[str, tuple[list[str], int]] = {
    "mkfs": (["mkfs.pkernfs"], 1),
    "mkfs-force": (["mkfs.pkernfs", "--force"], 1),
    "mkfs-shorter": (["mkfs.pkernfs", "-f", "--size", "8M"], 1),
    "mkfs-longer": (["mkfs.pkernfs", "-f", "--size", "32M"], 1),
    "fsck-yes": (["fsck.pkernfs", "-y"], 8),
    "fsck-at-boot": (["fsck.pkernfs", "-p"], 8),
}


@pytest.mark.parametrize("how", ["s", "p"])
@pytest.mark.parametrize("name", DESTROYERS)
def test_a_mapped_region_is_not_destroyed(region: Path, name: str, how: str) -> None:
    command, status = DESTROYERS[name]
    os.link(region, region.with_name("link"))
    region.with_name("symlink").symlink_to("link")
    before = digest(str(region))
    with mapped(region.with_name("link"), how, "-name", "g1") as process:
        for path in (region, region.with_name("symlink")):
            done = run(*command, path)
            assert done.returncode == status, done
            assert f"process {process.pid}" in done.stderr
            assert "qemu-system-x86 -name g1" in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert digest(str(region)) == before
        assert run("fsck.pkernfs", "-n", region).returncode == 0
    assert run(*command, region).returncode == (1 if name == "mkfs" else 0), "nobody maps it any more"


@pytest.mark.parametrize("name", ["mkfs-force", "fsck-yes"])
def test_only_the_long_option_goes_past(region: Path, name: str) -> None:
    with mapped(region):
        done = run(*DESTROYERS[name][0], "--even-if-mapped", region)
        assert done.returncode == 0, done
        assert "mapped" not in done.stderr


def test_what_a_process_had_and_others_have(region: Path, tmp_path: Path) -> None:
    """Neither who has the file open only, nor who maps a copy of it, is in the way."""
    copy = tmp_path / "copy"
    copy.write_bytes(region.read_bytes())
    with region.open("rb"), mapped(copy):
        assert run("mkfs.pkernfs", "-f", region).returncode == 0


def test_a_file_of_zeros_that_is_mapped(tmp_path: Path) -> None:
    """It is no region yet, and is not overwritten without a word either."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 16 * MiB)
    with mapped(path):
        done = run("mkfs.pkernfs", path)
        assert (done.returncode, "mapped by process" in done.stderr) == (1, True), done
    assert not any(path.read_bytes())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not look")
def test_what_could_not_be_seen_is_said(region: Path, tmp_path: Path) -> None:
    """Another user sees no maps of root's processes: the command says so, and does what it was told."""
    tmp_path.chmod(0o755)
    os.chown(region, 1000, 1000)
    code = (
        "import os, sys; os.setgroups([]); os.setgid(1000); os.setuid(1000);"
        "from pkernfs.region.unmapped import check_unmapped;"
        "print(check_unmapped(int(sys.argv[1]), 'REGION'))"
    )
    with region.open("r+b") as file:
        command = [sys.executable, "-c", code, str(file.fileno())]
        done = subprocess.run(command, pass_fds=[file.fileno()], capture_output=True, text=True, check=True)
    assert "processes of other users could not be looked at" in done.stdout


def test_the_process_itself_is_not_in_its_way(region: Path) -> None:
    from pkernfs.region import check_unmapped

    with region.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        check_unmapped(file.fileno(), str(region))


ROOT_MODES: dict[str, tuple[list[str], int]] = {
    "default": ([], 0o700),
    "for-libvirt": (["--mode", "0711"], 0o711),
    "for-all": (["--mode", "1777"], 0o1777),
}


@pytest.mark.parametrize("name", ROOT_MODES)
def test_the_root_directory_is_for_its_owner(tmp_path: Path, name: str) -> None:
    import json

    words, mode = ROOT_MODES[name]
    path = tmp_path / "region"
    old = os.umask(0)
    try:
        assert run("mkfs.pkernfs", "--size", "16M", *words, path).returncode == 0
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o7777 == 0o600
    info = run("pkernfs", "ls", "--json", "-R", path)
    assert info.returncode == 0, info
    modes = {row["name"]: row["mode"] & 0o7777 for row in json.loads(info.stdout)}
    assert modes["iommu"] == mode & 0o755
    assert modes["root-pgtables"] == 0o600
    from pkernfs.format import ROOT_INO
    from pkernfs.iommu.guard import open_filesystem
    from pkernfs.region import open_region

    with open_region(str(path), readonly=True) as region:
        root = open_filesystem(region).getattr(ROOT_INO)
        assert (root.mode & 0o7777, root.uid, root.gid) == (mode, os.getuid(), os.getgid())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_region_of_a_tenant(tmp_path: Path) -> None:
    """The file and the root directory are the tenant's; of a file that is there only the directory."""
    from pkernfs.format import ROOT_INO
    from pkernfs.iommu.guard import open_filesystem
    from pkernfs.region import open_region

    path = tmp_path / "region"
    for owner, group in ((1234, 4321), (0, 5)):
        words = ["--owner", str(owner), "--group", str(group)]
        done = run("mkfs.pkernfs", "-f", "--size", "16M", *words, path)
        assert done.returncode == 0, done
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 4321, 0o600)
        with open_region(str(path), readonly=True) as region:
            root = open_filesystem(region).getattr(ROOT_INO)
            assert (root.uid, root.gid) == (owner, group)


def test_owners_that_are_none(tmp_path: Path) -> None:
    for words in (["--owner", "no-such-user"], ["--group", "-1"], ["--mode", "0800"], ["--owner", "4294967295"]):
        done = run("mkfs.pkernfs", "--size", "16M", *words, tmp_path / "region")
        assert done.returncode == 2, done
        assert not (tmp_path / "region").exists()
