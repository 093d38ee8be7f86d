"""Many files, large regions: what must not become slower with size."""

import itertools
import mmap
import os
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from pkernfs.format import BLOCK, PAGE, GiB
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import run_check
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import Region, open_region
from tests.core.faults import drop_name, flip, inode_of, leak_blocks
from tests.core.support import ME, ROOT, MiB, assert_sound, mkdir, mkfile, new_fs, open_fs, patch_inode, sparse_file

COUNT = 100_000
MAP_NORESERVE = 0x4000
CHECKOUT = Path(__file__).parents[2]


class SparseRegion(Region):
    """Memory that costs nothing before it is used, and is zero."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | MAP_NORESERVE)
        super().__init__(memoryview(self.map))

    def discard(self, offset: int, length: int) -> None:
        self.map.madvise(mmap.MADV_REMOVE, offset, length)

    reserve = discard


@pytest.mark.timeout(170)
def test_a_hundred_thousand_files_in_one_directory() -> None:
    fs = new_fs(256)
    space = fs.statfs()
    d = mkdir(fs, b"d")
    times = [time.process_time()]
    for n in range(COUNT):
        fs.create(d, b"file%d" % n, stat.S_IFREG | 0o644, ME)
        if n % (COUNT // 10) == COUNT // 10 - 1:
            times.append(time.process_time())
    steps = [b - a for a, b in itertools.pairwise(times)]
    assert steps[-1] < 3 * steps[0], steps
    assert fs.getattr(d).size == COUNT
    begin = time.process_time()
    found = run_check(fs.volume)
    assert found.findings.all == []
    assert found.reached.files == COUNT + 1
    assert time.process_time() - begin < 10 * steps[0], "a check is not slower than ten times 10,000 creates"
    assert fs.lookup(d, b"file77777")
    entries = list(fs.readdir(d))
    assert len({entry.name for entry in entries}) == COUNT
    times = [time.process_time()]
    for n in range(COUNT):
        fs.unlink(d, b"file%d" % n)
        if n % (COUNT // 10) == COUNT // 10 - 1:
            times.append(time.process_time())
    steps = [b - a for a, b in itertools.pairwise(times)]
    assert max(steps) < 3 * min(steps), steps
    fs.rmdir(ROOT, b"d")
    assert fs.statfs() == space
    assert_sound(fs)


def test_a_region_of_a_tebibyte() -> None:
    """Sparse: made, filled with one file, checked, emptied, in no time."""
    try:
        region = SparseRegion(1024 * GiB)
    except OSError as error:
        pytest.skip(f"the host gives no address space of 1 TiB: {error}")
    mkfs(region)
    fs = open_fs(region)
    space = fs.statfs()
    ino = mkfile(fs, b"ram")
    size = fs.volume.space.free_blocks * BLOCK
    begin = time.process_time()
    fs.setattr(ino, SetAttr(size=size))
    assert len(fs.content.extents(ino)) == 1
    fs.write(ino, size - MiB, b"x" * MiB)
    assert bytes(fs.read(ino, size - 1, 5)) == b"x"
    assert run_check(fs.volume).findings.all == []
    again = open_filesystem(region)
    assert again.getattr(ino).size == size
    fs.unlink(ROOT, b"ram")
    assert fs.statfs() == space
    assert time.process_time() - begin < 20


def many_files(fs: Filesystem, count: int) -> None:
    """1000 files to a directory, each tenth with content; and one in pieces, with holes."""
    for n in range(count):
        if n % 1000 == 0:
            folder = mkdir(fs, b"d%d" % (n // 1000))
        ino = fs.create(folder, b"file%d" % n, stat.S_IFREG | 0o644, ME)
        if n % 10 == 0:
            fs.write(ino, 0, b"x" * 100)
    ram = mkfile(fs, b"ram")
    for n in range(count // 100):
        fs.write(ram, n * 8 * MiB, b"x")


def test_memory_of_a_check() -> None:
    """What a check keeps of a file is a few bytes."""
    peaks = []
    counts = (2000, 12_000)
    for count in counts:
        fs = new_fs(64)
        many_files(fs, count)
        volume = Volume(fs.region)
        tracemalloc.start()
        assert run_check(volume).findings.all == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 32, peaks


@pytest.mark.slow
def test_fsck_of_64_gib_and_a_hundred_thousand_files(shm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what the commands take; how long may be as it is."""
    path = str(shm / "region")
    sparse_file(path, 64 * GiB)
    with open_region(path) as region:
        mkfs(region)
        many_files(open_fs(region), COUNT)
    figures = [("clean, -n", *fsck(path, "-n", 0))]
    with open_region(path) as region:
        fs = open_fs(region)
        flip(fs, fs.resolve(b"d3/file3007") * 256 + 50)
        flip(fs, inode_of(fs, b"d11").root * PAGE + 99)
        flip(fs, fs.resolve(b"d50/file50500") * 256 // BLOCK * BLOCK + 100)
        drop_name(fs, b"d5")
        leak_blocks(fs)
        for n in range(20, 40):
            patch_inode(fs, fs.resolve(b"d%d" % n), nlink=9)
    figures += [("damaged, -n", *fsck(path, "-n", 4)), ("damaged, -y", *fsck(path, "-y", 1))]
    fsck(path, "-n", 0)
    with capsys.disabled():
        for what, seconds, cpu, total, own in figures:
            print(f"\nfsck.pkernfs, 64 GiB, {COUNT:,} files, {what}: {seconds:.1f} s, {cpu:.1f} s of CPU, ", end="")
            print(f"peak {total // 1024} MiB, of them {own // 1024} MiB not of the region itself", end="")
    allocated = os.stat(path).st_blocks * 512 // 1024
    assert all(total < allocated + 100 * 1024 for *_, total, _ in figures), "less than 1 KiB a file"


def fsck(path: str, option: str, status: int) -> tuple[float, float, int, int]:
    """Run the command in a process of its own: seconds, of CPU, peak of its memory, of that but the region's (KiB)."""
    script = """
import sys
from pkernfs.cli import main_fsck
status = main_fsck()
values = dict(line.split(":") for line in open("/proc/self/status"))
print(*(values[name].split()[0] for name in ("VmHWM", "RssAnon", "RssFile")), file=sys.stderr)
raise SystemExit(status)
"""
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-c", script, option, path], capture_output=True, text=True, check=False, cwd=CHECKOUT
    )
    seconds, after = time.perf_counter() - begin, os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    assert done.returncode == status, done
    total, anonymous, files = map(int, done.stderr.split())
    return seconds, cpu, total, anonymous + files


def test_deep_directories() -> None:
    """Names are nested without a limit; nothing here recurses."""
    fs = new_fs(64)
    ino = ROOT
    for _ in range(3000):
        ino = mkdir(fs, b"d", ino)
    mkfile(fs, b"f", b"x", ino)
    assert fs.resolve(b"d/" * 3000 + b"f")
    top = fs.lookup(ROOT, b"d")
    fs.rename(top, b"d", ROOT, b"e")
    assert_sound(fs)
