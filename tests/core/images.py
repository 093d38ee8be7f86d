"""A region with files of all kinds, and cheap copies of its image."""

import itertools
import mmap
import os
import random
import stat

from pkernfs.format import PAGE
from pkernfs.fs.filesystem import Filesystem
from pkernfs.region import Region, Store
from tests.core.support import ME, ROOT, MiB, mkdir, mkfile


def cast(fs: Filesystem) -> None:
    """The files that the operations below work on."""
    d = mkdir(fs, b"d")
    mkfile(fs, b"f", b"small file", d)
    fs.link(fs.lookup(d, b"f"), ROOT, b"g")
    mkdir(fs, b"empty")
    mkfile(fs, b"inner", b"x", mkdir(fs, b"e", d))
    mkfile(fs, b"big", bytes(range(1, 251)) * 12_000)
    sparse = mkfile(fs, b"sparse")
    for n in range(80):
        fs.write(sparse, n * 2 * PAGE, b"%d" % n)
    fs.create(ROOT, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 500)
    for name, size in ((b"user.small", 100), (b"user.large", 9000)):
        fs.setxattr(d, name, b"v" * size)
    # Memory that was used before and is free now: what a file must never show.
    mkfile(fs, b"junk", b"\xee" * (MiB - PAGE))
    fs.unlink(ROOT, b"junk")


class CowRegion(Region):
    """A private view of an image in a memory file: what recovery writes is gone afterwards."""

    def __init__(self, fd: int) -> None:
        self.map = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        super().__init__(memoryview(self.map))

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length)


def torn(store: Store, how: int) -> list[Store]:
    """Some of the 8-byte words of a store; ``how`` counts the ways."""
    if store.word or len(store.data) <= 8:
        return []
    start = -store.offset % 8
    edges = [0, *range(start or 8, len(store.data), 8), len(store.data)]
    words = list(itertools.pairwise(edges))
    rng = random.Random(how)
    if len(words) > 4096:
        # Long stores of content: a few pieces are enough.
        words = [(0, 8), (8, len(store.data) // 2)] if how % 2 else [(len(store.data) // 2, len(store.data))]
    elif how == 0:
        words = words[: max(1, len(words) // 2)]
    elif how == 1:
        words = words[-max(1, len(words) // 2) :]
    else:
        words = [word for word in words if rng.random() < 0.5]
    return [Store(store.offset + low, store.data[low:high], True) for low, high in words]
