"""Files without a name that are still open, and large frees in several steps."""

import errno
import mmap
import stat
from collections.abc import Callable
from contextlib import suppress

import pytest

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import ORPHANS_INO, PAGE, Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.lookups import Lookups, lookups_size
from pkernfs.fs.reclaim import STEP
from pkernfs.region import MemoryRegion
from tests.core.support import (
    ROOT,
    MiB,
    assert_sound,
    content,
    fails,
    mkdir,
    mkfile,
    open_fs,
    patch_inode,
    shape,
    tree,
)


def sparse(fs: Filesystem, name: bytes, extents: int) -> Ino:
    """A file with many extents."""
    ino = mkfile(fs, name)
    for n in range(extents):
        fs.write(ino, n * 2 * PAGE, b"%d" % n)
    assert len(fs.content.extents(ino)) == extents
    return ino


def test_an_open_file_stays_until_its_forget(fs: Filesystem) -> None:
    space = fs.statfs()
    ino = mkfile(fs, b"f", b"still here")
    fs.setxattr(ino, b"user.a", b"v" * 5000)
    fs.lookups.add(ino)
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"f")
    assert fs.orphans.inos() == [ino]
    assert fs.getattr(ino).nlink == 0
    assert content(fs, ino) == b"still here"
    fs.write(ino, 2 * MiB, b"and can be written")
    fs.setattr(ino, SetAttr(size=2 * MiB + 3, mode=0o600))
    fs.removexattr(ino, b"user.a")
    assert content(fs, ino)[2 * MiB :] == b"and"
    assert_sound(fs)
    fs.reclaimer.forget(ino, 1)
    assert content(fs, ino)[:10] == b"still here"
    fs.reclaimer.forget(ino, 1)
    with fails(errno.ESTALE):
        fs.getattr(ino)
    assert fs.orphans.inos() == []
    assert fs.statfs() == space


@pytest.mark.parametrize("replaced", [True, False], ids=["renamed-over", "unlinked"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_several_orphans_in_any_order(fs: Filesystem, order: tuple[int, ...], replaced: bool) -> None:
    space = fs.statfs()
    inodes = [mkfile(fs, b"f%d" % n, b"%d" % n) for n in range(3)]
    for n, ino in enumerate(inodes):
        fs.lookups.add(ino)
        if replaced:
            mkfile(fs, b"new")
            fs.rename(ROOT, b"new", ROOT, b"f%d" % n)
        else:
            fs.unlink(ROOT, b"f%d" % n)
        assert_sound(fs)
    assert sorted(fs.orphans.inos()) == sorted(inodes)
    for n in order:
        assert content(fs, inodes[n]) == b"%d" % n
        fs.reclaimer.forget(inodes[n], 1)
        assert inodes[n] not in fs.orphans.inos()
        assert_sound(fs)
    if replaced:
        for n in range(3):
            fs.unlink(ROOT, b"f%d" % n)
    assert fs.statfs() == space


def test_open_directories_stay_too(fs: Filesystem) -> None:
    space = fs.statfs()
    a = mkdir(fs, b"a")
    b = mkdir(fs, b"b", a)
    fs.lookups.add(a)
    fs.lookups.add(b)
    fs.rmdir(a, b"b")
    fs.rmdir(ROOT, b"a")
    assert set(fs.orphans.inos()) == {a, b}
    assert fs.getattr(b).nlink == 0
    assert list(fs.readdir(b)) == []
    assert fs.lookup(b, b"..") == a
    assert_sound(fs)
    fs.reclaimer.forget(a, 1)
    fs.reclaimer.forget(b, 1)
    assert fs.statfs() == space


def test_forgetting_what_has_a_name_changes_nothing(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"x")
    fs.lookups.add(ino)
    before = tree(fs)
    fs.reclaimer.forget(ino, 1)
    fs.reclaimer.forget(ino, 10)
    fs.reclaimer.forget(ROOT, 1)
    fs.reclaimer.forget(Ino(999_999), 1)
    assert tree(fs) == before


def test_the_next_mount_frees_orphans(fs: Filesystem) -> None:
    space = fs.statfs()
    for n in range(5):
        ino = sparse(fs, b"f", 10 + n * 50) if n % 2 else mkfile(fs, b"f", b"x" * MiB)
        fs.setxattr(ino, b"user.a", b"v" * 700)
        fs.lookups.add(ino)
        fs.unlink(ROOT, b"f")
    assert len(fs.orphans.inos()) == 5
    image = bytes(fs.region.view)
    readonly = MemoryRegion(image=image)
    readonly.readonly = True
    assert len(open_fs(readonly).orphans.inos()) == 5
    assert bytes(readonly.view) == image
    again = open_fs(MemoryRegion(image=image))
    assert again.orphans.inos() == []
    assert again.statfs() == space
    assert_sound(again)
    for ino in fs.orphans.inos():
        fs.reclaimer.forget(ino, 1)


def test_close_frees_orphans_and_notes_the_end(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"x" * MiB)
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"f")
    region = MemoryRegion(image=fs.region.view)
    other = open_fs(region)
    other.volume.mark_mounted()
    region.close = lambda: None  # type: ignore[method-assign]
    other.close()
    assert open_fs(region).orphans.inos() == []
    assert 0 < other.volume.superblock_word("mounted") <= other.volume.superblock_word("unmounted")
    assert other.volume.superblock_word("mounts") == 1
    fs.reclaimer.forget(ino, 1)


@pytest.mark.parametrize("extents", [STEP - 1, STEP, STEP + 1, 5 * STEP])
def test_files_with_many_extents_are_freed_in_steps(fs: Filesystem, extents: Ino) -> None:
    space = fs.statfs()
    ino = sparse(fs, b"f", extents)
    fs.setattr(ino, SetAttr(size=3 * PAGE))
    assert fs.orphans.inos() == []
    assert len(fs.content.extents(ino)) == 2
    assert shape(fs, ino).content.rstrip(b"\0") == b"0".ljust(2 * PAGE, b"\0") + b"1"
    fs.unlink(ROOT, b"f")
    assert fs.statfs() == space
    sparse(fs, b"f", extents)
    fs.unlink(ROOT, b"f")
    assert fs.statfs() == space


def test_a_removed_open_file_can_be_cut(fs: Filesystem) -> None:
    space = fs.statfs()
    ino = sparse(fs, b"f", 3 * STEP)
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"f")
    free = fs.statfs().free
    fs.setattr(ino, SetAttr(size=0))
    assert fs.orphans.inos() == [ino]
    assert fs.getattr(ino).pages == 0, "its memory goes back at once"
    assert fs.statfs().free > free
    fs.reclaimer.forget(ino, 1)
    assert fs.statfs() == space


