"""Files of page tables, and the pins that mappings are for files: what is mapped neither goes nor moves."""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pkernfs.api import Pin
from pkernfs.errors import FsError
from pkernfs.format import (
    BLOCK,
    FLAG_FILE,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    FLAG_REGION_MAPPED,
    IOMMU_INO,
    PAGE,
    ROOT_PGTABLES_INO,
    Ino,
)
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.facts import file_facts
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.reclaim import STEP
from pkernfs.fs.rename import RENAME_EXCHANGE
from pkernfs.iommu.directory import domains
from pkernfs.iommu.pins import pins_of
from pkernfs.region import MemoryRegion
from tests.core.support import (
    ME,
    ROOT,
    MiB,
    assert_sound,
    attach,
    content,
    fails,
    full,
    map_file,
    mkdir,
    mkdomain,
    mkfile,
    new_fs,
    open_fs,
    unchanged,
    unmap,
)


@pytest.fixture
def fs() -> Filesystem:
    return new_fs(32)


def resize(fs: Filesystem, ino: Ino, size: int) -> None:
    fs.setattr(ino, SetAttr(size=size))


def again(fs: Filesystem) -> Filesystem:
    """The filesystem as the next mount finds it after a crash."""
    return open_fs(MemoryRegion(image=fs.region.view))


# -- domains ----------------------------------------------------------------------------------------------------------


def test_a_file_in_iommu_is_a_domain(fs: Filesystem) -> None:
    ino = mkfile(fs, b"dom-0", parent=IOMMU_INO)
    assert fs.getattr(ino).flags == FLAG_FILE | FLAG_IOMMU_DOMAIN_PGTABLES
    assert fs.getattr(mkfile(fs, b"elsewhere")).flags == FLAG_FILE
    assert list(domains(fs.volume)) == [("dom-0", ino)]


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_nothing_else_is_made_there(fs: Filesystem, kind: int) -> None:
    unchanged(fs, errno.EPERM, lambda: fs.create(IOMMU_INO, b"x", kind | 0o600, ME))


def test_names_stay_in_iommu(fs: Filesystem) -> None:
    domain = mkdomain(fs)
    other = mkdomain(fs, b"dom-1")
    file = mkfile(fs, b"f", b"x")
    refused: list[Callable[[], object]] = [
        lambda: fs.link(domain, ROOT, b"x"),
        lambda: fs.link(domain, IOMMU_INO, b"x"),
        lambda: fs.link(file, IOMMU_INO, b"x"),
        lambda: fs.rename(IOMMU_INO, b"dom-0", ROOT, b"x"),
        lambda: fs.rename(IOMMU_INO, b"dom-0", ROOT, b"f"),
        lambda: fs.rename(ROOT, b"f", IOMMU_INO, b"x"),
        lambda: fs.rename(ROOT, b"f", IOMMU_INO, b"dom-0"),
        lambda: fs.rename(ROOT, b"f", IOMMU_INO, b"dom-0", RENAME_EXCHANGE),
        lambda: fs.rename(IOMMU_INO, b"dom-0", ROOT, b"f", RENAME_EXCHANGE),
        lambda: fs.rename(IOMMU_INO, b"dom-0", IOMMU_INO, b"root-pgtables"),
    ]
    for operation in refused:
        unchanged(fs, errno.EPERM, operation)
    fs.rename(IOMMU_INO, b"dom-0", IOMMU_INO, b"new")
    assert fs.lookup(IOMMU_INO, b"new") == domain
    fs.rename(IOMMU_INO, b"new", IOMMU_INO, b"dom-1", RENAME_EXCHANGE)
    fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"new")
    assert fs.lookup(IOMMU_INO, b"new") == domain
    with fails(errno.ESTALE):
        fs.getattr(other)
    assert_sound(fs)


