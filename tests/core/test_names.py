"""Names: create, lookup, link, unlink, rmdir, rename, readdir."""

import errno
import itertools
import stat
from functools import partial

import pytest

from pkernfs.errors import FsError
from pkernfs.format import (
    FIRST_FREE_SLOT,
    FLAG_DIR,
    FLAG_FILE,
    IOMMU_INO,
    LINK_MAX,
    ORPHANS_INO,
    ROOT_PGTABLES_INO,
    SYMLINK_MAX,
    Ino,
    name_key,
)
from pkernfs.fs import named
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.fs.rename import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.core.support import (
    ME,
    ROOT,
    SECOND,
    assert_sound,
    content,
    fails,
    mkdir,
    mkfile,
    patch_inode,
    tree,
    unchanged,
)

TYPES = {
    "file": (stat.S_IFREG | 0o640, 0, b""),
    "directory": (stat.S_IFDIR | 0o750, 0, b""),
    "fifo": (stat.S_IFIFO | 0o600, 0, b""),
    "socket": (stat.S_IFSOCK | 0o755, 0, b""),
    "character-device": (stat.S_IFCHR | 0o600, 0x103, b""),
    "block-device": (stat.S_IFBLK | 0o660, 0xFFF00FFF, b""),
    "short-link": (stat.S_IFLNK | 0o777, 0, b"../elsewhere"),
    "link-of-120": (stat.S_IFLNK | 0o777, 0, b"t" * 120),
    "link-of-121": (stat.S_IFLNK | 0o777, 0, b"t" * 121),
    "longest-link": (stat.S_IFLNK | 0o777, 0, b"t" * SYMLINK_MAX),
}


def names(fs: Filesystem, ino: Ino = ROOT) -> set[bytes]:
    return {entry.name for entry in fs.readdir(ino)}


# -- create and lookup ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "rdev", "target"), TYPES.values(), ids=TYPES)
def test_create_every_type_and_remove_it(fs: Filesystem, mode: int, rdev: int, target: bytes) -> None:
    space, before = fs.statfs(), tree(fs)
    ino = fs.create(ROOT, b"new", mode, ME, rdev=rdev, target=target)
    inode = fs.getattr(ino)
    is_dir = stat.S_ISDIR(mode)
    assert (inode.mode, inode.uid, inode.gid, inode.rdev) == (mode, *ME, rdev)
    assert (inode.nlink, inode.parent) == ((2, ROOT) if is_dir else (1, 0))
    assert inode.flags == (FLAG_DIR if is_dir else FLAG_FILE if stat.S_ISREG(mode) else 0)
    assert inode.size == len(target)
    assert inode.pages == (len(target) > 120)
    assert inode.atime == inode.mtime == inode.ctime == inode.btime
    assert fs.lookup(ROOT, b"new") == ino
    assert fs.getattr(ROOT).nlink == 3 + is_dir
    assert fs.getattr(ROOT).mtime == fs.getattr(ROOT).ctime == inode.ctime
    assert next(entry for entry in fs.readdir(ROOT) if entry.name == b"new").mode == stat.S_IFMT(mode)
    if target:
        assert fs.readlink(ino) == target
    assert_sound(fs)
    fs.rmdir(ROOT, b"new") if is_dir else fs.unlink(ROOT, b"new")
    assert (fs.statfs(), tree(fs)) == (space, before)
    with fails(errno.ESTALE):
        fs.getattr(ino)


NAMES = [b"a", b"n" * 255, b"...", b" ", b"\xff\xfe", "\N{SNOWMAN}".encode(), b"new\nline"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_name_is_found_again(fs: Filesystem, name: bytes) -> None:
    ino = mkfile(fs, name, b"1")
    assert fs.lookup(ROOT, name) == ino
    assert name in names(fs)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(b"n" * 256, errno.ENAMETOOLONG, id="too-long"),
        pytest.param(b"", errno.EINVAL, id="empty"),
        pytest.param(b"a/b", errno.EINVAL, id="slash"),
        pytest.param(b"a\0b", errno.EINVAL, id="nul"),
        pytest.param(b".", errno.EEXIST, id="dot"),
        pytest.param(b"..", errno.EEXIST, id="dot-dot"),
        pytest.param(b"there", errno.EEXIST, id="exists"),
    ],
)
@pytest.mark.parametrize("how", ["create", "link", "rename"])
def test_names_that_cannot_be_made(fs: Filesystem, how: str, name: bytes, number: int) -> None:
    ino = mkfile(fs, b"there")
    mkfile(fs, b"old")
    if how == "create":
        unchanged(fs, number, lambda: fs.create(ROOT, name, stat.S_IFREG | 0o644, ME))
    elif how == "link":
        unchanged(fs, number, lambda: fs.link(ino, ROOT, name))
    else:
        unchanged(fs, number, lambda: fs.rename(ROOT, b"old", ROOT, name, RENAME_NOREPLACE))


