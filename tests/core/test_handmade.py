"""Hostile images made by hand: the mount is refused with one line, or only what is damaged fails, and says so once."""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pkernfs import format as f
from pkernfs.errors import CorruptError, PkernfsError
from pkernfs.fs import cache
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.facts import region_facts
from pkernfs.fs.filesystem import Filesystem
from tests.core.faults import (
    flip,
    share_page,
    sparse_tree,
)
from tests.core.handmade import CASES, FAR, Case
from tests.core.images import CowRegion, cast
from tests.core.support import ME, ROOT, check_region, mkdir, mkfile, new_fs, open_fs, patch_inode, repair_region

#: Damage, what was found damaged, and what follows from an operation that failed.
SANE = {errno.EUCLEAN, errno.EROFS, errno.ENOENT, errno.ENODATA}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@functools.cache
def image() -> int:
    """A memory file with a filesystem that has a bit of everything."""
    fs = new_fs(20)
    cast(fs)
    fd = os.memfd_create("handmade")
    os.write(fd, fs.region.view)
    return fd


@pytest.fixture
def victim() -> Filesystem:
    """A view of it, for damage."""
    return open_fs(CowRegion(image()))


# -- using ------------------------------------------------------------------------------------------------------------


def attempt(fs: Filesystem, call: Callable[..., object], *args: Any) -> int:
    """The errno of a call, 0 when it works; damage is noted as the server does it."""
    try:
        call(*args)
    except CorruptError as error:
        fs.volume.damage.note(error)
        return error.errno
    except PkernfsError as error:
        return error.errno
    return 0


def readers(fs: Filesystem, path: bytes) -> Iterator[tuple[Any, ...]]:
    """The calls that read what is at a path, given its inode."""
    ino = fs.resolve(path)
    inode = fs.getattr(ino)
    yield fs.listxattr, ino
    for name in fs.listxattr(ino):
        yield fs.getxattr, ino, name
    if stat.S_ISDIR(inode.mode):
        yield (lambda: list(fs.readdir(ino)),)
    elif stat.S_ISLNK(inode.mode):
        yield fs.readlink, ino
    else:
        for offset in (0, 100_000, max(inode.size - 10, 0)):
            yield fs.read, ino, offset, 131_072
        yield fs.content.extents, ino


def changers(fs: Filesystem, path: bytes) -> Iterator[tuple[Any, ...]]:
    """Calls that change what is at a path, and leave it much as it was."""
    ino = fs.resolve(path)
    mode = fs.getattr(ino).mode
    yield fs.setattr, ino, SetAttr(mode=mode)
    yield fs.setxattr, ino, b"user.handmade", b"v"
    yield fs.removexattr, ino, b"user.handmade"
    if stat.S_ISDIR(mode):
        yield fs.create, ino, b"handmade", stat.S_IFREG | 0o600, ME
        yield fs.unlink, ino, b"handmade"
    elif stat.S_ISREG(mode):
        yield fs.write, ino, 0, b"written"
        yield fs.setattr, ino, SetAttr(size=fs.getattr(ino).size)


def results(fs: Filesystem, calls: Callable[[Filesystem, bytes], Iterator[tuple[Any, ...]]], path: bytes) -> set[int]:
    """The errnos of all calls."""
    found: set[int] = set()

    def all_calls() -> None:
        for call in calls(fs, path):
            found.add(attempt(fs, *call))

    found.add(attempt(fs, all_calls))
    return found - {0}


@ALL
def test_a_mount_is_refused_or_only_what_is_damaged_fails(
    victim: Filesystem, caplog: pytest.LogCaptureFixture, case: Case
) -> None:
    paths = [b"", b"d", b"d/f", b"g", b"empty", b"d/e", b"d/e/inner", b"big", b"sparse", b"link", b"iommu"]
    case.plant(victim)
    region = victim.region
    if case.refused:
        before = bytes(region.view)
        with pytest.raises(PkernfsError, match=case.refused) as caught:
            open_fs(region)
        assert "\n" not in str(caught.value)
        assert bytes(region.view) == before, "nothing was stored"
        return
    with caplog.at_level(logging.ERROR, "pkernfs"):
        fs = open_fs(region)
        below = {path for path in paths if any(path.startswith(one + b"/") for one in case.damaged)}
        tried = sorted({*paths, *case.damaged} - below | case.damaged)
        found = {path: results(fs, readers, path) for path in tried}
        assert {path for path, errnos in found.items() if errnos} <= case.damaged
        changed = {path: results(fs, changers, path) for path in tried}
        for path in case.held:
            assert errno.EPERM in changed[path]
            changed[path] -= {errno.EPERM, errno.ENODATA}
        assert set().union(*found.values(), *changed.values()) <= {
            errno.EUCLEAN,
            errno.EROFS,
            errno.ENOENT,
            errno.ENODATA,
        }
        failed = {path for path in tried if found[path] or changed[path]}
        assert failed == case.damaged
        expected = {path: {errno.EPERM} for path in case.held}
        again = {path: results(fs, changers, path) - expected.get(path, set()) for path in tried}
        assert {path for path, errnos in again.items() if errnos} == case.damaged
    facts = region_facts(fs).damaged
    offsets = [one.offset for one in facts]
    assert len(offsets) == len(set(offsets)) == len(caplog.records)
    assert bool(facts) >= bool(case.damaged)