def test_a_domain_with_a_device_keeps_its_name(fs: Filesystem) -> None:
    domain = mkdomain(fs)
    mkdomain(fs, b"dom-1")
    attach(fs, 0x28, domain)
    unchanged(fs, errno.EBUSY, lambda: fs.unlink(IOMMU_INO, b"dom-0"))
    unchanged(fs, errno.EBUSY, lambda: fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-0"))
    fs.rename(IOMMU_INO, b"dom-0", IOMMU_INO, b"dom-2")
    fs.unlink(IOMMU_INO, b"dom-1")
    assert_sound(fs)


@pytest.mark.parametrize("small", [0, 1200], ids=["full", "only-pages-free"])
def test_no_block_for_the_first(fs: Filesystem, small: int) -> None:
    domain = mkdomain(fs, size=0)
    for n in range(small):
        mkfile(fs, b"%d" % n, b"x")
    full(fs)
    for n in range(0, small, 2):
        fs.unlink(ROOT, b"%d" % n)
    assert fs.statfs().free >= small / 2
    assert not fs.volume.space.free_blocks
    unchanged(fs, errno.ENOSPC, lambda: resize(fs, domain, BLOCK))


def test_the_first_block(fs: Filesystem) -> None:
    """A whole one, with the bitmap's own bit set."""
    domain = mkdomain(fs, size=0)
    resize(fs, domain, BLOCK)
    (extent,) = fs.content.extents(domain)
    assert (extent.start, extent.page % 512, extent.length) == (0, 0, 512)
    assert content(fs, domain) == b"\1" + bytes(BLOCK - 1)
    assert_sound(fs)


def test_a_failed_first_block_leaves_zeros(fs: Filesystem) -> None:
    """The bit is stored before the transaction is: what does not become a domain's must be zero again."""
    fs.quotas.set(IOMMU_INO, MiB)
    domain = mkdomain(fs, size=0)
    unchanged(fs, errno.EDQUOT, lambda: resize(fs, domain, BLOCK))
    file = mkfile(fs, b"f")
    resize(fs, file, 3 * BLOCK)
    assert content(fs, file) == bytes(3 * BLOCK)


@pytest.mark.parametrize("size", [0, 1, PAGE, BLOCK - 1, BLOCK + 1, 2 * BLOCK, 1 << 50])
def test_other_sizes_are_refused(fs: Filesystem, size: int) -> None:
    domain = mkdomain(fs)
    unchanged(fs, errno.EPERM, lambda: resize(fs, domain, size))
    empty = mkdomain(fs, b"empty", size=0)
    if size:
        unchanged(fs, errno.EPERM, lambda: resize(fs, empty, size))
        unchanged(fs, errno.EPERM, lambda: resize(fs, ROOT_PGTABLES_INO, size))


def test_the_present_size_is_accepted(fs: Filesystem) -> None:
    domain = mkdomain(fs)
    before = content(fs, domain)
    for ino in (domain, mkdomain(fs, b"empty", size=0), ROOT_PGTABLES_INO):
        resize(fs, ino, fs.getattr(ino).size)
    assert content(fs, domain) == before
    unchanged(fs, errno.EPERM, lambda: resize(fs, ROOT_PGTABLES_INO, BLOCK))


def test_only_the_api_changes_tables(fs: Filesystem) -> None:
    domain = mkdomain(fs)
    for ino in (domain, ROOT_PGTABLES_INO):
        unchanged(fs, errno.EPERM, partial(fs.write, ino, 0, b"x"))
        unchanged(fs, errno.EPERM, partial(fs.attributes.set_region_mapped, ino, True))
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC):
            fs.attributes.check_open(ino, flags)
        with fails(errno.EPERM):
            fs.attributes.check_open(ino, os.O_RDWR)
    with fails(errno.EPERM):
        fs.attributes.check_open(IOMMU_INO, os.O_RDWR | os.O_CREAT)
    fs.attributes.check_open(IOMMU_INO, os.O_WRONLY | os.O_CREAT)
    fs.attributes.check_open(mkfile(fs, b"f"), os.O_RDWR)
    fs.setattr(domain, SetAttr(mode=0o600, mtime=7))
    fs.setxattr(domain, b"user.a", b"b")
    assert_sound(fs)


# -- pins -------------------------------------------------------------------------------------------------------------


def mapped(fs: Filesystem, pages: int = 10) -> tuple[Ino, Ino]:
    """A domain, and a file whose pages 2 to 4 it maps at page 0x100."""
    domain = mkdomain(fs)
    file = mkfile(fs, b"ram", b"R" * pages * PAGE)
    map_file(fs, domain, 0x100, file, 2, 3)
    return domain, file