def test_large_frees_fit_in_the_journal(make_fs: Callable[..., Filesystem]) -> None:
    """Two files whose pages alternate in hundreds of slabs: each slab's header stays, and changes."""
    fs = make_fs(1300)
    space = fs.statfs()
    a, b = mkfile(fs, b"a"), mkfile(fs, b"b")
    part = b"x" * (255 * PAGE)
    for n in range(560):
        for ino in (a, b):
            fs.write(ino, n * 2 * MiB, part)
    assert len(fs.volume.space.slab_blocks()) > 550
    fs.setattr(a, SetAttr(size=1))
    assert fs.getattr(a).pages == 2, "one of content, one of the tree"
    fs.unlink(ROOT, b"b")
    fs.unlink(ROOT, b"a")
    assert fs.statfs() == space


def test_the_largest_transactions_fit_in_the_journal(make_fs: Callable[..., Filesystem]) -> None:
    """511 pages from 511 slabs, one by one, and then a block in their place."""
    fs = make_fs(1100)
    kept, singles = mkfile(fs, b"kept"), mkfile(fs, b"singles")
    for n in range(520):
        for half in (2 * n, 2 * n + 1):
            fs.write(kept, half * 2 * MiB, b"x" * (255 * PAGE))
        fs.write(singles, n * 2 * MiB, b"x" * PAGE)
    rest = mkfile(fs, b"rest")
    fs.setattr(rest, SetAttr(size=fs.volume.space.free_blocks * 2 * MiB))
    with fails(errno.ENOSPC):
        while True:
            fs.write(kept, fs.getattr(kept).size, b"x" * PAGE)
    fs.unlink(ROOT, b"singles")
    new = mkfile(fs, b"new")
    fs.setattr(new, SetAttr(size=511 * PAGE))
    assert len(fs.content.extents(new)) > 500
    assert_sound(fs)
    fs.setattr(rest, SetAttr(size=fs.getattr(rest).size - 2 * MiB))
    fs.setattr(new, SetAttr(size=512 * PAGE))
    assert len(fs.content.extents(new)) == 1


