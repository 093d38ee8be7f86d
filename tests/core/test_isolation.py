"""Freed memory is never seen by another file.

Freed in every way, with a crash at every store of it, taken in every way.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

import pytest

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, PAGE, Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.region import MemoryRegion, RecordingRegion
from tests.core.support import ME, ROOT, SEED, UUID, MiB, mkdir, mkfile, open_fs

SIZE = 10 * MiB
PATTERN = b"a tenant's own: "


def secret(size: int) -> bytes:
    """The pattern, again and again."""
    return PATTERN * (size // len(PATTERN))


def large_attributes(fs: Filesystem) -> Ino:
    ino = mkfile(fs, b"old")
    for n in range(5):
        fs.setxattr(ino, b"user.%d" % n, secret(50_000))
    return ino


def small_attributes(fs: Filesystem) -> Ino:
    ino = mkfile(fs, b"old")
    for n in range(30):
        fs.setxattr(ino, b"user.%d" % n, secret(480))
    return ino


def sparse(fs: Filesystem) -> Ino:
    ino = mkfile(fs, b"old")
    for n in range(50):
        fs.write(ino, 3 * n * PAGE, secret(PAGE))
    return ino


def names(fs: Filesystem) -> Ino:
    ino = mkdir(fs, b"old")
    for n in range(60):
        mkfile(fs, secret(192) + b"%d" % n, parent=ino)
    return ino


def remove_names(fs: Filesystem, ino: Ino) -> None:
    for entry in list(fs.readdir(ino)):
        fs.unlink(ino, entry.name)
    fs.rmdir(ROOT, b"old")


def unlink(fs: Filesystem, _ino: Ino) -> None:
    fs.unlink(ROOT, b"old")


def unlink_open(fs: Filesystem, ino: Ino) -> None:
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"old")


def cut_and_unlink(fs: Filesystem, ino: Ino) -> None:
    """A block becomes pages."""
    fs.setattr(ino, SetAttr(size=50 * PAGE))
    fs.unlink(ROOT, b"old")


def grow_and_unlink(fs: Filesystem, ino: Ino) -> None:
    """Pages become a block."""
    fs.write(ino, fs.getattr(ino).size, b"x" * MiB)
    fs.unlink(ROOT, b"old")


def replace_attributes(fs: Filesystem, ino: Ino) -> None:
    for name in fs.listxattr(ino):
        fs.setxattr(ino, name, b"")


def remove_attributes(fs: Filesystem, ino: Ino) -> None:
    for name in fs.listxattr(ino):
        fs.removexattr(ino, name)


def rename_over(fs: Filesystem, _ino: Ino) -> None:
    mkfile(fs, b"another")
    fs.rename(ROOT, b"another", ROOT, b"old")


Make = Callable[[Filesystem], Ino]
Free = Callable[[Filesystem, Ino], object]

#: How the pattern comes into the region, and how its memory is freed.
WAYS: dict[str, tuple[Make, Free]] = {
    "page": (lambda fs: mkfile(fs, b"old", secret(PAGE)), unlink),
    "pages": (lambda fs: mkfile(fs, b"old", secret(100 * PAGE)), unlink),
    "block": (lambda fs: mkfile(fs, b"old", secret(BLOCK)), unlink),
    "blocks-open": (lambda fs: mkfile(fs, b"old", secret(2 * BLOCK)), unlink_open),
    "sparse": (sparse, unlink),
    "sparse-open": (sparse, unlink_open),
    "cut-to-nothing": (sparse, lambda fs, ino: fs.setattr(ino, SetAttr(size=0))),
    "cut": (lambda fs: mkfile(fs, b"old", secret(100 * PAGE)), lambda fs, ino: fs.setattr(ino, SetAttr(size=0))),
    "cut-to-pages": (lambda fs: mkfile(fs, b"old", secret(BLOCK + MiB)), cut_and_unlink),
    "grown-to-a-block": (lambda fs: mkfile(fs, b"old", secret(100 * PAGE)), grow_and_unlink),
    "renamed-over": (lambda fs: mkfile(fs, b"old", secret(100 * PAGE)), rename_over),
    "attributes": (large_attributes, unlink),
    "attributes-replaced": (large_attributes, replace_attributes),
    "attributes-removed": (large_attributes, remove_attributes),
    "small-attributes": (small_attributes, remove_attributes),
    "names": (names, remove_names),
    "symlink": (lambda fs: fs.create(ROOT, b"old", stat.S_IFLNK, ME, target=secret(4000)), unlink),
    "short-symlink": (lambda fs: fs.create(ROOT, b"old", stat.S_IFLNK, ME, target=secret(112)), unlink),
}


def take(fs: Filesystem, top: Ino) -> None:
    """Take all memory there is, in every way."""
    n = 0

    def new() -> Ino:
        nonlocal n
        n += 1
        return mkfile(fs, b"new%d" % n, parent=top)

    def write_sparsely(pages: int, step: int) -> None:
        ino = new()
        for at in range(pages):
            fs.write(ino, at * step * PAGE + 77, b"x")

    calls: list[Callable[[], object]] = [
        lambda: fs.write(new(), 0, b"x"),
        lambda: fs.write(new(), 5 * PAGE - 1, b"x"),
        lambda: fs.setattr(new(), SetAttr(size=3 * PAGE + 1)),
        lambda: write_sparsely(4, 3),
        lambda: fs.setxattr(new(), b"user.x", b"x" * 4097),
        lambda: fs.create(top, b"link%d" % n, stat.S_IFLNK, ME, target=b"x" * 200),
        lambda: mkfile(fs, b"first", parent=mkdir(fs, b"dir%d" % n, top)),
        lambda: fs.setattr(new(), SetAttr(size=MiB + 1)),
        lambda: write_sparsely(258, 1),
    ]
    failed = 0
    while failed < len(calls):
        failed = 0
        for call in calls:
            try:
                call()
            except FsError as error:
                if error.errno != errno.ENOSPC:
                    raise
                failed += 1


def look(fs: Filesystem, top: Ino) -> None:
    """The pattern is in nothing that belongs to the new files: content, attributes, and the memory itself."""
    for entry in list(fs.readdir(top)):
        inode = fs.getattr(entry.ino)
        assert PATTERN not in fs.region.read(entry.ino * 256, 256)
        for name in fs.listxattr(entry.ino):
            assert PATTERN not in fs.getxattr(entry.ino, name)
        if stat.S_ISLNK(inode.mode):
            assert PATTERN not in fs.readlink(entry.ino)
        if stat.S_ISREG(inode.mode):
            for extent in fs.content.extents(entry.ino):
                # All that is mapped, also beyond the end of the file.
                assert PATTERN not in fs.region.read(extent.page * PAGE, extent.length * PAGE), (entry.name, extent)


def taken_after(region: MemoryRegion) -> None:
    """Mount, take, look."""
    fs = open_fs(region)
    top = mkdir(fs, b"top")
    take(fs, top)
    look(fs, top)


@pytest.mark.parametrize("way", WAYS)
def test_freed_memory_is_never_seen_again(way: str) -> None:
    """After the freeing, and after crashes in the midst of it."""
    make, free = WAYS[way]
    region = RecordingRegion(SIZE)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    fs = open_fs(region)
    ino = make(fs)
    image = bytearray(region.view)
    region.log.clear()
    free(fs, ino)
    taken_after(MemoryRegion(image=region.view))
    step = max(1, len(region.log) // 2)
    for at, store in enumerate(region.log):
        if at % step == step - 1:
            taken_after(MemoryRegion(image=image))
        image[store.offset : store.offset + len(store.data)] = store.data


@pytest.mark.parametrize("way", ["pages", "block", "attributes"])
def test_memory_that_is_not_zeroed_is_noticed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would fail where new memory kept what was in it."""
    make, free = WAYS[way]
    region = MemoryRegion(SIZE)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    for name in ("zero", "reserve", "discard"):
        monkeypatch.setattr(MemoryRegion, name, lambda *_: None)
    fs = open_fs(region)
    free(fs, make(fs))
    with pytest.raises(AssertionError, match=PATTERN.decode()):
        taken_after(MemoryRegion(image=region.view))