def test_mappings_of_a_file(fs: Filesystem) -> None:
    domain, file = mapped(fs)
    second = mkdomain(fs, b"dom-1")
    map_file(fs, second, 0x500, mkfile(fs, b"other", b"x"))
    map_file(fs, second, 0x400, file, 0, 10)
    found = {(pin.name, pin.iova // PAGE, pin.mapping.start, pin.mapping.length) for pin in pins_of(fs.volume, file)}
    assert found == {("dom-0", 0x100, 2, 3), ("dom-1", 0x400, 0, 10)}
    assert list(pins_of(fs.volume, domain)) == []
    assert fs.getattr(file).iommu == 2


def test_what_is_mapped_is_not_cut(fs: Filesystem) -> None:
    domain, file = mapped(fs)
    for size in (0, 1, 2 * PAGE, 4 * PAGE):
        with pytest.raises(FsError, match='domain "dom-0" at IOVA 0x100000') as caught:
            resize(fs, file, size)
        assert caught.value.errno == errno.EBUSY
    for size in (9 * PAGE, 30 * PAGE, 5 * PAGE, 4 * PAGE + 1):
        resize(fs, file, size)
    unmap(fs, domain, 0x100)
    resize(fs, file, 0)
    assert_sound(fs)


def test_what_is_mapped_does_not_move(fs: Filesystem) -> None:
    """Neither into a block when the file grows, nor out of one when it is cut."""
    domain = mkdomain(fs)
    small = mkfile(fs, b"small", b"s" * PAGE)
    large = mkfile(fs, b"large", b"l" * 600 * PAGE)
    places = [fs.content.extents(ino)[0].page for ino in (small, large)]
    map_file(fs, domain, 0, small)
    map_file(fs, domain, 1, large)
    fs.write(small, PAGE, b"s" * 400 * PAGE)
    resize(fs, large, PAGE)
    assert [fs.content.extents(ino)[0].page for ino in (small, large)] == places
    unmap(fs, domain, 1)
    resize(fs, large, 2 * PAGE)
    resize(fs, large, PAGE)
    assert fs.content.extents(large)[0].page != places[1]
    assert_sound(fs)


@pytest.mark.parametrize("way", ["unlink", "rename-over", "open-and-forget"])
def test_what_is_mapped_stays_without_a_name(fs: Filesystem, way: str) -> None:
    domain, file = mapped(fs)
    if way == "open-and-forget":
        fs.lookups.add(file)
    if way == "rename-over":
        mkfile(fs, b"new")
        fs.rename(ROOT, b"new", ROOT, b"ram")
    else:
        fs.unlink(ROOT, b"ram")
    if way == "open-and-forget":
        fs.reclaimer.forget(file, 1)
    place = fs.content.extents(file)[0].page
    for _ in range(2):
        assert fs.orphans.inos() == [file]
        assert fs.region.read((place + 2) * PAGE, 3 * PAGE) == b"R" * 3 * PAGE
        assert_sound(fs)
        region = MemoryRegion(image=fs.region.view)
        fs.close()
        fs = open_fs(region)
    free = fs.statfs().free
    unmap(fs, domain, 0x100)
    assert fs.orphans.inos() == []
    assert fs.statfs().free == free + 10 + 1  # and the tree of the records
    assert_sound(fs)


def test_an_open_file_stays_after_its_last_mapping(fs: Filesystem) -> None:
    domain, file = mapped(fs)
    fs.lookups.add(file)
    fs.unlink(ROOT, b"ram")
    unmap(fs, domain, 0x100)
    assert content(fs, file) == b"R" * 10 * PAGE
    fs.reclaimer.forget(file, 1)
    assert fs.orphans.inos() == []
    assert_sound(fs)


def test_memory_beyond_a_mapping_is_still_freed(fs: Filesystem) -> None:
    """Of a file that was cut, and removed while the rest waited to be freed."""
    domain = mkdomain(fs)
    file = mkfile(fs, b"sparse")
    for page in range(0, 3 * (STEP + 8), 3):
        fs.write(file, page * PAGE, b"x")
    map_file(fs, domain, 0, file)
    fs.reclaimer.in_background = True
    resize(fs, file, PAGE)
    assert list(fs.reclaimer.pending) == [file]
    fs.unlink(ROOT, b"sparse")
    fs.reclaimer.settle()
    assert [extent.start for extent in fs.content.extents(file)] == [0]
    assert fs.orphans.inos() == [file]
    assert not fs.reclaimer.awaits_forget()
    assert_sound(fs)


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("way", ["unlink", "rename-over"])
def test_removing_a_domain_drops_its_pins(fs: Filesystem, way: str, opened: bool, in_background: bool) -> None:
    domain, file = mapped(fs)
    kept = mkfile(fs, b"kept", b"k" * PAGE)
    for n in range(3 * STEP):
        map_file(fs, domain, 0x1000 + n, file if n % 2 else kept)
    fs.unlink(ROOT, b"ram")
    mkdomain(fs, b"dom-1", size=0)
    fs.reclaimer.in_background = in_background
    if opened:
        fs.lookups.add(domain)
    if way == "unlink":
        fs.unlink(IOMMU_INO, b"dom-0")
    else:
        fs.rename(IOMMU_INO, b"dom-1", IOMMU_INO, b"dom-0")
    assert fs.getattr(kept).iommu == 0
    fs.reclaimer.settle()
    with fails(errno.ESTALE):
        fs.getattr(file)
    assert_sound(fs)
    if opened:
        assert fs.orphans.inos() == [domain]
        assert fs.read(domain, 0, 8) == b"\1" + bytes(7)
        fs.reclaimer.forget(domain, 1)
        fs.reclaimer.settle()
    assert fs.orphans.inos() == []
    assert_sound(fs)


def test_a_domain_that_is_not_mapped_from_is_removed_at_once(fs: Filesystem) -> None:
    free = fs.statfs()
    mkdomain(fs)
    fs.unlink(IOMMU_INO, b"dom-0")
    assert fs.statfs() == free
    assert fs.orphans.inos() == []


def test_the_next_mount_finishes_what_removing_a_domain_began(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region as it is after each step of unlink(2)."""
    domain, file = mapped(fs)
    for n in range(3 * STEP):
        map_file(fs, domain, 0x1000 + n, file)
    fs.unlink(ROOT, b"ram")
    states: list[bytes] = []
    commit = fs.volume.journal.commit

    def keep(*args: Any) -> None:
        commit(*args)
        states.append(bytes(fs.region.view))

    monkeypatch.setattr(fs.volume.journal, "commit", keep)
    fs.unlink(IOMMU_INO, b"dom-0")
    assert len(states) >= 5
    for state in states:
        found = open_fs(MemoryRegion(image=state))
        assert found.orphans.inos() == []
        for ino in (domain, file):
            with fails(errno.ESTALE):
                found.getattr(ino)
        assert_sound(found)


def test_pins_of_a_file_that_is_a_guests_memory_too(fs: Filesystem) -> None:
    domain, file = mapped(fs)
    fs.attributes.set_region_mapped(file, True)
    fs.attributes.set_region_mapped(file, False)
    assert not fs.getattr(file).flags & FLAG_REGION_MAPPED
    unmap(fs, domain, 0x100)
    assert_sound(fs)


def test_pins_count_against_the_quota_of_the_directory(fs: Filesystem) -> None:
    limited = mkdir(fs, b"limited")
    fs.quotas.set(limited, 16 * MiB)
    domain = mkdomain(fs)
    file = mkfile(fs, b"ram", b"R" * 5 * PAGE, parent=limited)
    map_file(fs, domain, 0, file)
    fs.unlink(limited, b"ram")
    fs.rmdir(ROOT, b"limited")
    assert_sound(fs)
    unmap(fs, domain, 0)
    assert_sound(fs)


def test_info_shows_pins(fs: Filesystem) -> None:
    domain, file = mapped(fs)
    assert file_facts(fs, file).pins == [
        Pin(domain="dom-0", iova=0x100 * PAGE, offset=2 * PAGE, length=3 * PAGE, access="rw")
    ]
    assert file_facts(fs, domain).pins == []