@ALL
def test_what_is_hostile_is_found_and_mended(victim: Filesystem, case: Case) -> None:
    case.plant(victim)
    region = victim.region
    region.readonly = True
    problems, _ = check_region(region)
    region.readonly = False
    harmless = {"file-as-large-as-can-be", "orphan-with-names"}
    assert bool(problems) == (CASES_BY_ID[id(case)] not in harmless)
    assert repair_region(region).left == []
    fs = open_fs(region)
    for path in (b"", b"d/e/inner", b"iommu"):
        if path != b"d/e/inner" or not any(path.startswith(one) for one in case.damaged - {b""}):
            assert results(fs, readers, path) == set()


CASES_BY_ID = {id(case): name for name, case in CASES.items()}


# -- more than one operation ------------------------------------------------------------------------------------------


def test_what_two_files_share_is_freed_once(victim: Filesystem) -> None:
    share_page(victim)
    fs = open_fs(victim.region)
    one, two = fs.resolve(b"one"), fs.resolve(b"two")
    fs.write(two, 0, b"2")
    assert fs.read(one, 0, 9) == b"2"
    fs.unlink(ROOT, b"one")
    assert attempt(fs, fs.read, two, 0, 9) == errno.EUCLEAN
    assert attempt(fs, fs.unlink, ROOT, b"two") != 0
    mkfile(fs, b"three", b"3")
    assert attempt(fs, fs.write, two, 0, b"2") == errno.EROFS
    assert fs.read(fs.resolve(b"three"), 0, 9) == b"3"


def test_pages_that_one_file_has_twice_are_not_freed_twice(victim: Filesystem) -> None:
    """Counting them twice would let a slab go that is in use."""
    ino = mkfile(victim, b"twice", b"x" * f.PAGE)
    first = victim.content.extents(ino)[0]
    patch_inode(
        victim, ino, size=3 * f.PAGE, inline=f.EXTENT.pack(first) + f.EXTENT.pack(first._replace(start=f.FilePage(2)))
    )
    fs = open_fs(victim.region)
    assert attempt(fs, fs.unlink, ROOT, b"twice") == errno.EUCLEAN
    assert fs.resolve(b"twice") == ino
    assert fs.statfs() == victim.statfs()


def test_files_that_are_open_can_be_removed_while_the_list_of_orphans_is_damaged(victim: Filesystem) -> None:
    patch_inode(victim, f.ORPHANS_INO, orphan_next=FAR)
    fs = open_fs(victim.region)
    before = fs.statfs()
    ino = mkfile(fs, b"open", b"x" * 100_000)
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"open")
    assert fs.read(ino, 0, 9) == b"x" * 9
    assert {problem.code for problem in check_region(fs.region)[0]} == {"orphan-list"}
    fs.reclaimer.forget(ino, 1)
    assert fs.statfs() == before


def test_a_damaged_slab_is_not_allocated_from() -> None:
    """What is elsewhere can be used, and new files go elsewhere."""
    fs = new_fs(20)
    cast(fs)
    safe = mkfile(fs, b"safe", b"safe")
    while fs.volume.space.slab(f.BlockNo(safe // 16 // 512)).free:
        mkfile(fs, b"filler%d" % fs.statfs().free, b"x" * 200_000)
    other = mkfile(fs, b"other", b"other", mkdir(fs, b"otherdir"))
    slab = fs.content.extents(other)[0].page // 512
    assert slab != safe // 16 // 512
    flip(fs, slab * f.BLOCK + 100)
    fs = open_fs(fs.region)
    before = fs.statfs()
    assert [one.structure for one in region_facts(fs).damaged] == [f"the header of slab {slab}"]
    assert fs.read(safe, 0, 9) == b"safe"
    new = mkfile(fs, b"new", b"new")
    assert fs.content.extents(new)[0].page // 512 != slab
    assert fs.statfs().free < before.free
    assert fs.volume.damage.inodes == set()
    fs.unlink(ROOT, b"new")
    fs.write(safe, 0, b"SAFE")


def test_reading_keeps_a_bounded_number_of_decoded_objects(victim: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHED_INODES", 3)
    monkeypatch.setattr(cache, "CACHED_NODES", 2)
    sparse_tree(victim)
    fs = open_fs(victim.region)
    for _ in range(3):
        for path in (b"d/e/inner", b"g", b"big", b"sparse", b"link"):
            assert results(fs, readers, path) == set()
            assert len(fs.volume.inodes) <= 4
            assert len(fs.volume.nodes) <= 3


def test_findings_are_limited(victim: Filesystem, caplog: pytest.LogCaptureFixture) -> None:
    damage = victim.volume.damage
    with caplog.at_level(logging.ERROR, "pkernfs"):
        for n in range(3000):
            damage.note(CorruptError("test", n, "damage", ino=n + 1))
    assert len(damage.found) == 1000
    assert len(caplog.records) == 1001
    assert len(damage.inodes) == 3000


def test_the_name_of_a_damaged_directory_stays(victim: Filesystem) -> None:
    """What would change a damaged inode by way of others is refused as well."""
    ino = victim.resolve(b"empty")
    patch_inode(victim, ino, parent=ino)
    fs = open_fs(victim.region)
    for call in (
        lambda: fs.rmdir(ROOT, b"empty"),
        lambda: fs.rename(ROOT, b"empty", ROOT, b"new"),
        lambda: fs.rename(fs.resolve(b"d"), b"e", ROOT, b"empty"),
        lambda: fs.rename(ROOT, b"big", ino, b"in"),
    ):
        assert attempt(fs, call) in (errno.EUCLEAN, errno.EROFS)
    fs.rename(ROOT, b"big", ROOT, b"other")