def test_link_target_too_long(fs: Filesystem) -> None:
    unchanged(
        fs, errno.ENAMETOOLONG, lambda: fs.create(ROOT, b"l", stat.S_IFLNK | 0o777, ME, target=b"t" * (SYMLINK_MAX + 1))
    )


def test_parent_is_no_directory(fs: Filesystem) -> None:
    ino = mkfile(fs, b"file")
    for operation in (
        lambda: fs.create(ino, b"x", stat.S_IFREG, ME),
        lambda: fs.lookup(ino, b"x"),
        lambda: fs.unlink(ino, b"x"),
        lambda: fs.rmdir(ino, b"x"),
        lambda: fs.link(ino, ino, b"x"),
        lambda: fs.rename(ROOT, b"file", ino, b"x"),
        lambda: fs.rename(ino, b"x", ROOT, b"y"),
        lambda: fs.readdir(ino),
    ):
        unchanged(fs, errno.ENOTDIR, operation)


def test_free_and_impossible_inodes_are_stale(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f")
    for number in (0, 5, FIRST_FREE_SLOT - 1, FIRST_FREE_SLOT, ino + 1, 1 << 40, (1 << 64) - 1):
        with fails(errno.ESTALE):
            fs.getattr(Ino(number))


def test_lookup(fs: Filesystem) -> None:
    a = mkdir(fs, b"a")
    b = mkdir(fs, b"b", a)
    f = mkfile(fs, b"f", b"x", b)
    assert fs.lookup(b, b".") == b
    assert fs.lookup(b, b"..") == a
    assert fs.lookup(ROOT, b"..") == ROOT
    assert fs.resolve(b"/a/b/f") == fs.resolve(b"a//b/f") == f
    with fails(errno.ENOENT):
        fs.lookup(a, b"nothing")
    with fails(errno.ENAMETOOLONG):
        fs.lookup(a, b"n" * 256)


def test_set_group_id_directories_hand_their_group_on(fs: Filesystem) -> None:
    shared = mkdir(fs, b"shared")
    fs.setattr(shared, SetAttr(mode=0o2775, gid=4711))
    fs.setattr(shared, SetAttr(mode=0o2775))
    file = fs.create(shared, b"f", stat.S_IFREG | 0o644, Caller(1, 2))
    below = fs.create(shared, b"d", stat.S_IFDIR | 0o755, Caller(1, 2))
    assert (fs.getattr(file).gid, fs.getattr(file).mode & stat.S_ISGID) == (4711, 0)
    assert (fs.getattr(below).gid, fs.getattr(below).mode & stat.S_ISGID) == (4711, stat.S_ISGID)


def test_what_mkfs_makes_stays(fs: Filesystem) -> None:
    assert fs.resolve(b"/iommu") == IOMMU_INO
    assert fs.resolve(b"/iommu/root-pgtables") == ROOT_PGTABLES_INO
    mkfile(fs, b"f")
    mkdir(fs, b"d")
    for operation in (
        lambda: fs.unlink(IOMMU_INO, b"root-pgtables"),
        lambda: fs.rename(ROOT, b"iommu", ROOT, b"other"),
        lambda: fs.rename(IOMMU_INO, b"root-pgtables", ROOT, b"other"),
        lambda: fs.rename(ROOT, b"f", IOMMU_INO, b"root-pgtables"),
        lambda: fs.rename(ROOT, b"d", ROOT, b"iommu"),
        lambda: fs.rename(ROOT, b"d", ROOT, b"iommu", RENAME_EXCHANGE),
        lambda: fs.link(ROOT_PGTABLES_INO, ROOT, b"other"),
        lambda: fs.link(ORPHANS_INO, ROOT, b"other"),
    ):
        unchanged(fs, errno.EPERM, operation)
    unchanged(fs, errno.ENOTEMPTY, lambda: fs.rmdir(ROOT, b"iommu"))


# -- link, unlink, rmdir ----------------------------------------------------------------------------------------------


def test_link_and_unlink(fs: Filesystem) -> None:
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"one", b"content")
    fs.link(ino, d, b"two")
    fs.link(ino, ROOT, b"three")
    assert fs.getattr(ino).nlink == 3
    assert fs.lookup(d, b"two") == fs.lookup(ROOT, b"three") == ino
    changed = fs.getattr(ino).ctime
    fs.unlink(ROOT, b"one")
    fs.unlink(ROOT, b"three")
    assert fs.getattr(ino).nlink == 1
    assert fs.getattr(ino).ctime > changed
    assert content(fs, ino) == b"content"
    fs.unlink(d, b"two")
    with fails(errno.ESTALE):
        fs.getattr(ino)