# -- freeing in the background ----------------------------------------------------------------------------------------


@pytest.fixture
def lazy(fs: Filesystem) -> Filesystem:
    """A filesystem that frees between other calls, as the server has it."""
    fs.reclaimer.in_background = True
    return fs


def test_background_steps_end(lazy: Filesystem) -> None:
    fs = lazy
    space = fs.statfs()
    ino = sparse(fs, b"f", 5 * STEP)
    fs.setattr(ino, SetAttr(size=0))
    assert list(fs.reclaimer.pending) == [ino]
    assert_sound(fs)
    steps = 0
    while fs.reclaimer.pending:
        fs.reclaimer.step()
        assert_sound(fs)
        steps += 1
    assert 3 <= steps <= 6
    assert fs.getattr(ino).pages == 0
    sparse(fs, b"g", 5 * STEP)
    fs.unlink(ROOT, b"g")
    assert fs.reclaimer.pending
    fs.unlink(ROOT, b"f")
    fs.reclaimer.settle()
    assert fs.statfs() == space


def test_a_file_being_cut_is_removed_while_it_is_open(lazy: Filesystem) -> None:
    """What is open stays: the steps may take what was cut off, and nothing else."""
    fs = lazy
    space = fs.statfs()
    ino = sparse(fs, b"f", 5 * STEP)
    fs.lookups.add(ino)
    fs.setattr(ino, SetAttr(size=PAGE))
    assert fs.reclaimer.pending
    fs.unlink(ROOT, b"f")
    fs.reclaimer.settle()
    assert content(fs, ino) == b"0".ljust(PAGE, b"\0")
    assert fs.orphans.inos() == [ino]
    assert_sound(fs)
    fs.reclaimer.forget(ino, 1)
    fs.reclaimer.settle()
    assert fs.statfs() == space


@pytest.mark.parametrize("left", [0, 1, STEP - 1])
@pytest.mark.parametrize("reused", [True, False], ids=["slot-reused", "slot-free"])
def test_a_file_being_cut_is_removed(lazy: Filesystem, left: int, reused: bool) -> None:
    """It may be so small by then that it goes at once; the steps do not meet whoever has its slot next."""
    fs = lazy
    space = fs.statfs()
    ino = sparse(fs, b"f", 2 * STEP + left)
    fs.setattr(ino, SetAttr(size=0))
    assert list(fs.reclaimer.pending) == [ino]
    if left:
        fs.reclaimer.step()
    fs.unlink(ROOT, b"f")
    if reused:
        again = mkfile(fs, b"g", b"new user of the slot")
    fs.reclaimer.settle()
    if reused:
        assert again == ino
        assert content(fs, again) == b"new user of the slot"
        fs.unlink(ROOT, b"g")
    assert fs.statfs() == space


def test_tiny_files_are_freed_together(lazy: Filesystem) -> None:
    """With one transaction, all but what is damaged."""
    fs = lazy
    space = fs.statfs()
    inos = [mkfile(fs, b"%d" % number, b"x" * number) for number in range(50)]
    for number, ino in enumerate(inos):
        fs.lookups.add(ino)
        fs.unlink(ROOT, b"%d" % number)
    for ino in inos:
        fs.reclaimer.forget(ino, 1)
    assert list(fs.reclaimer.pending) == fs.orphans.inos()[::-1] == inos
    sequence = fs.volume.journal.sequence
    fs.reclaimer.step()
    assert fs.volume.journal.sequence == sequence + 1
    assert (list(fs.reclaimer.pending), fs.orphans.inos(), fs.statfs()) == ([], [], space)
    assert_sound(fs)


def test_a_file_being_cut_grows_again(lazy: Filesystem) -> None:
    fs = lazy
    ino = sparse(fs, b"f", 5 * STEP)
    fs.setattr(ino, SetAttr(size=PAGE + 1))
    fs.setattr(ino, SetAttr(size=MiB))
    fs.write(ino, 3 * MiB, b"x" * MiB)
    fs.reclaimer.settle()
    assert content(fs, ino) == b"0".ljust(3 * MiB, b"\0") + b"x" * MiB
    assert fs.orphans.inos() == []


