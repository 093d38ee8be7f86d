"""What is damaged fails by itself: all else goes on, and nothing that hardware walks is overwritten."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from pkernfs.errors import CorruptError
from pkernfs.format import Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import devices, domain, mapping, reclaim, replace, views
from pkernfs.iommu.restore import restore
from pkernfs.iommu.walk import walk, walk_device
from tests.core.support import fails, open_fs
from tests.iommu.space import BASE, DEVICE, OTHER, THIRD, GiB, KiB, MiB, guest, make, new

IOVA = 16 * MiB


def used() -> Filesystem:
    """Two domains, each with a device; the first has pages that wait for hardware."""
    fs = make()
    ino = guest(fs)
    for name, device in ((b"dom-0", DEVICE), (b"dom-1", OTHER)):
        mapping.map_file(fs, new(fs, name), IOVA, ino)
        devices.attach(fs, fs.resolve(b"iommu/" + name), device, persistent=True)
    replace.replace(fs, fs.resolve(b"iommu/dom-0"), 1)
    return fs


def first_word(fs: Filesystem, path: bytes) -> int:
    """The region offset of a file's first bytes."""
    return fs.content.extents(fs.resolve(path))[0].page * 4096


def spoil_records(fs: Filesystem, ino: Ino) -> None:
    """Change a byte in the tree of records."""
    at = fs.getattr(ino).iommu * 4096 + 96
    fs.region.store_word(at, ~fs.region.word(at) & 0xFFFFFFFFFFFFFFFF)


@pytest.mark.parametrize("word", [0, 1], ids=["nothing-is-used", "tables-are-free"])
@pytest.mark.parametrize(
    ("path", "change"),
    [
        pytest.param(b"iommu/dom-1", lambda fs, dom, ino: mapping.map_file(fs, dom, GiB, ino), id="map"),
        pytest.param(b"iommu/dom-1", lambda fs, dom, ino: mapping.unmap(fs, dom, IOVA, 4 * KiB), id="unmap"),
        pytest.param(b"iommu/dom-1", lambda fs, dom, ino: replace.replace(fs, dom), id="replace"),
        pytest.param(b"iommu/root-pgtables", lambda fs, dom, ino: devices.attach(fs, dom, THIRD), id="attach"),
    ],
)
def test_a_wrong_bitmap_gives_no_table_away(
    path: bytes, change: Callable[[Filesystem, Ino, Ino], object], word: int
) -> None:
    fs = used()
    fs.region.store_word(first_word(fs, path), word)
    fs = open_fs(fs.region)
    dom = fs.resolve(b"iommu/dom-1")
    before = walk_device(fs, OTHER, IOVA)
    tables = bytes(fs.region.view[first_word(fs, path) + 4096 : first_word(fs, path) + 2 * MiB])
    with pytest.raises(CorruptError):
        change(fs, dom, fs.resolve(b"guest"))
    assert bytes(fs.region.view[first_word(fs, path) + 4096 : first_word(fs, path) + 2 * MiB]) == tables
    assert walk_device(fs, OTHER, IOVA) == before


@pytest.mark.parametrize("word", [0, 1])
def test_tables_are_made_anew_after_damage_was_noticed(word: int) -> None:
    fs = used()
    dom = fs.resolve(b"iommu/dom-0")
    fs.region.store_word(first_word(fs, b"iommu/dom-0"), word)
    fs.region.store_word(walk(fs, dom, IOVA).steps[-1].address - BASE, 0)
    for look in (
        lambda: mapping.map_file(fs, dom, IOVA, fs.resolve(b"guest"), live_update=True),
        lambda: replace.replace(fs, dom),
    ):
        with pytest.raises(CorruptError) as caught:
            look()
        fs.volume.damage.note(caught.value)
    replace.replace(fs, dom, rebuild=True)
    assert views.audit(fs).problems == []
    reclaim.acknowledge(fs)
    assert views.audit(fs).problems == []


def test_one_domain_does_not_stop_the_others() -> None:
    fs = used()
    spoil_records(fs, fs.resolve(b"iommu/dom-0"))
    replace.replace(fs, fs.resolve(b"iommu/dom-1"), 1)
    fs = open_fs(fs.region)
    listed = views.list_all(fs)
    assert [one.name for one in listed.domains] == ["dom-1"]
    assert [one.name for one in listed.damaged] == ["dom-0"]
    assert reclaim.acknowledge(fs) > 0
    assert views.domain_facts(fs, new(fs, b"dom-2"), "").id == 3
    assert restore(fs, cold=True) == ["0000:00:05.0", "0000:00:06.0"]


@pytest.mark.parametrize("which", ["domain", "root-pgtables"])
def test_a_removed_domain_that_cannot_be_read_waits(which: str) -> None:
    """For fsck; all else goes on."""
    fs = used()
    dom = fs.resolve(b"iommu/dom-0")
    devices.detach(fs, DEVICE)
    spoiled = dom if which == "domain" else fs.resolve(b"iommu/root-pgtables")
    fs.lookups.add(dom)
    domain.destroy(fs, dom)
    spoil_records(fs, spoiled)
    fs = open_fs(fs.region)
    assert dom in fs.orphans.inos()
    guest(fs, b"other", MiB)
    with fails(errno.ENOENT):
        fs.resolve(b"iommu/dom-0")