def test_errors_of_link_and_unlink(fs: Filesystem) -> None:
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"f")
    unchanged(fs, errno.EPERM, lambda: fs.link(d, ROOT, b"x"))
    unchanged(fs, errno.ESTALE, lambda: fs.link(Ino(ino + 1000), ROOT, b"x"))
    unchanged(fs, errno.ENOENT, lambda: fs.unlink(ROOT, b"x"))
    unchanged(fs, errno.EISDIR, lambda: fs.unlink(ROOT, b"d"))
    unchanged(fs, errno.ENOENT, lambda: fs.rmdir(ROOT, b"x"))
    unchanged(fs, errno.ENOTDIR, lambda: fs.rmdir(ROOT, b"f"))
    unchanged(fs, errno.EINVAL, lambda: fs.rmdir(ROOT, b"."))
    unchanged(fs, errno.ENOTEMPTY, lambda: fs.rmdir(ROOT, b".."))
    mkfile(fs, b"inside", parent=d)
    unchanged(fs, errno.ENOTEMPTY, lambda: fs.rmdir(ROOT, b"d"))


def test_too_many_links(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f")
    patch_inode(fs, ino, nlink=LINK_MAX)
    with fails(errno.EMLINK):
        fs.link(ino, ROOT, b"g")
    patch_inode(fs, ino, nlink=1)


def test_removed_but_open_things_take_no_names(fs: Filesystem) -> None:
    d, ino = mkdir(fs, b"d"), mkfile(fs, b"f")
    mkfile(fs, b"other")
    fs.lookups.add(d)
    fs.lookups.add(ino)
    fs.rmdir(ROOT, b"d")
    fs.unlink(ROOT, b"f")
    unchanged(fs, errno.ENOENT, lambda: fs.create(d, b"x", stat.S_IFREG, ME))
    unchanged(fs, errno.ENOENT, lambda: fs.link(fs.lookup(ROOT, b"other"), d, b"x"))
    unchanged(fs, errno.ENOENT, lambda: fs.rename(ROOT, b"other", d, b"x"))
    unchanged(fs, errno.ENOENT, lambda: fs.link(ino, ROOT, b"x"))
    assert names(fs, d) == set()
    fs.reclaimer.forget(d, 1)
    fs.reclaimer.forget(ino, 1)


# -- rename -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(fs: Filesystem) -> Filesystem:
    """/a/{file,dir/,full/inner}  /b/{file,dir/,full/inner}."""
    for top in (b"a", b"b"):
        ino = mkdir(fs, top)
        mkfile(fs, b"file", b"file of " + top, ino)
        mkdir(fs, b"dir", ino)
        mkfile(fs, b"inner", b"in " + top, mkdir(fs, b"full", ino))
    return fs


FLAGS = {"plain": 0, "noreplace": RENAME_NOREPLACE, "exchange": RENAME_EXCHANGE}
KINDS = [b"file", b"dir", b"full", b"nothing"]


def expected_errno(kind: bytes, onto: bytes, flags: int, same: bool) -> int:
    """rename(2), once more."""
    if kind == b"nothing":
        return errno.ENOENT
    if onto == b"nothing":
        return errno.ENOENT if flags == RENAME_EXCHANGE else 0
    if flags == RENAME_NOREPLACE:
        return errno.EEXIST
    if same or flags == RENAME_EXCHANGE:
        return 0
    if kind == b"file":
        return 0 if onto == b"file" else errno.EISDIR
    return {b"file": errno.ENOTDIR, b"full": errno.ENOTEMPTY, b"dir": 0}[onto]


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("onto", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [b"a", b"b"], ids=["same-parent", "other-parent"])
def test_rename(places: Filesystem, to: bytes, kind: bytes, onto: bytes, flags: int) -> None:
    fs = places
    source, target = fs.resolve(b"a"), fs.resolve(to)
    same = source == target and kind == onto
    number = expected_errno(kind, onto, flags, same)
    if number:
        unchanged(fs, number, lambda: fs.rename(source, kind, target, onto, flags))
        return
    before = tree(fs)
    moved = fs.lookup(source, kind)
    other = None if onto == b"nothing" else fs.lookup(target, onto)
    fs.rename(source, kind, target, onto, flags)
    assert fs.lookup(target, onto) == moved
    if same:
        assert tree(fs) == before
        return
    if flags == RENAME_EXCHANGE:
        assert fs.lookup(source, kind) == other
        if stat.S_ISDIR(fs.getattr(other).mode):
            assert fs.getattr(other).parent == source
    else:
        with fails(errno.ENOENT):
            fs.lookup(source, kind)
        if other:
            with fails(errno.ESTALE):
                fs.getattr(other)
    if stat.S_ISDIR(fs.getattr(moved).mode):
        assert fs.lookup(moved, b"..") == target
    if kind == b"full":
        assert content(fs, fs.lookup(moved, b"inner")) == b"in a"
    assert fs.getattr(target).mtime == fs.getattr(source).mtime == fs.getattr(moved).ctime
    assert_sound(fs)
    if flags != RENAME_EXCHANGE and other is None:
        fs.rename(target, onto, source, kind)
        assert tree(fs) == before


def test_rename_between_names_of_one_file_does_nothing(fs: Filesystem) -> None:
    ino = mkfile(fs, b"one")
    fs.link(ino, ROOT, b"two")
    before = tree(fs)
    fs.rename(ROOT, b"one", ROOT, b"two")
    fs.rename(ROOT, b"one", ROOT, b"two", RENAME_EXCHANGE)
    assert tree(fs) == before


def test_rename_over_one_of_several_names(fs: Filesystem) -> None:
    kept = mkfile(fs, b"kept", b"kept")
    fs.link(kept, ROOT, b"over")
    mkfile(fs, b"new", b"new")
    fs.rename(ROOT, b"new", ROOT, b"over")
    assert fs.getattr(kept).nlink == 1
    assert content(fs, fs.lookup(ROOT, b"over")) == b"new"


def test_a_directory_does_not_move_below_itself(fs: Filesystem) -> None:
    a = mkdir(fs, b"a")
    b = mkdir(fs, b"b", a)
    c = mkdir(fs, b"c", b)
    for place in (a, b, c):
        unchanged(fs, errno.EINVAL, partial(fs.rename, ROOT, b"a", place, b"x"))
    unchanged(fs, errno.EINVAL, lambda: fs.rename(ROOT, b"a", b, b"c", RENAME_EXCHANGE))
    unchanged(fs, errno.EINVAL, lambda: fs.rename(b, b"c", ROOT, b"a", RENAME_EXCHANGE))
    unchanged(fs, errno.ENOTEMPTY, lambda: fs.rename(b, b"c", ROOT, b"a"))


@pytest.mark.parametrize("flags", [3, 4, 8])
def test_rename_with_unknown_flags(fs: Filesystem, flags: int) -> None:
    mkfile(fs, b"f")
    unchanged(fs, errno.EINVAL, lambda: fs.rename(ROOT, b"f", ROOT, b"g", flags))


def test_rename_moves_link_counts(places: Filesystem) -> None:
    fs = places
    a, b = fs.resolve(b"a"), fs.resolve(b"b")
    fs.rename(a, b"file", b, b"dir", RENAME_EXCHANGE)
    assert (fs.getattr(a).nlink, fs.getattr(b).nlink) == (5, 3)
    fs.rename(a, b"full", b, b"moved")
    assert (fs.getattr(a).nlink, fs.getattr(b).nlink) == (4, 4)


# -- directories of any size ------------------------------------------------------------------------------------------


def test_readdir_goes_on_from_any_cookie(fs: Filesystem) -> None:
    for n in range(500):
        mkfile(fs, b"file%d" % n)
    entries = list(fs.readdir(ROOT))
    assert len(entries) == 501
    assert [entry.key for entry in entries] == sorted({entry.key for entry in entries})
    for at in range(0, 501, 50):
        assert list(fs.readdir(ROOT, entries[at].key)) == entries[at:]
        assert list(fs.readdir(ROOT, entries[at].key + 1)) == entries[at + 1 :]


def test_readdir_sees_what_stays_once_while_others_come_and_go(fs: Filesystem) -> None:
    for n in range(300):
        mkfile(fs, b"stays%d" % n)
        mkfile(fs, b"goes%d" % n)
    seen: list[bytes] = []
    cookie = 0
    for n in itertools.count():
        part = list(itertools.islice(fs.readdir(ROOT, cookie), 7))
        if not part:
            break
        seen += [entry.name for entry in part]
        cookie = part[-1].key + 1
        if n < 300:
            fs.unlink(ROOT, b"goes%d" % n)
            mkfile(fs, b"comes%d" % n)
    stayed = [name for name in seen if name.startswith(b"stays")]
    assert sorted(stayed) == sorted(b"stays%d" % n for n in range(300))


def test_names_with_one_hash(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 names share one hash; the next does not fit; taking one away makes room."""

    def colliding(seed: bytes, name: bytes) -> int:
        return 64 * 7 if name.startswith(b"same") else name_key(seed, name)

    monkeypatch.setattr(named, "name_key", colliding)
    d = mkdir(fs, b"d")
    inodes = {b"same%d" % n: mkfile(fs, b"same%d" % n, parent=d) for n in range(64)}
    with fails(errno.ENOSPC):
        mkfile(fs, b"same64", parent=d)
    assert {name: fs.lookup(d, name) for name in inodes} == inodes
    fs.unlink(d, b"same20")
    inodes[b"same64"] = mkfile(fs, b"same64", parent=d)
    del inodes[b"same20"]
    assert {name: fs.lookup(d, name) for name in inodes} == inodes
    with fails(errno.ENOENT):
        fs.lookup(d, b"same20")
    for name in inodes:
        fs.unlink(d, name)


def test_atime_of_directories_follows_the_policy(fs: Filesystem) -> None:
    d = mkdir(fs, b"d")
    mkfile(fs, b"f", parent=d)
    list(fs.readdir(d))
    read = fs.getattr(d).atime
    assert read > fs.getattr(d).mtime
    list(fs.readdir(d))
    assert fs.getattr(d).atime == read
    fs.times.policy = "strictatime"
    list(fs.readdir(d))
    assert fs.getattr(d).atime > read
    fs.times.policy = "noatime"
    read = fs.getattr(d).atime
    mkfile(fs, b"g", parent=d)
    list(fs.readdir(d))
    assert fs.getattr(d).atime == read
    assert read % SECOND == 0


def test_failing_at_the_last_moment_changes_nothing(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong before the seal, the decoded copies are those of the region."""
    d = mkdir(fs, b"d")
    mkfile(fs, b"f", b"x" * 5000, d)
    before, space = tree(fs), fs.statfs()

    def broken(*_: object) -> None:
        raise FsError(errno.EIO)

    monkeypatch.setattr(fs.volume.journal, "commit", broken)
    for operation in (
        lambda: mkfile(fs, b"new", parent=d),
        lambda: fs.unlink(d, b"f"),
        lambda: fs.rename(d, b"f", ROOT, b"g"),
        lambda: fs.setattr(fs.resolve(b"d/f"), SetAttr(size=5 << 20)),
        lambda: fs.setattr(fs.resolve(b"d/f"), SetAttr(size=0)),
        lambda: fs.setxattr(d, b"user.x", b"v" * 5000),
    ):
        with fails(errno.EIO):
            operation()
        assert (tree(fs), fs.statfs()) == (before, space)
        assert_sound(fs)
