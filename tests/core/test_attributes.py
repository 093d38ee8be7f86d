"""Attributes of inodes, extended attributes, and the figures of the whole."""

import errno
import random
import stat
from collections.abc import Callable

import pytest

from pkernfs.format import BLOCK, INODE_MTIME_AT, INODE_SIZE, PAGE, XATTR_INLINE, XATTR_SIZE_MAX, Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem, Statfs
from pkernfs.fs.times import I64_MAX
from tests.core.support import (
    ME,
    ROOT,
    MiB,
    assert_sound,
    content,
    mkdir,
    mkfile,
    open_fs,
    shape,
    tree,
    unchanged,
)

# -- setattr ----------------------------------------------------------------------------------------------------------


def test_setattr_changes_what_it_is_told(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"abc", mode=0o600)
    before = fs.getattr(ino)
    inode = fs.setattr(ino, SetAttr(mode=0o4755 | stat.S_IFDIR, uid=5, gid=6, atime=7, mtime=8))
    assert inode == before._replace(mode=stat.S_IFREG | 0o4755, uid=5, gid=6, atime=7, mtime=8, ctime=inode.ctime)
    assert inode.ctime > before.ctime
    assert open_fs(fs.region).getattr(ino)[:4] == inode[:4]
    assert shape(open_fs(fs.region), ino) == shape(fs, ino)


def test_setattr_of_nothing_changes_ctime_only(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"abc")
    before = fs.getattr(ino)
    inode = fs.setattr(ino, SetAttr())
    assert inode == before._replace(ctime=inode.ctime)


@pytest.mark.parametrize("ns", [0, -1, 1, I64_MAX, -I64_MAX - 1, I64_MAX + 1, -(1 << 70), 1 << 70])
def test_times_of_every_size(fs: Filesystem, ns: int) -> None:
    ino = mkfile(fs, b"f")
    inode = fs.setattr(ino, SetAttr(atime=ns, mtime=ns))
    clamped = max(-I64_MAX - 1, min(ns, I64_MAX))
    assert (inode.atime, inode.mtime) == (clamped, clamped)
    again = open_fs(fs.region).getattr(ino)
    assert (again.atime, again.mtime) == (clamped, clamped)


MODES = {
    "plain": (0o644, 0o644),
    "setuid": (0o4755, 0o755),
    "setgid-executable": (0o2755, 0o755),
    "setgid-not-executable": (0o2644, 0o2644),
    "both": (0o6777, 0o777),
}


@pytest.mark.parametrize(("mode", "after"), MODES.values(), ids=MODES)
@pytest.mark.parametrize("how", ["write", "write-new-page", "truncate", "chown"])
def test_privileges_end_with_a_change(fs: Filesystem, mode: int, after: int, how: str) -> None:
    ino = mkfile(fs, b"f", b"abc", mode=mode)
    if how == "write":
        fs.write(ino, 0, b"x", kill_priv=True)
    elif how == "write-new-page":
        fs.write(ino, 2 * PAGE, b"x", kill_priv=True)
    elif how == "truncate":
        fs.setattr(ino, SetAttr(size=1), privileged=False)
    else:
        fs.setattr(ino, SetAttr(uid=1))
    assert stat.S_IMODE(fs.getattr(ino).mode) == after


def test_privileges_stay_for_the_privileged_and_for_directories(fs: Filesystem) -> None:
    ino, d = mkfile(fs, b"f", b"abc", mode=0o6755), mkdir(fs, b"d")
    fs.write(ino, 0, b"x")
    fs.setattr(ino, SetAttr(size=1))
    assert stat.S_IMODE(fs.getattr(ino).mode) == 0o6755
    fs.setattr(d, SetAttr(mode=0o2755))
    fs.setattr(d, SetAttr(gid=9))
    assert stat.S_IMODE(fs.getattr(d).mode) == 0o2755


def test_only_files_have_a_size_to_set(fs: Filesystem) -> None:
    fifo = fs.create(ROOT, b"p", stat.S_IFIFO | 0o600, ME)
    link = fs.create(ROOT, b"l", stat.S_IFLNK | 0o777, ME, target=b"t")
    unchanged(fs, errno.EISDIR, lambda: fs.setattr(ROOT, SetAttr(size=0)))
    unchanged(fs, errno.EINVAL, lambda: fs.setattr(fifo, SetAttr(size=0)))
    unchanged(fs, errno.EINVAL, lambda: fs.setattr(link, SetAttr(size=0)))
    unchanged(fs, errno.ESTALE, lambda: fs.setattr(Ino(999_999), SetAttr(size=0)))


def test_words_survive_a_transaction_on_the_same_inode(fs: Filesystem) -> None:
    """A time stored in place and then a transaction that stores the whole slot."""
    ino = mkfile(fs, b"f", b"abc")
    fs.write(ino, 0, b"xyz")
    written = fs.getattr(ino).mtime
    fs.setattr(ino, SetAttr(mode=0o600))
    assert fs.getattr(ino).mtime == fs.region.word(ino * INODE_SIZE + INODE_MTIME_AT) == written


# -- extended attributes ----------------------------------------------------------------------------------------------

VALUES = [0, 1, XATTR_INLINE - 1, XATTR_INLINE, XATTR_INLINE + 1, PAGE, PAGE + 1, 20_000, XATTR_SIZE_MAX]


