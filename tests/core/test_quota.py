"""Quotas of directories: what counts, what is refused, and that every count is that of a second counting."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import INODE_SIZE, PAGE, Ino, Quota
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.charge import quota_of, with_quota
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.quota import Use
from pkernfs.fs.rename import RENAME_EXCHANGE
from pkernfs.fs.times import Times
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import MemoryRegion, RecordingRegion
from tests.core.support import (
    ME,
    ROOT,
    MiB,
    assert_sound,
    check,
    content,
    fails,
    full,
    mkdir,
    mkfile,
    new_fs,
    open_fs,
    patch_inode,
    repair_region,
    tree,
    unchanged,
)


def used(fs: Filesystem, ino: Ino) -> int:
    """What the quota of ``ino`` says."""
    quota = fs.quotas.get(ino)
    assert quota.ino == ino
    return quota.used


def counted(fs: Filesystem, top: Ino) -> int:
    """The same, counted from the names, each file once; what is open only is left out."""
    seen = {top}
    todo = [top]
    while todo:
        for entry in fs.readdir(todo.pop()):
            seen.add(entry.ino)
            if stat.S_ISDIR(entry.mode):
                todo.append(entry.ino)
    return sum(INODE_SIZE + PAGE * fs.getattr(ino).pages for ino in seen)


def quotas(fs: Filesystem) -> list[Ino]:
    """All directories with a quota."""
    found = []
    todo = [ROOT]
    while todo:
        ino = todo.pop()
        if fs.getattr(ino).project == ino:
            found.append(ino)
        todo += [entry.ino for entry in fs.readdir(ino) if stat.S_ISDIR(entry.mode)]
    return found


@pytest.fixture
def d(fs: Filesystem) -> int:
    """A directory with a quota of 4 MiB."""
    ino = mkdir(fs, b"d")
    assert fs.quotas.set(ino, 4 * MiB) == Use(ino, 4 * MiB, INODE_SIZE)
    return ino


# -- what counts ------------------------------------------------------------------------------------------------------


def test_everything_below_counts(fs: Filesystem, d: Ino) -> None:
    e = mkdir(fs, b"e", d)
    ino = mkfile(fs, b"f", b"x" * 10_000, e)
    fs.setxattr(ino, b"user.a", b"v" * 9000)
    fs.create(e, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 999)
    fs.link(ino, d, b"g")
    for n in range(200):
        mkfile(fs, b"empty%d" % n, parent=e)
    assert used(fs, d) == counted(fs, d) > 200 * INODE_SIZE + 6 * PAGE
    assert fs.quotas.get(e) == fs.quotas.get(ino) == fs.quotas.get(d)
    assert fs.quotas.get(ROOT) == Use(Ino(0), 0, 0)


def test_removing_gives_all_back(fs: Filesystem, d: Ino) -> None:
    e = mkdir(fs, b"e", d)
    for n in range(50):
        mkfile(fs, b"f%d" % n, b"x" * 1000 * n, e)
    for n in range(50):
        fs.unlink(e, b"f%d" % n)
    fs.rmdir(d, b"e")
    assert used(fs, d) == INODE_SIZE


def test_an_open_file_counts_until_it_is_closed(fs: Filesystem, d: Ino) -> None:
    ino = mkfile(fs, b"f", b"x" * MiB, d)
    fs.lookups.add(ino)
    before = used(fs, d)
    fs.unlink(d, b"f")
    assert used(fs, d) == before - PAGE, "the page of names"
    fs.write(ino, 0, b"x" * (2 * MiB))
    with fails(errno.EDQUOT):
        fs.setattr(ino, SetAttr(size=5 * MiB))
    fs.reclaimer.forget(ino, 1)
    assert used(fs, d) == INODE_SIZE


def test_a_quota_stays_over_a_mount(fs: Filesystem, d: Ino) -> None:
    mkfile(fs, b"f", b"x" * MiB, d)
    before = fs.quotas.get(d)
    again = open_fs(MemoryRegion(image=fs.region.view))
    assert again.quotas.get(d) == before
    with fails(errno.EDQUOT):
        again.setattr(mkfile(again, b"g", parent=d), SetAttr(size=4 * MiB))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_every_way_to_take_more_is_refused(fs: Filesystem, d: Ino) -> None:
    ino = mkfile(fs, b"f", b"x" * PAGE, d)
    fs.setxattr(ino, b"user.a", b"v" * 9000)
    e = mkdir(fs, b"e", d)
    left = 3
    fs.quotas.set(d, used(fs, d) + left)
    for operation in (
        lambda: mkfile(fs, b"new", parent=d),
        lambda: mkdir(fs, b"new", d),
        lambda: fs.create(d, b"new", stat.S_IFIFO, ME),
        lambda: fs.create(e, b"new", stat.S_IFLNK, ME, target=b"t" * 999),
        lambda: fs.write(ino, PAGE, b"y"),
        lambda: fs.write(ino, 100 * MiB, b"y"),
        lambda: fs.setattr(ino, SetAttr(size=PAGE + 1)),
        lambda: fs.setattr(ino, SetAttr(size=32 * MiB)),
        lambda: fs.setxattr(ino, b"user.a", b"v" * 20_000),
        lambda: fs.setxattr(d, b"user.b", b"v"),
        lambda: fs.link(ino, e, b"new"),
    ):
        unchanged(fs, errno.EDQUOT, operation)
    # What takes nothing goes on, and so does everybody else.
    fs.write(ino, 0, b"z" * PAGE)
    fs.setattr(ino, SetAttr(mode=0o600))
    fs.rename(d, b"f", d, b"g")
    mkfile(fs, b"elsewhere", b"x" * (8 * MiB))


@pytest.mark.parametrize("limit", [1, 300, 100_000, MiB, 3 * MiB - 1, 3 * MiB, 5 * MiB + 12_345])
@pytest.mark.parametrize("step", [1000, 130_000, MiB])
def test_a_file_can_be_written_to_the_last_page(fs: Filesystem, limit: int, step: int) -> None:
    """Blocks of 2 MiB are taken while there is room for them, single pages at the end."""
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"f", parent=d)
    fs.quotas.set(d, limit)
    done = 0
    with fails(errno.EDQUOT):
        while True:
            done += fs.write(ino, done, b"x" * step)
    assert content(fs, ino) == b"x" * done
    # A tree for the extents may take some pages.
    assert limit - max(used(fs, d), limit - 4 * PAGE) <= 4 * PAGE
    assert done > limit - 8 * PAGE
    assert used(fs, d) == counted(fs, d)


def test_a_full_region_is_enospc_and_not_edquot(fs: Filesystem, d: Ino) -> None:
    fs.quotas.set(d, 1 << 40)
    full(fs)
    with fails(errno.ENOSPC):
        fs.write(mkfile(fs, b"f", parent=d), 0, b"x")


def test_deleting_works_beyond_the_limit(fs: Filesystem, d: Ino) -> None:
    ino = mkfile(fs, b"f", b"x" * (3 * MiB), d)
    for n in range(300):
        mkfile(fs, b"empty%d" % n, parent=d)
    assert fs.quotas.set(d, 1).limit == 1
    with fails(errno.EDQUOT):
        mkfile(fs, b"new", parent=d)
    fs.setattr(ino, SetAttr(size=MiB + 1))
    fs.setattr(ino, SetAttr(size=5))
    for n in range(300):
        fs.unlink(d, b"empty%d" % n)
    fs.unlink(d, b"f")
    assert used(fs, d) == INODE_SIZE


# -- from one quota to another ----------------------------------------------------------------------------------------


def test_nothing_moves_from_one_quota_to_another(fs: Filesystem, d: Ino) -> None:
    e = mkdir(fs, b"e")
    fs.quotas.set(e, 4 * MiB)
    mkdir(fs, b"sub", d)
    ino = mkfile(fs, b"in", b"x", d)
    out = mkfile(fs, b"out", b"x")
    mkfile(fs, b"other", b"x", e)
    for operation in (
        lambda: fs.rename(d, b"in", ROOT, b"new"),
        lambda: fs.rename(d, b"in", e, b"new"),
        lambda: fs.rename(d, b"sub", e, b"new"),
        lambda: fs.rename(d, b"in", e, b"other"),
        lambda: fs.rename(ROOT, b"out", d, b"new"),
        lambda: fs.rename(d, b"in", e, b"other", RENAME_EXCHANGE),
        lambda: fs.link(ino, ROOT, b"new"),
        lambda: fs.link(ino, e, b"new"),
        lambda: fs.link(out, d, b"new"),
    ):
        unchanged(fs, errno.EXDEV, operation)


def test_a_directory_with_a_quota_moves_with_it(fs: Filesystem, d: Ino) -> None:
    mkfile(fs, b"f", b"x" * 5000, d)
    before = fs.quotas.get(d)
    fs.rename(ROOT, b"d", mkdir(fs, b"e"), b"new")
    assert fs.quotas.get(d) == before
    inner = mkdir(fs, b"inner", d)
    fs.rename(d, b"inner", d, b"moved")
    assert fs.quotas.get(inner).ino == d


def test_a_removed_directory_leaves_nothing_behind(fs: Filesystem, d: Ino) -> None:
    """Not even when a file that counted for it is still open: that counts for what is above."""
    fs.quotas.set(ROOT, 40 * MiB)
    ino = mkfile(fs, b"f", b"x" * MiB, d)
    fs.lookups.add(ino)
    fs.unlink(d, b"f")
    fs.lookups.add(d)
    assert used(fs, ROOT) == counted(fs, ROOT) + INODE_SIZE + PAGE * fs.getattr(ino).pages
    fs.rmdir(ROOT, b"d")
    assert fs.getattr(ino).project == fs.getattr(d).project == ROOT
    fs.write(ino, MiB, b"x" * MiB)
    fs.reclaimer.forget(d, 1)
    fs.reclaimer.forget(ino, 1)
    assert used(fs, ROOT) == counted(fs, ROOT)


@pytest.mark.usefixtures("d")
def test_renamed_over(fs: Filesystem) -> None:
    mkdir(fs, b"e")
    fs.rename(ROOT, b"e", ROOT, b"d")
    assert quotas(fs) == []


# -- quotas within quotas ---------------------------------------------------------------------------------------------


def test_a_quota_holds_within_those_around_it(fs: Filesystem, d: Ino) -> None:
    e = mkdir(fs, b"e", mkdir(fs, b"between", d))
    fs.quotas.set(e, 3 * MiB)
    ino = mkfile(fs, b"f", b"x" * (2 * MiB), e)
    assert used(fs, e) == counted(fs, e)
    assert used(fs, d) == counted(fs, d)
    other = mkfile(fs, b"f", b"x" * MiB, d)
    with fails(errno.EDQUOT):
        fs.setattr(other, SetAttr(size=2 * MiB))
    with fails(errno.EDQUOT):
        fs.setattr(ino, SetAttr(size=3 * MiB))
    fs.unlink(e, b"f")
    assert used(fs, d) == counted(fs, d)


def test_a_quota_around_others(fs: Filesystem, d: Ino) -> None:
    mkfile(fs, b"f", b"x" * MiB, d)
    mkfile(fs, b"f", b"x" * 77)
    fs.quotas.set(ROOT, 32 * MiB)
    assert used(fs, ROOT) == counted(fs, ROOT)
    mkfile(fs, b"g", b"x" * MiB, d)
    assert used(fs, ROOT) == counted(fs, ROOT)
    assert used(fs, d) == counted(fs, d)
    fs.quotas.set(d, 0)
    assert used(fs, ROOT) == counted(fs, ROOT)
    assert fs.quotas.get(d).ino == ROOT
    fs.rename(d, b"g", ROOT, b"g")
    assert fs.quotas.set(ROOT, 0) == Use(Ino(0), 0, 0)
    assert quotas(fs) == []


# -- setting and taking away ------------------------------------------------------------------------------------------


def populated(fs: Filesystem) -> Ino:
    """A directory with some of everything, whose quota is set and taken away below."""
    d = mkdir(fs, b"d")
    e = mkdir(fs, b"e", d)
    for n in range(40):
        mkfile(fs, b"f%d" % n, b"x" * 500 * n, e)
    fs.link(fs.resolve(b"d/e/f1"), d, b"second")
    inner = mkdir(fs, b"inner", e)
    fs.quotas.set(inner, MiB)
    mkfile(fs, b"f", b"x" * 9000, inner)
    return d


def test_setting_and_taking_away_a_quota_of_what_is_there(fs: Filesystem) -> None:
    d = populated(fs)
    before = tree(fs)
    assert fs.quotas.set(d, 4 * MiB) == Use(d, 4 * MiB, counted(fs, d))
    assert tree(fs) == before
    assert fs.quotas.get(fs.resolve(b"d/e/f1")).ino == d
    assert fs.quotas.set(d, 5 * MiB) == Use(d, 5 * MiB, counted(fs, d))
    fs.quotas.set(d, 0)
    assert quotas(fs) == [fs.resolve(b"d/e/inner")]
    assert fs.quotas.set(d, 0) == Use(Ino(0), 0, 0)
    fs.rename(fs.resolve(b"d/e"), b"f3", ROOT, b"f3")
    assert tree(fs)[b"/d/e/f4"] == before[b"/d/e/f4"]


def test_a_file_with_a_name_elsewhere_cannot_count(fs: Filesystem) -> None:
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"f", b"x", d)
    fs.link(ino, d, b"g")
    fs.link(ino, ROOT, b"h")
    unchanged(fs, errno.EXDEV, lambda: fs.quotas.set(d, MiB))
    assert quotas(fs) == []
    fs.unlink(ROOT, b"h")
    fs.quotas.set(d, MiB)


def test_only_directories_have_quotas(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f")
    unchanged(fs, errno.ENOTDIR, lambda: fs.quotas.set(ino, MiB))


@pytest.mark.parametrize("limit", [4 * MiB, 0])
def test_a_crash_while_setting(limit: int) -> None:
    """What is left is sound, limits nothing, and is finished when the quota is set, or taken away, again."""
    fs = new_fs(16)
    d = populated(fs)
    if not limit:
        fs.quotas.set(d, 4 * MiB)
    image = bytes(fs.region.view)
    before = tree(fs)
    region = RecordingRegion(image=image)
    fs = open_fs(region)
    region.log.clear()
    wanted = fs.quotas.set(d, limit)
    cut = MemoryRegion(image=image)
    for store in region.log:
        cut.store(store.offset, store.data)
        again = open_fs(MemoryRegion(image=cut.view))
        assert check(again.volume) == []
        assert tree(again) == before
        assert again.quotas.set(d, limit) == wanted
        assert_sound(again)
        assert tree(again) == before


# -- anything ---------------------------------------------------------------------------------------------------------

DIRS = st.sampled_from([b"", b"a", b"b", b"a/c", b"a/d"])
NAMES = st.sampled_from([b"x", b"y", b"z"])
SIZES = st.sampled_from([0, 1, PAGE, 30_000, MiB, 2 * MiB + 1])
LIMITS = st.sampled_from([0, 1, 10_000, MiB, 3 * MiB, 100 * MiB])
STEPS = st.one_of(
    st.tuples(st.just("make"), DIRS, NAMES, SIZES),
    st.tuples(st.just("size"), DIRS, NAMES, SIZES),
    st.tuples(st.just("xattr"), DIRS, NAMES, st.sampled_from([10, 600, 9000])),
    st.tuples(st.just("remove"), DIRS, NAMES, st.none()),
    st.tuples(st.just("link"), DIRS, NAMES, DIRS),
    st.tuples(st.just("move"), DIRS, NAMES, DIRS),
    st.tuples(st.just("quota"), DIRS, st.none(), LIMITS),
)


def step(fs: Filesystem, kind: str, where: bytes, name: bytes, more: object) -> None:
    parent = fs.resolve(where)
    match kind, more:
        case "make", int(size):
            fs.write(mkfile(fs, name, parent=parent), 0, b"x" * size)
        case "size", int(size):
            fs.setattr(fs.lookup(parent, name), SetAttr(size=size))
        case "xattr", int(size):
            fs.setxattr(fs.lookup(parent, name), b"user.a", b"v" * size)
        case "remove", _:
            fs.unlink(parent, name)
        case "link", bytes(other):
            fs.link(fs.lookup(parent, name), fs.resolve(other), name)
        case "move", bytes(other):
            fs.rename(parent, name, fs.resolve(other), name)
        case "quota", int(limit):
            fs.quotas.set(parent, limit)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, max_size=30))
def test_counts_are_right_whatever_happens(steps: list[tuple[str, bytes, bytes, object]]) -> None:
    fs = new_fs(20)
    for path in (b"a", b"b", b"a/c", b"a/d"):
        mkdir(fs, os.path.basename(path), fs.resolve(os.path.dirname(path)))
    for words in steps:
        before = {ino: quota_of(fs.getattr(ino)) for ino in quotas(fs)}
        with suppress(FsError):
            step(fs, *words)
        for ino in quotas(fs):
            quota = quota_of(fs.getattr(ino))
            assert quota.used == counted(fs, ino)
            grown = ino in before and quota.used > before[ino].used
            assert not grown or quota.used <= quota.limit or quota.limit != before[ino].limit
    assert_sound(fs)


@pytest.fixture(autouse=True)
def _noatime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Times, "policy", "noatime")


def test_a_large_transaction_counts_once(make_fs: Callable[..., Filesystem]) -> None:
    """A retry without compaction does not count what was aborted."""
    fs = make_fs()
    d = mkdir(fs, b"d")
    fs.quotas.set(d, 2 * MiB + MiB // 2)
    ino = mkfile(fs, b"f", parent=d)
    fs.setattr(ino, SetAttr(size=2 * MiB + MiB // 4))
    assert used(fs, d) == counted(fs, d) < 2 * MiB + MiB // 2


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["itself", "each other"])
def test_quotas_around_themselves(loop: str) -> None:
    """Found by a check, and no endless loop for a user."""
    fs = new_fs(16)
    d, e = mkdir(fs, b"d"), mkdir(fs, b"e")
    fs.quotas.set(d, MiB)
    fs.quotas.set(e, MiB)
    patch_inode(fs, d, parent=d if loop == "itself" else e)
    patch_inode(fs, e, parent=d)
    with pytest.raises(CorruptError):
        mkfile(fs, b"f", parent=d)
    assert check(fs.volume)
    assert repair_region(fs.region).left == []
    mkfile(open_filesystem(fs.region), b"f", parent=d)


# -- files without a name ---------------------------------------------------------------------------------------------


def open_orphans(fs: Filesystem, d: Ino, count: int) -> list[Ino]:
    """Files that were removed from ``d`` and are still open."""
    found = []
    for n in range(count):
        found.append(mkfile(fs, b"open%d" % n, parent=d))
        fs.lookups.add(found[-1])
        fs.unlink(d, b"open%d" % n)
    return found


def test_taking_away_a_quota_of_open_files(fs: Filesystem, d: Ino) -> None:
    """They count above from then on."""
    fs.quotas.set(ROOT, 50 * MiB)
    (ino,) = open_orphans(fs, d, 1)
    fs.quotas.set(d, 0)
    fs.write(ino, 0, b"x" * MiB)
    assert used(fs, ROOT) == counted(fs, ROOT) + INODE_SIZE + PAGE * fs.getattr(ino).pages
    fs.rmdir(ROOT, b"d")
    fs.reclaimer.forget(ino, 1)
    assert used(fs, ROOT) == counted(fs, ROOT)


@pytest.mark.parametrize("how", ["rmdir", "rename"])
def test_removing_a_directory_with_many_open_files(fs: Filesystem, d: Ino, how: str) -> None:
    """More than one transaction can mark."""
    inos = open_orphans(fs, d, 9000)
    if how == "rmdir":
        fs.rmdir(ROOT, b"d")
    else:
        mkdir(fs, b"e")
        fs.rename(ROOT, b"e", ROOT, b"d")
    assert check(fs.volume) == []
    for ino in inos:
        fs.reclaimer.forget(ino, 1)


@pytest.mark.parametrize("used_now", [0, 1 << 63])
def test_a_wrong_count_is_noted_and_refuses_nothing(fs: Filesystem, d: Ino, used_now: int) -> None:
    ino = mkfile(fs, b"f", b"x" * 50_000, d)
    inode = fs.getattr(d)
    patch_inode(fs, d, inline=with_quota(inode, quota_of(inode)._replace(used=used_now)).inline)
    fs.setattr(ino, SetAttr(size=1))
    fs.unlink(d, b"f")
    assert any("quota" in error.what for error in fs.volume.damage.found.values())
    repair_region(fs.region)
    fs.volume.inodes.clear()


def test_a_quota_whose_directory_names_another(fs: Filesystem, d: Ino) -> None:
    """The directory is damaged, and its quota is not lost."""
    e = mkdir(fs, b"e", d)
    mkfile(fs, b"f", b"x", e)
    patch_inode(fs, d, project=0)
    with pytest.raises(CorruptError) as caught:
        mkfile(fs, b"g", parent=e)
    assert caught.value.ino == d
    fs.unlink(e, b"f")
    assert {problem.code for problem in check(fs.volume)} == {"project"}
    assert repair_region(fs.region).left == []
    again = open_filesystem(fs.region)
    assert again.quotas.get(e).limit == 4 * MiB
    fs.volume.inodes.clear()


def test_a_file_under_two_quotas(fs: Filesystem, d: Ino) -> None:
    """Which only damage makes: it counts for one of them."""
    ino = mkfile(fs, b"f", b"x", d)
    with fs.volume.transaction() as tx:
        directory = fs.names.directory(ROOT)
        directory.add(tx, b"g", ino, stat.S_IFREG)
        tx.put_inode(ROOT, directory.finish(0))
        tx.put_inode(ino, fs.getattr(ino)._replace(nlink=2))
    assert check(fs.volume) == []
    for project in (mkdir(fs, b"elsewhere"), 0):
        patch_inode(fs, ino, project=project)
        assert {problem.code for problem in check(fs.volume)} == {"project"}
        assert repair_region(fs.region).left == []
        fs.volume.inodes.clear()
        assert fs.getattr(ino).project == d


def test_a_removed_directory_that_has_a_quota(fs: Filesystem, d: Ino) -> None:
    """As only damage makes it: it goes with its quota."""
    fs.lookups.add(d)
    fs.rmdir(ROOT, b"d")
    inode = fs.getattr(d)
    patch_inode(fs, d, project=d, inline=with_quota(inode, Quota(MiB, INODE_SIZE)).inline)
    fs.reclaimer.forget(d, 1)
    assert check(fs.volume) == []


def test_below_a_directory_that_was_found_damaged(fs: Filesystem, d: Ino) -> None:
    """Its quota is not counted on, and still holds; what is below it is not damaged."""
    e = mkdir(fs, b"e", d)
    ino = mkfile(fs, b"f", b"x" * MiB, e)
    fs.volume.damage.note(CorruptError("an entry", d * INODE_SIZE, "damaged", ino=d))
    mkfile(fs, b"g", b"x", e)
    fs.write(ino, 2 * MiB, b"x")
    with fails(errno.EDQUOT):
        fs.setattr(ino, SetAttr(size=5 * MiB))
    fs.unlink(e, b"f")
    assert {problem.code for problem in check(fs.volume)} == {"quota"}
    assert repair_region(fs.region).left == []
    fs.volume.inodes.clear()
