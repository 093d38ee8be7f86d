"""Memory that hardware may still reach is nobody's until it is acknowledged that it cannot any more."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs.format import (
    AWAITING,
    AWAITING_KEY,
    BLOCK,
    PAGE,
    RO_COMPAT_AWAITING,
    ROOT_PGTABLES_INO,
    AwaitingContent,
    FilePage,
    Ino,
)
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.reclaim import ASIDE
from pkernfs.iommu import devices, domain, mapping, reclaim, replace, views
from pkernfs.iommu.awaiting import awaiting
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.records import Records
from pkernfs.iommu.restore import restore
from pkernfs.region import MemoryRegion, open_region
from tests.core.support import ME, ROOT, assert_sound, fails, mkdir, mkfile, open_fs
from tests.golden.image import HERE, to_region
from tests.iommu.space import DEVICE, OTHER, GiB, MiB, guest, make, new
from tests.iommu.stamped import scattered_files
from tests.reader.reader import Reader

SIZE = 4 * BLOCK
RAM = b"ram"


def pages_of(fs: Filesystem, ino: Ino) -> set[int]:
    """The pages of the region that are an inode's content."""
    return {page for extent in fs.content.extents(ino) for page in range(extent.page, extent.page + extent.length)}


def records(fs: Filesystem) -> int:
    return len(list(awaiting(Records(fs.volume, ROOT_PGTABLES_INO))))


def resize(fs: Filesystem, ino: Ino, *sizes: int) -> None:
    for size in sizes:
        fs.setattr(ino, SetAttr(size=size))


def all_that_is_free(fs: Filesystem) -> set[int]:
    """The pages that others can have: of files that take all of the free blocks, and what is left, page by page."""
    taken: set[int] = set()
    for number, step in enumerate((BLOCK, PAGE)):
        ino = fs.create(ROOT, b"taken-%d" % number, 0o100600, ME)
        with fails(errno.ENOSPC):
            while True:
                resize(fs, ino, fs.getattr(ino).size + step)
        taken |= pages_of(fs, ino)
    for number in range(2):
        fs.unlink(ROOT, b"taken-%d" % number)
    fs.reclaimer.settle()
    return taken


def in_use(fs: Filesystem) -> tuple[Ino, Ino]:
    """A domain to which a device is attached, and a file that is mapped in it; nothing is pending."""
    file, dom = guest(fs, RAM, SIZE), new(fs)
    devices.attach(fs, dom, DEVICE, persistent=True)
    mapping.map_file(fs, dom, GiB, file)
    reclaim.acknowledge(fs)
    return dom, file


def unmap(fs: Filesystem, dom: Ino) -> None:
    mapping.unmap(fs, dom, GiB, SIZE)


def rename_over(fs: Filesystem, file: Ino) -> None:
    assert fs.lookup(ROOT, RAM) == file
    mkfile(fs, b"new")
    fs.rename(ROOT, b"new", ROOT, RAM)


def detach_and_destroy(fs: Filesystem, dom: Ino) -> None:
    devices.detach(fs, DEVICE)
    domain.destroy(fs, dom)


def detach_and_remove(fs: Filesystem, dom: Ino) -> None:
    """As rm(1) removes the file of a domain."""
    devices.detach(fs, DEVICE)
    assert fs.lookup(fs.resolve(b"iommu"), b"dom-0") == dom
    fs.unlink(fs.resolve(b"iommu"), b"dom-0")


def detach_and_unmap(fs: Filesystem, dom: Ino) -> None:
    devices.detach(fs, DEVICE)
    unmap(fs, dom)


def replace_and_unmap(fs: Filesystem, dom: Ino) -> None:
    """The old tables are still what hardware may walk."""
    replace.replace(fs, dom, 1)
    unmap(fs, dom)