def value_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("new", VALUES)
@pytest.mark.parametrize("old", VALUES)
def test_attributes_of_every_size(fs: Filesystem, old: int, new: int) -> None:
    ino = mkfile(fs, b"f", b"abc")
    before, space = shape(fs, ino), fs.statfs()
    fs.setxattr(ino, b"user.a", value_of(old))
    assert fs.getxattr(ino, b"user.a") == value_of(old)
    fs.setxattr(ino, b"user.a", value_of(new))
    assert fs.getxattr(ino, b"user.a") == value_of(new)
    assert fs.listxattr(ino) == [b"user.a"]
    assert fs.getattr(ino).pages == before.pages + 1 + (-(-new // PAGE) if new > XATTR_INLINE else 0)
    assert open_fs(fs.region).getxattr(ino, b"user.a") == value_of(new)
    assert_sound(fs)
    fs.removexattr(ino, b"user.a")
    assert shape(fs, ino) == before
    assert fs.statfs() == space


def test_errors_of_attributes(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f")
    fs.setxattr(ino, b"user.a", b"1")
    unchanged(fs, errno.ENODATA, lambda: fs.getxattr(ino, b"user.b"))
    unchanged(fs, errno.ENODATA, lambda: fs.getxattr(ROOT, b"user.b"))
    unchanged(fs, errno.ENODATA, lambda: fs.removexattr(ino, b"user.b"))
    unchanged(fs, errno.ERANGE, lambda: fs.setxattr(ino, b"n" * 256, b""))
    unchanged(fs, errno.ERANGE, lambda: fs.setxattr(ino, b"", b""))
    unchanged(fs, errno.E2BIG, lambda: fs.setxattr(ino, b"user.b", bytes(XATTR_SIZE_MAX + 1)))
    unchanged(fs, errno.ESTALE, lambda: fs.setxattr(Ino(999_999), b"user.a", b""))


def test_many_attributes(fs: Filesystem) -> None:
    """As many names as fit in one list (64 KiB), on every type of inode."""
    space = fs.statfs()
    d = mkdir(fs, b"d")
    names = [b"user.%03d" % n + b"n" * 247 for n in range(256)]
    for name in names:
        fs.setxattr(d, name, name[5:])
    unchanged(fs, errno.ENOSPC, lambda: fs.setxattr(d, b"user.one-more", b""))
    fs.setxattr(d, names[7], b"replaced")
    assert sorted(fs.listxattr(d)) == names
    assert fs.getxattr(d, names[7]) == b"replaced"
    assert all(fs.getxattr(d, name) == name[5:] for name in names if name != names[7])
    fs.rmdir(ROOT, b"d")
    assert fs.statfs() == space


def test_attributes_go_with_their_file(fs: Filesystem) -> None:
    space = fs.statfs()
    for n, mode in enumerate((stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO)):
        ino = fs.create(ROOT, b"%d" % n, mode | 0o600, ME, target=b"t" * 300 if stat.S_ISLNK(mode) else b"")
        fs.setxattr(ino, b"trusted.small", b"v")
        fs.setxattr(ino, b"trusted.large", value_of(65536))
        fs.rename(ROOT, b"%d" % n, ROOT, b"moved%d" % n)
        assert fs.getxattr(ino, b"trusted.large") == value_of(65536)
        assert_sound(fs)
        fs.unlink(ROOT, b"moved%d" % n)
    assert fs.statfs() == space


def test_large_attributes_in_scattered_pages(make_fs: Callable[..., Filesystem]) -> None:
    """A value whose 16 pages are all apart from each other."""
    fs = make_fs(16)
    names = [b"f%04d" % n for n in range(1000)]
    for name in names:
        mkfile(fs, name, b"x")
    blocker = mkfile(fs, b"blocker")
    fs.setattr(blocker, SetAttr(size=fs.volume.space.free_blocks * BLOCK))
    while fs.statfs().free:
        mkfile(fs, b"more%d" % fs.statfs().free, b"x")
    for name in names[::2]:
        fs.setattr(fs.lookup(ROOT, name), SetAttr(size=0))
    fs.setxattr(blocker, b"user.scattered", value_of(65536))
    assert fs.getxattr(blocker, b"user.scattered") == value_of(65536)
    assert_sound(fs)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_statfs_is_exact(fs: Filesystem) -> None:
    """Everything that can be made is made and removed; not one page is missing."""
    fresh, before = fs.statfs(), tree(fs)
    d = mkdir(fs, b"d")
    for n in range(40):
        mkfile(fs, b"f%d" % n, b"x" * (n * 1000), d)
    mkfile(fs, b"large", b"x" * (3 * MiB + 1), d)
    sparse = mkfile(fs, b"sparse", parent=d)
    for n in range(30):
        fs.write(sparse, n * 3 * PAGE, b"x")
    fs.create(d, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 1000)
    fs.link(sparse, ROOT, b"other-name")
    fs.setxattr(d, b"user.a", b"v" * 9999)
    used = fs.statfs()
    assert used.blocks == fresh.blocks
    assert fresh.free - used.free > 900
    assert used.files - used.free_files == 1 + 40 + 1 + 1 + 1
    assert open_fs(fs.region).statfs() == used
    for entry in list(fs.readdir(d)):
        fs.unlink(d, entry.name)
    fs.unlink(ROOT, b"other-name")
    fs.rmdir(ROOT, b"d")
    assert fs.statfs() == fresh
    assert tree(fs) == before


def test_statfs_of_a_fresh_region(make_fs: Callable[..., Filesystem]) -> None:
    fs = make_fs(64)
    blocks = 32 - fs.volume.sb.first_block
    # One slab: its header, a node each for / and /iommu, and a copy of the superblock.
    free = blocks * 512 - 4
    assert fs.statfs() == Statfs(blocks * 512, free, free, free * 16, free * 16)


def test_physical_addresses(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"here")
    page = fs.content.extents(ino)[0].page
    assert fs.volume.physical(page * PAGE) == page * PAGE + fs.volume.sb.phys_base
    assert bytes(fs.region.view[page * PAGE : page * PAGE + 4]) == content(fs, ino)
