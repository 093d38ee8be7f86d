"""Filesystems without room, with one of everything in them, and every operation that changes one."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, INODES_PER_PAGE, PAGE, PAGE_INODES, PAGES_PER_BLOCK, Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.rename import RENAME_EXCHANGE
from tests.core.support import ME, ROOT, MiB, full, mkdir, mkfile

SPARE = 12  #: directories beside the cast, each with room for names


def splits(fs: Filesystem, directory: Ino, name: bytes) -> bool:
    """Whether one more name makes the tree of the directory larger."""
    before = fs.getattr(directory).pages
    mkfile(fs, name, parent=directory)
    after = fs.getattr(directory).pages
    fs.unlink(directory, name)
    return after > before


def cast(fs: Filesystem) -> None:
    """The files that OPERATIONS work on."""
    d = mkdir(fs, b"d")
    mkfile(fs, b"f", b"abc", d)
    mkfile(fs, b"g", b"def", d)
    mkdir(fs, b"sub", d)
    mkdir(fs, b"sub2", d)
    mkdir(fs, b"empty")
    fs.link(fs.lookup(d, b"f"), d, b"hard")
    for name, count in ((b"five", 5), (b"sparse", 80)):
        ino = mkfile(fs, name, parent=d)
        for n in range(count):
            fs.write(ino, 2 * n * PAGE, b"x" * PAGE)
    mkfile(fs, b"large", b"y" * (3 * MiB), d)
    mkfile(fs, b"pages", b"z" * (100 * PAGE), d)
    fs.create(d, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 999)
    attrs = mkfile(fs, b"attrs", parent=d)
    for name, size in ((b"user.small", 100), (b"user.large", 65536), (b"user.other", 10_000)):
        fs.setxattr(attrs, name, b"v" * size)
    many = mkfile(fs, b"many-attrs", parent=d)
    for n in range(100):
        fs.setxattr(many, b"user.%d" % n, b"v" * 600)
    split = mkdir(fs, b"split")
    for n in range(200):
        if splits(fs, split, b"new" + bytes(200).replace(b"\0", b"n")):
            break
        mkfile(fs, b"%d" % n, parent=split)
    for n in range(SPARE):
        mkfile(fs, b"first", parent=mkdir(fs, b"spare%d" % n))


def free_slots(fs: Filesystem) -> int:
    """Inodes that fit in pages of inodes that are there."""
    space = fs.volume.space
    slabs = [space.slab(block) for block in space.slab_blocks()]
    return sum(slab.kinds.count(PAGE_INODES) * INODES_PER_PAGE - slab.inodes for slab in slabs)


def no_pages(fs: Filesystem) -> None:
    """No page is free; a few inodes are."""
    cast(fs)
    fill_pages(fs)


def fill_pages(fs: Filesystem) -> None:
    """Take all pages, and leave a few inodes."""
    d = fs.resolve(b"d")
    for n in range(2):
        mkfile(fs, b"slot%d" % n, parent=d)
    full(fs)
    for n in range(2):
        fs.unlink(d, b"slot%d" % n)
    assert free_slots(fs) > 1
    assert fs.statfs().free == 0


def no_inodes(fs: Filesystem) -> None:
    """No page and no inode is free."""
    cast(fs)
    full(fs)
    for n in range(SPARE):
        with suppress(FsError):
            for name in range(200):
                mkfile(fs, b"%d" % name, parent=fs.resolve(b"spare%d" % n))
    assert free_slots(fs) == 0


def no_host(fs: Filesystem) -> None:
    """No page is free in the slabs; blocks are."""
    cast(fs)
    d = fs.resolve(b"d")
    fs.setattr(mkfile(fs, b"blocks", parent=d), SetAttr(size=2 * BLOCK))
    fill_pages(fs)
    fs.unlink(d, b"blocks")
    assert fs.volume.space.free_blocks * PAGES_PER_BLOCK == fs.statfs().free > 0


def _reserve_nothing(offset: int, length: int) -> None:  # noqa: ARG001  # in place of Region.reserve
    raise FsError(errno.ENOSPC, "no memory on the host")


def handicap(fs: Filesystem, state: str) -> None:
    """What a state takes beside what is in the region: a host without memory, a journal without room."""
    if state == "host":
        fs.region.reserve = _reserve_nothing  # type: ignore[method-assign]
    elif state == "journal":
        fs.volume.journal.capacity = 200


STATES: dict[str, Callable[[Filesystem], None]] = {
    "pages": no_pages,
    "inodes": no_inodes,
    "host": no_host,
    "journal": cast,
}


class Operation(NamedTuple):
    """One change, and the states in which there is no room for it."""

    run: Callable[[Filesystem, Callable[[bytes], Ino]], object]
    fails: str  #: names of STATES


LONG = b"new" + b"n" * 200
SPACE = "pages inodes host journal"
INODE = "inodes journal"
FREES = "journal"  #: a journal as short as that of no region

OPERATIONS: dict[str, Operation] = {
    "create": Operation(lambda fs, at: mkfile(fs, b"new", parent=at(b"d")), INODE),
    "create-first": Operation(lambda fs, at: mkfile(fs, b"new", parent=at(b"empty")), SPACE),
    "create-splitting": Operation(lambda fs, at: mkfile(fs, LONG, parent=at(b"split")), SPACE),
    "mkdir": Operation(lambda fs, at: mkdir(fs, b"new", at(b"d")), INODE),
    "mknod": Operation(lambda fs, at: fs.create(at(b"d"), b"new", stat.S_IFIFO | 0o600, ME), INODE),
    "symlink": Operation(lambda fs, at: fs.create(at(b"d"), b"new", stat.S_IFLNK, ME, target=b"t"), INODE),
    "symlink-long": Operation(lambda fs, at: fs.create(at(b"d"), b"new", stat.S_IFLNK, ME, target=b"t" * 200), SPACE),
    "link": Operation(lambda fs, at: fs.link(at(b"d/f"), at(b"d"), b"new"), "journal"),
    "link-first": Operation(lambda fs, at: fs.link(at(b"d/f"), at(b"empty"), b"new"), SPACE),
    "link-splitting": Operation(lambda fs, at: fs.link(at(b"d/f"), at(b"split"), LONG), SPACE),
    "rename": Operation(lambda fs, at: fs.rename(at(b"d"), b"f", at(b"d"), b"new"), "journal"),
    "rename-first": Operation(lambda fs, at: fs.rename(at(b"d"), b"f", at(b"empty"), b"new"), SPACE),
    "rename-splitting": Operation(lambda fs, at: fs.rename(at(b"d"), b"f", at(b"split"), LONG), SPACE),
    "rename-over": Operation(lambda fs, at: fs.rename(at(b"d"), b"f", at(b"d"), b"large"), "journal"),
    "rename-over-directory": Operation(lambda fs, at: fs.rename(at(b"d"), b"sub", at(b"d"), b"sub2"), "journal"),
    "exchange": Operation(lambda fs, at: fs.rename(at(b"d"), b"f", ROOT, b"empty", RENAME_EXCHANGE), "journal"),
    "overwrite": Operation(lambda fs, at: fs.write(at(b"d/f"), 1, b"BC"), ""),
    "write-in-the-last-page": Operation(lambda fs, at: fs.write(at(b"d/f"), 1000, b"BC"), ""),
    "write-another-page": Operation(lambda fs, at: fs.write(at(b"d/f"), PAGE, b"BC"), SPACE),
    "write-in-a-hole": Operation(lambda fs, at: fs.write(at(b"d/five"), PAGE, b"x"), SPACE),
    "write-much": Operation(lambda fs, at: fs.write(at(b"d/g"), MiB, b"x" * MiB), SPACE),
    "grow-in-the-last-page": Operation(lambda fs, at: fs.setattr(at(b"d/f"), SetAttr(size=PAGE)), "journal"),
    "grow-in-the-last-block": Operation(lambda fs, at: fs.setattr(at(b"d/large"), SetAttr(size=4 * MiB)), "journal"),
    "grow": Operation(lambda fs, at: fs.setattr(at(b"d/f"), SetAttr(size=PAGE + 1)), SPACE),
    "grow-much": Operation(lambda fs, at: fs.setattr(at(b"d/f"), SetAttr(size=4 * MiB + 1)), SPACE),
    "chmod": Operation(lambda fs, at: fs.setattr(at(b"d/f"), SetAttr(mode=0o400)), "journal"),
    "chown": Operation(lambda fs, at: fs.setattr(at(b"d/f"), SetAttr(uid=7, gid=7)), "journal"),
    "utimens": Operation(lambda fs, at: fs.setattr(at(b"d/f"), SetAttr(atime=7, mtime=7)), "journal"),
    "direct": Operation(lambda fs, at: fs.attributes.set_region_mapped(at(b"d/large"), True), "journal"),
    "setxattr": Operation(lambda fs, at: fs.setxattr(at(b"d/attrs"), b"user.new", b"v"), "journal"),
    "setxattr-first": Operation(lambda fs, at: fs.setxattr(at(b"d/f"), b"user.new", b"v"), SPACE),
    "setxattr-large": Operation(lambda fs, at: fs.setxattr(at(b"d/attrs"), b"user.new", b"v" * 9000), SPACE),
    "setxattr-replacing": Operation(lambda fs, at: fs.setxattr(at(b"d/attrs"), b"user.large", b"v"), "journal"),
    "setxattr-replacing-large": Operation(
        lambda fs, at: fs.setxattr(at(b"d/attrs"), b"user.large", b"w" * 9000), SPACE
    ),
    # What gives memory back always works.
    "removexattr": Operation(lambda fs, at: fs.removexattr(at(b"d/attrs"), b"user.small"), FREES),
    "removexattr-large": Operation(lambda fs, at: fs.removexattr(at(b"d/attrs"), b"user.large"), FREES),
    "unlink-small": Operation(lambda fs, at: fs.unlink(at(b"d"), b"g"), FREES),
    "unlink-one-of-two": Operation(lambda fs, at: fs.unlink(at(b"d"), b"hard"), FREES),
    "unlink-five-extents": Operation(lambda fs, at: fs.unlink(at(b"d"), b"five"), FREES),
    "unlink-sparse": Operation(lambda fs, at: fs.unlink(at(b"d"), b"sparse"), FREES),
    "unlink-large": Operation(lambda fs, at: fs.unlink(at(b"d"), b"large"), FREES),
    "unlink-attributes": Operation(lambda fs, at: fs.unlink(at(b"d"), b"attrs"), FREES),
    "unlink-many-attributes": Operation(lambda fs, at: fs.unlink(at(b"d"), b"many-attrs"), FREES),
    "unlink-link": Operation(lambda fs, at: fs.unlink(at(b"d"), b"link"), FREES),
    "unlink-open": Operation(lambda fs, at: unlink_open(fs, at(b"d"), b"pages"), FREES),
    "rmdir": Operation(lambda fs, at: fs.rmdir(ROOT, b"empty"), FREES),
    "cut-to-nothing": Operation(lambda fs, at: fs.setattr(at(b"d/pages"), SetAttr(size=0)), FREES),
    "cut-to-a-page": Operation(lambda fs, at: fs.setattr(at(b"d/five"), SetAttr(size=100)), FREES),
    "cut-in-a-block": Operation(lambda fs, at: fs.setattr(at(b"d/large"), SetAttr(size=2 * MiB + 5)), FREES),
    "cut-sparse": Operation(lambda fs, at: fs.setattr(at(b"d/sparse"), SetAttr(size=81 * PAGE + 1)), FREES),
    "cut-sparse-to-nothing": Operation(lambda fs, at: fs.setattr(at(b"d/sparse"), SetAttr(size=0)), FREES),
}


def unlink_open(fs: Filesystem, parent: Ino, name: bytes) -> None:
    """Remove a file that is open, and close it."""
    ino = fs.lookup(parent, name)
    fs.lookups.add(ino)
    try:
        fs.unlink(parent, name)
    finally:
        fs.reclaimer.forget(ino, 1)