def block_and_unmap(fs: Filesystem, dom: Ino) -> None:
    """At a mount, as the device is not persistent."""
    devices.detach(fs, DEVICE)
    devices.attach(fs, dom, DEVICE)
    reclaim.acknowledge(fs)
    assert restore(fs) == ["0000:00:05.0"]
    unmap(fs, dom)


def block_and_destroy(fs: Filesystem, dom: Ino) -> None:
    devices.detach(fs, DEVICE)
    devices.attach(fs, dom, DEVICE)
    reclaim.acknowledge(fs)
    restore(fs)
    domain.destroy(fs, dom)


def unmap_in_parts(fs: Filesystem, dom: Ino) -> None:
    for at in range(0, SIZE, BLOCK // 2):
        mapping.unmap(fs, dom, GiB + at, BLOCK // 2)


TAKING_AWAY: dict[str, Callable[[Filesystem, Ino], None]] = {
    "unmap": unmap,
    "unmap-in-parts": unmap_in_parts,
    "detach-and-unmap": detach_and_unmap,
    "replace-and-unmap": replace_and_unmap,
    "detach-and-destroy": detach_and_destroy,
    "detach-and-remove": detach_and_remove,
    "block-and-unmap": block_and_unmap,
    "block-and-destroy": block_and_destroy,
}
REMOVING: dict[str, Callable[[Filesystem, Ino], None]] = {
    "unlink": lambda fs, _: fs.unlink(ROOT, RAM),
    "rename-over": rename_over,
    "cut-to-nothing": lambda fs, file: resize(fs, file, 0),
    "cut-and-grow": lambda fs, file: resize(fs, file, 0, SIZE),
    "cut-in-steps": lambda fs, file: resize(fs, file, SIZE - BLOCK, BLOCK, 0),
}


#: Each way of taking away, and each of removing; the others are slow.
SOME = {(taking, removing) for taking in TAKING_AWAY for removing in ("unlink", "cut-and-grow")} | {
    ("unmap", removing) for removing in REMOVING
}


@pytest.mark.parametrize("background", [False, True], ids=["at-once", "in-background"])
@pytest.mark.parametrize(
    ("taking", "removing"),
    [
        pytest.param(*pair, marks=() if pair in SOME else pytest.mark.slow)
        for pair in itertools.product(TAKING_AWAY, REMOVING)
    ],
)
def test_it_is_not_given_out(taking: str, removing: str, background: bool) -> None:
    fs = make(40 * MiB)
    free = fs.statfs().free
    dom, file = in_use(fs)
    fs.reclaimer.in_background = background
    old = pages_of(fs, file)
    TAKING_AWAY[taking](fs, dom)
    REMOVING[removing](fs, file)
    fs.reclaimer.settle()
    assert fs.volume.sb.ro_compat & RO_COMPAT_AWAITING
    assert not old & all_that_is_free(fs)
    assert fs.guard.kept_bytes() >= SIZE
    assert_sound(fs)
    if removing == "cut-and-grow":
        assert not old & pages_of(fs, file)
    # What a device still stores there is seen by nobody.
    for page in old:
        fs.region.store(page * PAGE, b"\xdb" * PAGE)
    fs = open_fs(MemoryRegion(image=fs.region.view))
    restore(fs)
    assert not old & all_that_is_free(fs)
    assert_sound(fs)
    # After the acknowledgement it comes back, and is zero.
    reclaim.acknowledge(fs)
    fs.reclaimer.settle()
    assert (records(fs), fs.guard.kept_bytes()) == (0, 0)
    if removing not in ("cut-and-grow", "rename-over"):
        assert old <= all_that_is_free(fs)
    ino = fs.create(ROOT, b"next", 0o100600, ME)
    resize(fs, ino, SIZE)
    assert bytes(fs.read(ino, 0, SIZE)) == bytes(SIZE)
    assert_sound(fs)
    for name in {entry.name for entry in fs.readdir(ROOT)} - {b"iommu"}:
        fs.unlink(ROOT, name)
    for name in {entry.name for entry in fs.readdir(fs.resolve(b"iommu"))} - {b"root-pgtables"}:
        if fs.getattr(fs.resolve(b"iommu/" + name)).nlink:
            reclaim.acknowledge(fs)
            for device in views.attachments_of(fs):
                devices.detach(fs, device)
            reclaim.acknowledge(fs)
            domain.destroy(fs, fs.resolve(b"iommu/" + name))
    assert free - fs.statfs().free <= 2 * BLOCK // PAGE, "root-pgtables, and a slab"


def test_the_second_reader_tells_the_same() -> None:
    fs = make()
    dom, file = in_use(fs)
    unmap(fs, dom)
    resize(fs, file, 2 * BLOCK)
    (aside,) = fs.orphans.inos()
    reader = Reader(fs.region.view)
    reader.tree()
    assert sorted(reader.awaiting()) == sorted(
        [(file, 1, 0, 2 * BLOCK), (aside, 1, 2 * BLOCK, 2 * BLOCK)],
    )
    assert reader.pinned() == {file: 1, aside: 1}


def test_without_devices_all_is_free_at_once() -> None:
    fs = make()
    file, dom = guest(fs, RAM, SIZE), new(fs)
    mapping.map_file(fs, dom, GiB, file)
    old = pages_of(fs, file)
    fs.unlink(ROOT, RAM)
    unmap(fs, dom)
    assert old <= all_that_is_free(fs)
    assert (records(fs), fs.volume.sb.ro_compat & RO_COMPAT_AWAITING) == (0, 0)
    # Nor after a device has come and gone, and all was acknowledged.
    file = guest(fs, RAM, SIZE)
    devices.attach(fs, dom, DEVICE)
    mapping.map_file(fs, dom, GiB, file)
    devices.detach(fs, DEVICE)
    reclaim.acknowledge(fs)
    old = pages_of(fs, file)
    fs.unlink(ROOT, RAM)
    domain.destroy(fs, dom)
    assert old <= all_that_is_free(fs)
    assert (records(fs), fs.volume.sb.ro_compat & RO_COMPAT_AWAITING) == (0, 0)


def test_a_live_mapping_is_not_cut_and_what_is_below_it_stays() -> None:
    fs = make()
    dom, file = in_use(fs)
    old = pages_of(fs, file)
    mapping.unmap(fs, dom, GiB + 2 * BLOCK, 2 * BLOCK)
    with fails(errno.EBUSY):
        resize(fs, file, BLOCK)
    resize(fs, file, 2 * BLOCK)
    assert pages_of(fs, file) < old
    assert not old & all_that_is_free(fs)
    assert [pin.length for pin in fs.guard.describe_pins(file)] == [2 * BLOCK]
    assert_sound(fs)
    unmap(fs, dom)
    resize(fs, file, 0)
    assert not old & all_that_is_free(fs)
    reclaim.acknowledge(fs)
    assert old <= all_that_is_free(fs)
    assert_sound(fs)


def test_a_file_that_stays_keeps_its_memory_and_its_content() -> None:
    """It does not move either, neither into blocks nor out of them."""
    fs = make()
    dom, file = in_use(fs)
    fs.write(file, 0, b"kept")
    old = pages_of(fs, file)
    unmap(fs, dom)
    resize(fs, file, SIZE - PAGE)
    resize(fs, file, 100)
    assert pages_of(fs, file) < old
    assert bytes(fs.read(file, 0, 4)) == b"kept"
    resize(fs, file, SIZE)
    assert bytes(fs.read(file, 0, SIZE)) == b"kept" + bytes(SIZE - 4)
    assert len(pages_of(fs, file) & old) == BLOCK // PAGE, "the block that was needed in part"
    reclaim.acknowledge(fs)
    assert fs.getattr(file).iommu == 0
    assert_sound(fs)


@pytest.mark.parametrize("background", [False, True], ids=["at-once", "in-background"])
def test_a_file_of_many_extents_is_put_aside_in_steps(background: bool) -> None:
    fs = make()
    dom, file = new(fs), mkfile(fs, RAM)
    devices.attach(fs, dom, DEVICE)
    for page in range(0, 4 * (2 * ASIDE + 50), 4):
        fs.write(file, page * PAGE, b"x")
        mapping.map_file(fs, dom, GiB + page * PAGE, file, page * PAGE, PAGE)
    old = pages_of(fs, file)
    mapping.unmap(fs, dom, GiB, GiB)
    assert records(fs) == 1
    fs.reclaimer.in_background = background
    resize(fs, file, 3 * PAGE)
    assert bool(fs.reclaimer.pending) == background
    if background:
        fs.reclaimer.step()
        assert_sound(fs)
        # What is appended meanwhile does not come to lie in what is to be put aside.
        fs.write(file, 3 * PAGE, b"a" * 500 * PAGE)
    else:
        fs.write(file, 3 * PAGE, b"a" * 500 * PAGE)
    assert len(pages_of(fs, file) & old) == 1
    fs.reclaimer.settle()
    assert_sound(fs)
    assert len(fs.orphans.inos()) == 3
    assert not (old - pages_of(fs, file)) & all_that_is_free(fs)
    reclaim.acknowledge(fs)
    fs.reclaimer.settle()
    assert fs.orphans.inos() == []
    assert len(old - pages_of(fs, file) - all_that_is_free(fs)) < 16, "what the trees of the others have taken"
    assert_sound(fs)


def test_a_full_region() -> None:
    """A cut succeeds; the file grows again when there is room, and says what would make some until then."""
    fs = make(32 * MiB)
    _, file = scattered_files(fs, (b"other", RAM), 300)
    dom = new(fs)
    devices.attach(fs, dom, DEVICE)
    mapping.map_file(fs, dom, GiB, file)
    mapping.unmap(fs, dom, GiB, fs.getattr(file).size)
    old = pages_of(fs, file)
    filler = fs.create(ROOT, b"filler", 0o100600, ME)
    for step in (BLOCK, PAGE):
        with fails(errno.ENOSPC):
            while True:
                resize(fs, filler, fs.getattr(filler).size + step)
    with fails(errno.ENOSPC):  # no slot of an inode is free either
        for number in range(1000):
            fs.create(ROOT, b"%d" % number, 0o100600, ME)
    resize(fs, file, 0)
    assert fs.getattr(file).size == 0
    with fails(errno.ENOSPC):
        fs.write(file, 0, b"x")
    with fails(errno.ENOSPC):
        resize(fs, file, PAGE)
    assert_sound(fs)
    fs = open_fs(MemoryRegion(image=fs.region.view))
    assert pages_of(fs, file) == old
    reclaim.acknowledge(fs)
    assert pages_of(fs, file) == set()
    resize(fs, file, 300 * PAGE)
    assert_sound(fs)


def test_what_there_is_to_do_is_told() -> None:
    fs = make()
    dom, file = in_use(fs)
    assert fs.guard.how_to_release() == ""
    fs.unlink(ROOT, RAM)
    unmap(fs, dom)
    token = views.invalidations(fs).token
    assert fs.guard.how_to_release().startswith(f"{SIZE} bytes await an invalidation: ")
    assert fs.guard.how_to_release().endswith(f"--ack {token}")
    assert views.invalidations(fs).awaiting == SIZE
    assert [(one.id, one.offset, one.length) for one in fs.guard.describe_awaiting(file)] == [(1, 0, SIZE)]
    with fails(errno.EAGAIN):
        reclaim.acknowledge(fs, token + 1)
    assert records(fs) == 1
    reclaim.acknowledge(fs, token)
    assert fs.guard.kept_bytes() == 0


def test_it_counts_against_the_quota_of_its_owner() -> None:
    fs = make()
    directory = mkdir(fs, b"tenant")
    fs.quotas.set(directory, SIZE + BLOCK)
    file = mkfile(fs, RAM, parent=directory)
    resize(fs, file, SIZE)
    dom = new(fs)
    devices.attach(fs, dom, DEVICE)
    mapping.map_file(fs, dom, GiB, file)
    unmap(fs, dom)
    resize(fs, file, 0)
    assert fs.quotas.get(directory)[2] >= SIZE
    with fails(errno.EDQUOT):
        resize(fs, file, SIZE)
    assert_sound(fs)
    fs.unlink(directory, RAM)
    fs.rmdir(ROOT, b"tenant")
    assert_sound(fs)
    assert fs.guard.kept_bytes() == SIZE
    reclaim.acknowledge(fs)
    assert_sound(fs)


def test_a_full_quota_does_not_keep_a_file_from_being_cut() -> None:
    fs = make()
    directory = mkdir(fs, b"tenant")
    file = mkfile(fs, RAM, parent=directory)
    resize(fs, file, SIZE)
    fs.quotas.set(directory, GiB)
    fs.quotas.set(directory, fs.quotas.get(directory)[2])
    dom = new(fs)
    devices.attach(fs, dom, DEVICE)
    mapping.map_file(fs, dom, GiB, file)
    unmap(fs, dom)
    old = pages_of(fs, file)
    resize(fs, file, 0)
    with fails(errno.EDQUOT):
        fs.write(file, 0, b"x")
    assert not old & all_that_is_free(fs)
    assert_sound(fs)
    reclaim.acknowledge(fs)
    fs.write(file, 0, b"x")
    assert old - pages_of(fs, file) <= all_that_is_free(fs)
    assert_sound(fs)


def test_a_file_in_two_domains() -> None:
    """Of one it waits, while it is mapped in the other."""
    fs = make()
    dom, file = in_use(fs)
    other = new(fs, b"dom-1")
    devices.attach(fs, other, OTHER)
    mapping.map_file(fs, other, 0, file)
    old = pages_of(fs, file)
    unmap(fs, dom)
    fs.unlink(ROOT, RAM)
    assert (fs.getattr(file).iommu, fs.guard.kept_bytes()) == (2, 0)
    mapping.unmap(fs, other, 0, SIZE)
    assert (records(fs), fs.guard.kept_bytes()) == (2, SIZE)
    assert not old & all_that_is_free(fs)
    reclaim.acknowledge(fs)
    assert old <= all_that_is_free(fs)
    assert_sound(fs)


def test_it_is_mapped_again() -> None:
    fs = make()
    dom, file = in_use(fs)
    unmap(fs, dom)
    mapping.map_file(fs, dom, GiB, file)
    reclaim.acknowledge(fs)
    assert fs.getattr(file).iommu == 1
    with fails(errno.EBUSY):
        resize(fs, file, 0)
    assert_sound(fs)


def test_a_file_that_is_open_without_a_name() -> None:
    fs = make()
    dom, file = in_use(fs)
    old = pages_of(fs, file)
    fs.lookups.add(file)
    fs.unlink(ROOT, RAM)
    unmap(fs, dom)
    resize(fs, file, 0)
    fs.write(file, 0, b"x" * SIZE)
    assert not old & pages_of(fs, file)
    fs.reclaimer.forget(file, 1)
    assert not old & all_that_is_free(fs)
    reclaim.acknowledge(fs)
    assert old <= all_that_is_free(fs)
    assert fs.orphans.inos() == []
    assert_sound(fs)


def test_a_cold_mount_releases_it() -> None:
    fs = make()
    dom, file = in_use(fs)
    old = pages_of(fs, file)
    fs.unlink(ROOT, RAM)
    unmap(fs, dom)
    fs = open_fs(MemoryRegion(image=fs.region.view))
    restore(fs, cold=True)
    assert old <= all_that_is_free(fs)
    assert_sound(fs)


def test_thousands_of_files_in_bounded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the parts leaves what is to be acknowledged again."""
    fs = make(32 * MiB)
    dom = new(fs)
    devices.attach(fs, dom, DEVICE)
    files = [mkfile(fs, b"%d" % number, b"x") for number in range(1300)]
    for number, file in enumerate(files):
        mapping.map_file(fs, dom, GiB + number * PAGE, file)
    old = set().union(*(pages_of(fs, file) for file in files))
    mapping.unmap(fs, dom, GiB, len(files) * PAGE)
    assert records(fs) == len(files)
    for number in range(len(files)):
        fs.unlink(ROOT, b"%d" % number)
    images: list[bytes] = []
    commit = fs.volume.journal.commit

    def keep(*args: object) -> None:
        commit(*args)  # type: ignore[arg-type]
        if len(images) < 4:
            images.append(bytes(fs.region.view))

    token = views.invalidations(fs).token
    monkeypatch.setattr(fs.volume.journal, "commit", keep)
    reclaim.acknowledge(fs, token, key=77)
    assert records(fs) == 0
    left = []
    for image in images:
        one = open_fs(MemoryRegion(image=image))
        assert_sound(one)
        left.append(records(one))
        reclaim.acknowledge(one, token, key=77)
        assert records(one) == 0
        assert old <= all_that_is_free(one)
        assert_sound(one)
    assert left[0] > 0
    assert all(after <= before for before, after in itertools.pairwise(left))
    assert left[-1] == 0


def test_a_region_of_an_earlier_release(tmp_path: Path) -> None:
    """What is pending there goes on being so; the feature comes with the first content that waits."""
    path = tmp_path / "region"
    to_region((HERE / "format-1.txt").read_text(), path)
    with open_region(str(path)) as region:
        fs = open_filesystem(region)
        assert views.pending_facts(fs)
        assert (fs.volume.sb.ro_compat & RO_COMPAT_AWAITING, records(fs)) == (0, 0)
        dom, ram = fs.resolve(b"iommu/dom-0"), fs.resolve(b"guest-ram")
        mapping.unmap(fs, dom, 0, 2 * MiB)
        assert (fs.volume.sb.ro_compat & RO_COMPAT_AWAITING, records(fs)) == (RO_COMPAT_AWAITING, 1)
        assert_sound(fs)
    with open_region(str(path)) as region:
        fs = open_filesystem(region)
        restore(fs)
        assert [one.id for one in fs.guard.describe_awaiting(ram)] == [1]
        reclaim.acknowledge(fs)
        assert (records(fs), views.pending_facts(fs)) == (0, [])
        assert_sound(fs)


def test_a_record_that_names_nothing_keeps_no_other_from_being_released() -> None:
    fs = make()
    dom, _ = in_use(fs)
    fs.unlink(ROOT, RAM)
    unmap(fs, dom)
    with fs.volume.transaction() as tx:
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        roots.put(tx, AWAITING_KEY + (12345678 << 16) + 1, AWAITING.pack(AwaitingContent(FilePage(0), 1)))
        roots.finish(tx)
    assert fs.guard.kept_bytes() == SIZE
    reclaim.acknowledge(fs)
    assert fs.orphans.inos() == []
    assert records(fs) == 1
    assert not fs.volume.damage.found


def test_mappings_by_the_thousand_leave_one_record() -> None:
    fs = make()
    file, dom = guest(fs, RAM, SIZE), new(fs)
    devices.attach(fs, dom, DEVICE)
    for page in range(1500):
        mapping.map_file(fs, dom, GiB + 2 * page * PAGE, file, page * PAGE, PAGE)
    assert mapping.unmap(fs, dom, GiB, GiB) == 1500 * PAGE
    assert records(fs) == 1
    ((_, _, first, end),) = awaiting(Records(fs.volume, ROOT_PGTABLES_INO))
    assert (first, end) == (0, 1500)
    assert fs.getattr(file).iommu == 1
    assert_sound(fs)
