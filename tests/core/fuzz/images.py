"""Small sound regions, one for each kind of content, as images in memory files."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable

from pkernfs.format import JOURNAL_HEADER, PAGE
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.region import RecordingRegion, Region
from tests.core.faults import quotas
from tests.core.faults_iommu import domain
from tests.core.images import CowRegion
from tests.core.support import ME, ROOT, SEED, UUID, MiB, full, map_file, mkdir, mkdomain, mkfile, open_fs

SIZE = 12 * MiB


def one_of_each(fs: Filesystem) -> None:
    """All types, inline and outside."""
    d = mkdir(fs, b"d")
    mkfile(fs, b"f", b"small file", d)
    fs.link(fs.lookup(d, b"f"), ROOT, b"g")
    mkdir(fs, b"empty")
    mkfile(fs, b"inner", b"x", mkdir(fs, b"e", d))
    mkfile(fs, b"big", bytes(range(1, 251)) * 10_000)
    fs.create(ROOT, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 500)
    fs.create(ROOT, b"short", stat.S_IFLNK | 0o777, ME, target=b"d/f")
    fs.create(ROOT, b"fifo", stat.S_IFIFO | 0o600, ME)
    fs.create(ROOT, b"device", stat.S_IFCHR | 0o600, ME, rdev=5)
    fs.setxattr(d, b"user.small", b"v" * 100)


def deep(fs: Filesystem) -> None:
    """Directories below one another, and one with so many names that its tree has inner nodes."""
    place = ROOT
    for n in range(12):
        place = mkdir(fs, b"d%d" % n, place)
        mkfile(fs, b"f", b"%d" % n, place)
    names = mkdir(fs, b"names")
    ino = mkfile(fs, b"file", b"file")
    for n in range(300):
        fs.link(ino, names, b"a rather long name of a file, number %d" % n)


def extents(fs: Filesystem) -> None:
    """Files with extents in their inodes, and in trees of one and of two levels."""
    for name, count in ((b"few", 4), (b"some", 20), (b"many", 330)):
        ino = mkfile(fs, name)
        for n in range(count):
            fs.write(ino, n * 2 * PAGE, b"%d" % n)
    mkfile(fs, b"whole", b"w" * (2 * MiB))


def attributes(fs: Filesystem) -> None:
    """Values inside and outside of their trees, which have one and two levels."""
    f, d = mkfile(fs, b"f", b"f"), mkdir(fs, b"d")
    for n in range(20):
        fs.setxattr(d, b"user.%d" % n, b"v" * 400)
    for ino in (f, d):
        for n, size in enumerate((0, 1, 513, 9000, 65536)):
            fs.setxattr(ino, b"user.value%d" % n, bytes([n + 1]) * size)
    for n in range(3):
        fs.holds.hold(mkfile(fs, b"held%d" % n, b"RAM"), "a guest is saved")


def orphans(fs: Filesystem) -> None:
    """Removed while they were open, and a file that was cut and not yet freed."""
    one_of_each(fs)
    for n in range(3):
        ino = mkfile(fs, b"gone%d" % n, b"gone" * 3000)
        fs.setxattr(ino, b"user.large", b"v" * 5000)
        fs.lookups.add(ino)
        fs.unlink(ROOT, b"gone%d" % n)
    fs.lookups.add(mkdir(fs, b"gone"))
    fs.rmdir(ROOT, b"gone")
    cut = mkfile(fs, b"cut")
    for n in range(80):
        fs.write(cut, n * 2 * PAGE, b"%d" % n)
    fs.reclaimer.in_background = True
    fs.setattr(cut, SetAttr(size=PAGE))
    assert fs.reclaimer.pending


def nearly_full(fs: Filesystem) -> None:
    """One page is free."""
    one_of_each(fs)
    full(fs, leave=1)


def quotas_in_quotas(fs: Filesystem) -> None:
    """Directories with quotas."""
    one_of_each(fs)
    quotas(fs)


def domains(fs: Filesystem) -> None:
    """Page tables with records of all kinds, and files that are mapped, one without a name."""
    ino = domain(fs)
    for n in range(150):
        map_file(fs, ino, 0x200 + n, fs.resolve(b"ram"), n % 5)
    map_file(fs, mkdomain(fs, b"small", 0), 0, mkfile(fs, b"gone", b"gone"))
    fs.unlink(ROOT, b"gone")


def nothing(fs: Filesystem) -> None:
    """As mkfs makes it."""


CONTENT: dict[str, Callable[[Filesystem], None]] = {
    "one-of-each": one_of_each,
    "deep": deep,
    "extents": extents,
    "attributes": attributes,
    "orphans": orphans,
    "full": nearly_full,
    "fresh": nothing,
    "quotas": quotas_in_quotas,
    "domains": domains,
}
NAMES = [*CONTENT, "committed"]


@functools.cache
def image_of(name: str) -> int:
    """A memory file with the image."""
    region = committed() if name == "committed" else made(name)
    fd = os.memfd_create(name)
    os.write(fd, region.view)
    return fd


def made(name: str) -> RecordingRegion:
    region = RecordingRegion(SIZE)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    CONTENT[name](open_fs(region))
    return region


def committed() -> Region:
    """The server died between committing and applying a transaction: a rename over a file that is removed by it."""
    region = made("one-of-each")
    after = RecordingRegion(image=region.view)
    fs = open_fs(after)
    after.log.clear()
    fs.rename(ROOT, b"g", ROOT, b"big")
    at = fs.volume.journal.header_at
    for store in after.log:
        region.store(store.offset, store.data)
        if store.offset == at and store.word:
            break
    assert JOURNAL_HEADER.unpack(region.view, at).commit & 1
    return region


def view_of(name: str, kind: Callable[[int], CowRegion] = CowRegion) -> CowRegion:
    """A view of the image for one use: what is stored in it is gone with it."""
    return kind(image_of(name))
