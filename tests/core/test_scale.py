"""Many files, large regions: what must not become slower with size."""

import itertools
import mmap
import stat
import time

import pytest

from pkernfs.format import BLOCK, GiB
from pkernfs.fs.check import Checker
from pkernfs.fs.filesystem import Filesystem, SetAttr
from pkernfs.fs.mkfs import mkfs
from pkernfs.region import Region
from tests.core.support import ME, ROOT, MiB, assert_sound, mkdir, mkfile, new_fs, open_fs

COUNT = 100_000
MAP_NORESERVE = 0x4000


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
    checker = Checker(fs.volume)
    assert checker.run() == []
    assert checker.files == COUNT + 1
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
    size = fs.volume.allocator.free_blocks * BLOCK
    begin = time.process_time()
    fs.setattr(ino, SetAttr(size=size))
    assert len(fs.extents(ino)) == 1
    fs.write(ino, size - MiB, b"x" * MiB)
    assert bytes(fs.read(ino, size - 1, 5)) == b"x"
    checker = Checker(fs.volume)
    assert checker.run() == []
    again = Filesystem.open(region)
    assert again.getattr(ino).size == size
    fs.unlink(ROOT, b"ram")
    assert fs.statfs() == space
    assert time.process_time() - begin < 20


def test_deep_directories() -> None:
    """Names are nested without a limit; nothing here recurses."""
    fs = new_fs(64)
    ino = int(ROOT)
    for _ in range(3000):
        ino = mkdir(fs, b"d", ino)
    mkfile(fs, b"f", b"x", ino)
    assert fs.resolve(b"d/" * 3000 + b"f")
    top = fs.lookup(ROOT, b"d")
    fs.rename(top, b"d", ROOT, b"e")
    assert_sound(fs)
