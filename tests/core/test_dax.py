"""Device DAX without a device: shared mappings of a file stand for those of the device, which knows no others.

What only a device can show is shown on one in tests/guest/test_device.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import pkernfs.region.opening
from pkernfs.errors import FsError, RegionError
from pkernfs.fs.mkfs import mkfs
from pkernfs.fsck.check import check
from pkernfs.fsck.run import fsck
from pkernfs.region import DaxRegion, MemoryRegion, RecordingRegion, open_region
from pkernfs.region.dax import Device
from pkernfs.region.overlay import Overlay
from tests.core.images import cast
from tests.core.support import ROOT, MiB, mkfile, open_fs, tree

SIZE = 16 * MiB


class FileAsDevice(DaxRegion):
    """A file, opened as a device is."""

    align = 2 * MiB

    @staticmethod
    def device(fd: int, path: str) -> Device:  # noqa: ARG004  # as its base
        return Device(os.fstat(fd).st_size, FileAsDevice.align, 0)


@pytest.fixture
def path() -> Iterator[str]:
    """A file of zeros in memory."""
    file = Path(f"/dev/shm/pkernfs-test-dax-{os.getpid()}")
    file.touch()
    os.truncate(file, SIZE)
    yield str(file)
    file.unlink()


@pytest.fixture
def device(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, which everybody takes for a device."""
    monkeypatch.setattr(pkernfs.region.opening, "FileRegion", FileAsDevice)
    return path


@pytest.mark.parametrize("align", [4096, 2 * MiB, 4 * MiB])
def test_stores_stay_in_copies(path: str, align: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileAsDevice, "align", align)
    content = os.urandom(SIZE)
    Path(path).write_bytes(content)
    expected = bytearray(content)
    with FileAsDevice(path, readonly=True) as region:
        assert region.view == content
        # Within a piece, over the edge of two, a word, at the very end.
        for at, length in ((100, 10), (4 * MiB - 5, 10), (MiB, 2 * MiB), (SIZE - 3, 3)):
            region.store(at, b"x" * length)
            expected[at : at + length] = b"x" * length
        region.store_word(6 * MiB, 1)
        expected[6 * MiB : 6 * MiB + 8] = (1).to_bytes(8, "little")
        region.zero(7 * MiB, 4096)
        expected[7 * MiB : 7 * MiB + 4096] = bytes(4096)
        region.discard(0, 4096)
        region.flush()
        assert region.view == expected
        assert bytes(region.present(3 * MiB, 2 * MiB)) == expected[3 * MiB : 5 * MiB]
        # What is not covered goes on showing the device.
        with open(path, "r+b") as file:
            file.seek(9 * MiB)
            file.write(b"seen")
        assert region.read(9 * MiB, 4) == b"seen"
    assert Path(path).read_bytes() == content[: 9 * MiB] + b"seen" + content[9 * MiB + 4 :]


def test_a_view_outlives_its_region(path: str) -> None:
    with FileAsDevice(path, readonly=True) as region:
        region.store(0, b"abc")
        kept = region.view[:3]
    assert bytes(kept) == b"abc"


def mapped(path: str) -> int:
    """How often this process maps the file."""
    return Path("/proc/self/maps").read_text().count(path)


def test_nothing_stays_mapped(path: str) -> None:
    for _ in range(3):
        with FileAsDevice(path, readonly=True) as region:
            region.store(4 * MiB, b"abc")
            assert mapped(path) == 2
        assert mapped(path) == 0


def test_no_memory_for_a_copy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(Overlay, "_cover", refuse)
    with open_region(device, readonly=True) as region, pytest.raises(FsError, match=r"no private copy .* allocate"):
        region.store(0, b"x")


def test_recovery_of_every_cut_in_memory(device: str) -> None:
    """A transaction killed after each of its stores: read-only shows what recovery in memory makes of it."""
    recording = RecordingRegion(SIZE)
    mkfs(recording)
    fs = open_fs(recording)
    cast(fs)
    before = bytes(recording.view)
    recording.log.clear()
    fs.rename(ROOT, b"d", ROOT, b"renamed")
    fs.unlink(ROOT, b"g")
    mkfile(fs, b"new", b"n" * (3 * MiB))
    replayed = 0
    with open(device, "r+b") as file:
        file.write(before)
        for store in recording.log:
            file.seek(store.offset)
            file.write(store.data)
            file.flush()
            image = Path(device).read_bytes()
            twin = open_fs(MemoryRegion(image=image))
            with open_region(device, readonly=True) as region:
                assert region.kind == "devdax"
                seen = open_fs(region)
                assert tree(seen) == tree(twin)
                assert check(seen.volume) == []
                replayed += seen.volume.recovered
            found = fsck(device, None)
            assert (found.problems, found.records) == ([], seen.volume.recovered)
            assert Path(device).read_bytes() == image
    assert replayed


@pytest.mark.parametrize(
    ("size", "align", "usable"),
    [
        pytest.param(190 * MiB, 2 * MiB, 190 * MiB, id="whole"),
        pytest.param(191 * MiB, 4096, 190 * MiB, id="small-alignment"),
        pytest.param(3074 * MiB, 1024 * MiB, 3072 * MiB, id="large-alignment"),
        pytest.param(MiB, 2 * MiB, 0, id="too-small"),
    ],
)
def test_what_a_region_can_have_of_a_device(size: int, align: int, usable: int) -> None:
    assert Device(size, align, 0).usable == usable


def test_devices_of_another_kind() -> None:
    with pytest.raises(RegionError, match="/dev/zero: expected a device-DAX device, found one of the subsystem mem"):
        open_region("/dev/zero")