def test_a_file_being_cut_is_finished_by_the_next_mount(lazy: Filesystem) -> None:
    fs = lazy
    ino = sparse(fs, b"f", 5 * STEP)
    fs.setattr(ino, SetAttr(size=PAGE))
    assert fs.orphans.inos() == [ino]
    other = open_fs(MemoryRegion(image=fs.region.view))
    assert other.orphans.inos() == []
    assert other.getattr(ino).pages == 2
    assert content(other, ino) == b"0".ljust(PAGE, b"\0")
    assert_sound(other)
    fs.reclaimer.settle()


HOSTILE = {
    "nowhere": lambda a, b: {"orphan_next": 0},
    "itself": lambda a, b: {"orphan_next": a},
    "loop": lambda a, b: {"orphan_next": b},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_list_is_an_error_and_no_loop(fields: Callable[[int, int], dict[str, int]], fs: Filesystem) -> None:
    a, b = mkfile(fs, b"a"), mkfile(fs, b"b")
    for ino, name in ((a, b"a"), (b, b"b")):
        fs.lookups.add(ino)
        fs.unlink(ROOT, name)
    assert fs.orphans.inos() == [b, a]
    good = fs.getattr(a)
    patch_inode(fs, a, **fields(a, b))
    other = open_fs(MemoryRegion(image=fs.region.view))  # what is damaged is logged and left, the rest can be used
    with pytest.raises(CorruptError, match="the list of orphans"):
        other.orphans.inos()
    mkfile(other, b"c")
    other.unlink(ROOT, b"c")
    patch_inode(fs, a, orphan_next=good.orphan_next)
    assert good.orphan_next == ORPHANS_INO
    for ino in (a, b):
        assert stat.S_ISREG(fs.getattr(ino).mode)
        fs.reclaimer.forget(ino, 1)


def test_rename_of_a_listed_file_over_an_open_one(fs: Filesystem) -> None:
    """Listing the target changes the links of its neighbour, which may be the file that is renamed."""
    fs.reclaimer.in_background = True
    moved, target = sparse(fs, b"moved", 70), mkfile(fs, b"target", b"y")
    for ino in (moved, target):
        fs.lookups.add(ino)
    fs.setattr(moved, SetAttr(size=0))
    assert fs.orphans.inos() == [moved]
    fs.rename(ROOT, b"moved", ROOT, b"target")
    assert sorted(fs.orphans.inos()) == sorted([moved, target])
    assert_sound(fs)
    fs.reclaimer.settle()
    fs.reclaimer.forget(target, 1)
    fs.reclaimer.settle()
    assert fs.orphans.inos() == []
    fs.unlink(ROOT, b"target")
    fs.reclaimer.forget(moved, 1)
    fs.reclaimer.settle()


def test_growing_finishes_a_pending_cut(fs: Filesystem) -> None:
    fs.reclaimer.in_background = True
    ino = sparse(fs, b"f", 200)
    fs.setattr(ino, SetAttr(size=0))
    assert fs.reclaimer.pending
    fs.setattr(ino, SetAttr(size=2 * MiB))
    assert (fs.reclaimer.pending, fs.orphans.inos()) == ({}, [])
    assert content(fs, ino) == bytes(2 * MiB)


def test_shrinking_works_where_compaction_does_not(make_fs: Callable[..., Filesystem]) -> None:
    """A block that is hardly used stays one when there is no space to turn it into pages."""
    fs = make_fs(32)
    ino = mkfile(fs, b"f")
    fs.setattr(ino, SetAttr(size=2 * MiB))
    other = mkfile(fs, b"other")
    number = 0
    with suppress(FsError):
        while fs.write(other, 2 * number * PAGE, b"z" * PAGE):
            number += 1
    fs.setattr(ino, SetAttr(size=400 * 1024))
    assert fs.getattr(ino).size == 400 * 1024
    fs.unlink(ROOT, b"other")


def test_references_of_the_request_before_stand() -> None:
    """A server dies when it has answered one request, the next one dies within another: only that is counted anew."""
    memory = mmap.mmap(-1, lookups_size(MiB))
    first, second, third = 300, 301, 302
    one = Lookups(MiB, memory)
    one.begin(first, replayed=False)
    one.add(Ino(20))
    two = Lookups(MiB, memory)
    two.begin(second, replayed=False)
    two.add(Ino(21))
    three = Lookups(MiB, memory)
    three.begin(second, replayed=True)
    three.add(Ino(21))
    four = Lookups(MiB, memory)
    four.begin(second, replayed=True)
    four.add(Ino(21))
    four.begin(third, replayed=False)
    assert (four[Ino(20)], four[Ino(21)]) == (1, 1)
