"""What VFIO refuses is refused, with its errno and one line, and nothing has changed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pkernfs.errors import FsError
from pkernfs.format import Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import devices, domain, mapping, reclaim, replace, views
from pkernfs.iommu.restore import restore
from pkernfs.iommu.walk import walk, walk_device
from tests.core.support import ME, ROOT, check, mkdir
from tests.iommu.space import BASE, DEVICE, OTHER, GiB, KiB, MiB, guest, make, new

HT = 0xFD_0000_0000  #: where HyperTransport's addresses begin


def refused(fs: Filesystem, number: int, call: Callable[[], Any]) -> str:
    """A call fails with the errno, one line, and changes nothing; the line."""
    before = views.list_all(fs), fs.statfs()
    with pytest.raises(FsError) as caught:
        call()
    assert caught.value.errno == number, str(caught.value)
    assert (views.list_all(fs), fs.statfs()) == before
    assert check(fs.volume) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "number", "rule"),
    [
        pytest.param({"iova": 0x800}, errno.EINVAL, "multiples of 4 KiB", id="iova-not-aligned"),
        pytest.param({"length": 0x1800}, errno.EINVAL, "multiples of 4 KiB", id="length-not-aligned"),
        pytest.param({"offset": 0x10}, errno.EINVAL, "multiple of 4 KiB", id="offset-not-aligned"),
        pytest.param({"offset": 8 * MiB}, errno.EINVAL, "expected a length", id="nothing-left"),
        pytest.param({"offset": 9 * MiB, "length": 4 * KiB}, errno.EINVAL, "where the file ends", id="behind-the-end"),
        pytest.param({"length": 8 * MiB + 4 * KiB}, errno.EINVAL, "where the file ends", id="beyond-the-end"),
        pytest.param({"iova": 1 << 48}, errno.EINVAL, "IOVAs of 4 levels", id="beyond-the-width"),
        pytest.param({"iova": (1 << 48) - 4 * MiB}, errno.EINVAL, "IOVAs of 4 levels", id="end-beyond-the-width"),
        pytest.param({"iova": (1 << 64) - 4 * KiB}, errno.EINVAL, "IOVAs of 4 levels", id="wraps"),
        pytest.param({"iova": 0xFEE00000, "length": 4 * KiB}, errno.EINVAL, "never reaches", id="interrupts"),
        pytest.param({"iova": 0xFEC00000}, errno.EINVAL, "never reaches", id="over-interrupts"),
        pytest.param({"iova": 0x1001000}, errno.EEXIST, "are mapped already", id="overlaps-the-end"),
        pytest.param({"iova": 0xC00000}, errno.EEXIST, "are mapped already", id="overlaps-the-start"),
        pytest.param({"access": "none"}, errno.EINVAL, "rw, ro or wo", id="no-access"),
        pytest.param({"iova": GiB, "live_update": True}, errno.ENOENT, "not mapped", id="live-update-of-nothing"),
        pytest.param(
            {"iova": 16 * MiB, "access": "ro", "live_update": True},
            errno.EEXIST,
            "mapped to inode",
            id="other-rights",
        ),
        pytest.param(
            {"iova": 16 * MiB, "offset": MiB, "live_update": True},
            errno.EEXIST,
            "mapped to inode",
            id="other-offset",
        ),
    ],
)
def test_map_refuses(words: dict[str, Any], number: int, rule: str) -> None:
    fs = make()
    file, dom = guest(fs), new(fs)
    mapping.map_file(fs, dom, 16 * MiB, file)
    words = {"iova": 64 * MiB, **words}
    assert rule in refused(fs, number, lambda: mapping.map_file(fs, dom, file_ino=file, **words))


def test_map_refuses_what_is_no_guest_memory() -> None:
    fs = make()
    dom, directory = new(fs), mkdir(fs, b"d")
    tables, file = new(fs, b"dom-1"), guest(fs)
    assert "page tables" in refused(fs, errno.EPERM, lambda: mapping.map_file(fs, dom, 0, tables))
    assert "regular file" in refused(fs, errno.EINVAL, lambda: mapping.map_file(fs, dom, 0, directory))
    assert "domain" in refused(fs, errno.EINVAL, lambda: mapping.map_file(fs, file, 0, directory))
    refused(fs, errno.ESTALE, lambda: mapping.map_file(fs, dom, 0, Ino(directory + 1000)))


def test_hypertransport_is_reserved_for_amd_only() -> None:
    fs = make()
    file = guest(fs)
    amd, vtd = new(fs, b"amd", "amd"), new(fs, b"vtd")
    assert "never reaches" in refused(fs, errno.EINVAL, lambda: mapping.map_file(fs, amd, HT, file))
    mapping.map_file(fs, vtd, HT, file)


def test_unmap_refuses() -> None:
    fs = make()
    file, dom = guest(fs), new(fs)
    mapping.map_file(fs, dom, 16 * MiB, file)
    assert "4 KiB" in refused(fs, errno.EINVAL, lambda: mapping.unmap(fs, dom, 16 * MiB + 1, 4 * KiB))
    assert "found 0" in refused(fs, errno.EINVAL, lambda: mapping.unmap(fs, dom, 16 * MiB, 0))
    assert "nothing is mapped" in refused(fs, errno.ENOENT, lambda: mapping.unmap(fs, dom, 24 * MiB, 4 * KiB))
    assert "4 levels" in refused(fs, errno.EINVAL, lambda: mapping.unmap(fs, dom, 0, (1 << 48) + 4 * KiB))
    assert mapping.unmap(fs, dom, 0, 1 << 48) == 8 * MiB


def test_a_full_region() -> None:
    """Tables need a block that is not there: nothing is half mapped, and it works when there is one."""
    fs = make(32 * MiB)
    file, dom = guest(fs, size=MiB), new(fs)
    for at in range(1, 165):  # three tables each: of levels 3, 2 and 1
        mapping.map_file(fs, dom, at << 39, file, 0, 4 * KiB)
    filler = guest(fs, b"filler", 2 * MiB)
    while fs.volume.space.free_blocks:
        fs.setattr(filler, SetAttr(size=fs.getattr(filler).size + 2 * MiB))
    for at in range(165, 255):
        if views.domain_facts(fs, dom, "").tables + 3 > 511:
            break
        mapping.map_file(fs, dom, at << 39, file, 0, 4 * KiB)
    assert "page tables" in refused(fs, errno.ENOSPC, lambda: mapping.map_file(fs, dom, at << 39, file, 0, 4 * KiB))
    assert views.audit(fs).problems == []
    fs.setattr(filler, SetAttr(size=0))
    mapping.map_file(fs, dom, at << 39, file, 0, 4 * KiB)
    assert fs.getattr(dom).size == 4 * MiB
    assert views.audit(fs).problems == []


def test_devices() -> None:
    fs = make()
    dom, other = new(fs), new(fs, b"dom-1")
    assert "not attached" in refused(fs, errno.ENOENT, lambda: devices.detach(fs, DEVICE))
    devices.attach(fs, dom, DEVICE)
    assert "attached to dom-0" in refused(fs, errno.EBUSY, lambda: devices.attach(fs, other, DEVICE))
    assert "attached to dom-0" in refused(fs, errno.EBUSY, lambda: devices.attach(fs, dom, DEVICE))
    refused(fs, errno.EBUSY, lambda: domain.destroy(fs, dom))
    refused(fs, errno.ENOENT, lambda: walk_device(fs, OTHER, 0))
    devices.detach(fs, DEVICE)
    domain.destroy(fs, dom)


def test_a_domain_that_was_removed_and_is_still_open() -> None:
    fs = make()
    dom, file = new(fs), guest(fs)
    fs.lookups.add(dom)
    domain.destroy(fs, dom)
    assert "was removed" in refused(fs, errno.ENOENT, lambda: devices.attach(fs, dom, DEVICE))
    assert "was removed" in refused(fs, errno.ENOENT, lambda: mapping.map_file(fs, dom, 0, file))
    fs.reclaimer.forget(dom, 1)
    assert fs.orphans.inos() == []


def test_a_persistent_device_is_claimed_by_its_owner() -> None:
    fs = make()
    dom, other = new(fs), new(fs, b"dom-1")
    devices.attach(fs, dom, DEVICE, persistent=True)
    assert restore(fs) == []
    assert views.domain_facts(fs, dom, "dom-0").devices[0].state == "deferred"
    refused(fs, errno.EBUSY, lambda: devices.attach(fs, other, DEVICE))
    devices.attach(fs, dom, DEVICE)
    assert views.domain_facts(fs, dom, "dom-0").devices[0].state == "attached"
    assert views.domain_facts(fs, dom, "dom-0").devices[0].persistent
    refused(fs, errno.EBUSY, lambda: devices.attach(fs, dom, DEVICE))


def test_ids_are_not_used_again_before_hardware_has_invalidated_them() -> None:
    fs = make()
    ids = {name: views.domain_facts(fs, new(fs, name), "").id for name in (b"a", b"b")}
    assert sorted(ids.values()) == [1, 2]
    devices.attach(fs, fs.resolve(b"iommu/a"), DEVICE)
    devices.detach(fs, DEVICE)
    domain.destroy(fs, fs.resolve(b"iommu/a"))
    assert views.domain_facts(fs, new(fs, b"c"), "").id == 3
    reclaim.acknowledge(fs)
    assert views.domain_facts(fs, new(fs, b"d"), "").id == 1


def test_a_request_that_comes_again_is_not_executed_twice() -> None:
    fs = make()
    file = guest(fs)
    dom = domain.create(fs, b"dom-0", "vtd", 4, ME, key=1)
    assert domain.create(fs, b"dom-0", "vtd", 4, ME, key=1) == dom
    first = mapping.map_file(fs, dom, 0, file, key=2)
    assert mapping.map_file(fs, dom, 0, file, key=2) == first
    devices.attach(fs, dom, DEVICE, key=3)
    devices.attach(fs, dom, DEVICE, key=3)
    assert [mapping.unmap(fs, dom, 0, MiB, key=4) for _ in range(2)] == [MiB, MiB]
    devices.detach(fs, DEVICE, key=5)
    devices.detach(fs, DEVICE, key=5)
    assert replace.replace(fs, dom, key=6).before == replace.replace(fs, dom, key=6).before
    domain.destroy(fs, dom, key=7)
    domain.destroy(fs, dom, key=7)
    assert fs.getattr(file).iommu == 1, "what awaits an invalidation"
    token = views.invalidations(fs).token
    assert reclaim.acknowledge(fs, token, key=8) == reclaim.acknowledge(fs, token, key=8)
    assert fs.getattr(file).iommu == 0


def test_a_hole_gets_memory_when_it_is_mapped() -> None:
    fs = make()
    ino, dom = guest(fs, size=0), new(fs)
    fs.write(ino, 6 * MiB, b"end")
    mapping.map_file(fs, dom, 0, ino)
    assert views.audit(fs).bytes == 6 * MiB + 4 * KiB
    assert fs.getattr(ino).pages * 4096 >= 6 * MiB + 4 * KiB
    assert (walk(fs, dom, 5).physical or 0) > BASE
    assert fs.read(ino, 0, MiB) == bytes(MiB)
    assert [entry.name for entry in fs.readdir(ROOT)] != []
