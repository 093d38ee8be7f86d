"""Copies of the superblock: where they stand, what is said when the first is gone, and what fsck makes of the rest."""

import os
import random
import stat
from collections.abc import Callable
from typing import NamedTuple

import pytest

from pkernfs.cli.mkfs import run as mkfs_command
from pkernfs.errors import FormatError, RegionError
from pkernfs.format import BLOCK, BLOCK_SLAB, MAGIC, PAGE, RO_COMPAT_FAR_COPY, SUPERBLOCK_CHECKED
from pkernfs.fs.mkfs import mkfs
from pkernfs.fsck.problems import Code
from pkernfs.fsck.run import Result, fsck
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import MemoryRegion, copies_of, find_copies, open_region
from pkernfs.region import remains as remains_module
from pkernfs.region.superblock import encode_superblock
from tests.core.images import cast
from tests.core.support import ROOT, Shape, digest, full, mkfile, new_fs, open_fs, remove_all, sparse_file, tree

MiB = 1 << 20
SIZE = 64 * MiB


@pytest.mark.parametrize("mib", [8, 20, 64])
def test_mkfs_makes_a_far_copy(mib: int) -> None:
    """In a slab, whose other pages are for everybody, in the last block: what is free stays in one piece."""
    fs = new_fs(mib)
    sb, space = fs.volume.sb, fs.volume.space
    assert sb.ro_compat == RO_COMPAT_FAR_COPY
    assert copies_of(sb) == (sb.journal_offset, mib * MiB - PAGE)
    for at in copies_of(sb):
        assert fs.region.read(at, SUPERBLOCK_CHECKED) == fs.region.read(0, SUPERBLOCK_CHECKED)
    used = sb.blocks - 1 - sb.first_block
    assert bytes(space.table[sb.first_block :]) == bytes(used) + bytes([BLOCK_SLAB])
    # Header, far copy, names in / and in iommu/.
    assert space.slab(space.slab_blocks()[0]).free == 512 - 4
    free = fs.statfs().free
    full(fs)
    remove_all(fs, ROOT)
    fs.reclaimer.finish_listed()
    assert fs.statfs().free == free
    assert fs.region.read(copies_of(sb)[1], SUPERBLOCK_CHECKED) == fs.region.read(0, SUPERBLOCK_CHECKED)


def test_the_first_is_found_by_each_copy_alone() -> None:
    fs = new_fs(20)
    near, far = copies_of(fs.volume.sb)
    for at, other in ((near, far), (far, near)):
        region = MemoryRegion(image=fs.region.view)
        region.store(0, bytes(PAGE))
        region.store(other, bytes(PAGE))
        assert find_copies(region) == [(at, fs.volume.sb)]


def test_a_copy_is_where_it_says() -> None:
    """A stray copy of the page, of this region or another, is none."""
    fs = new_fs(20)
    raw = fs.region.read(0, 256)
    for at in (2 * BLOCK - PAGE, 3 * BLOCK - PAGE):
        fs.region.store(at, raw)
    assert [at for at, _ in find_copies(fs.region)] == list(copies_of(fs.volume.sb))


def test_a_region_without_a_far_copy(fs_without: MemoryRegion) -> None:
    """As 0.1.0 and 0.2.0 made them: all goes on as it was, and the last page is anybody's."""
    fs = open_fs(fs_without)
    assert copies_of(fs.volume.sb) == (fs.volume.sb.journal_offset,)
    assert fs.volume.space.far_copy == 0
    cast(fs)
    full(fs)
    remove_all(fs, ROOT)


@pytest.fixture
def fs_without() -> MemoryRegion:
    """A region of before."""
    fs = new_fs(20)
    region = fs.region
    block = fs.volume.space.slab_blocks()[0]
    slab = fs.volume.space.slab(block)
    slab.kinds[-1] = 0
    region.store(slab.offset, slab.encode())
    near, far = copies_of(fs.volume.sb)
    raw = encode_superblock(fs.volume.sb._replace(ro_compat=0))
    for at in (0, near):
        region.store(at, raw[:SUPERBLOCK_CHECKED])
    region.store(far, bytes(PAGE))
    assert isinstance(region, MemoryRegion)
    return region


# -- damage -----------------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """A range that somebody has overwritten, and with what."""

    start: int
    end: int
    fill: Callable[[int], bytes]


def zeros(length: int) -> bytes:
    return bytes(length)


def ones(length: int) -> bytes:
    return b"\xff" * length


def noise(length: int) -> bytes:
    return random.Random(7).randbytes(length)


DAMAGES = {
    f"{what}-{fill.__name__}": Damage(0, end, fill)
    for what, end in (("superblock", 512), ("4K", PAGE), ("2M", BLOCK), ("2M+4K", BLOCK + PAGE), ("4M", 2 * BLOCK))
    for fill in (zeros, ones, noise)
}


@pytest.fixture
def region(shm: os.PathLike[str]) -> str:
    """A region of 64 MiB with files of all kinds."""
    path = f"{shm}/region"
    sparse_file(path, SIZE)
    with open_region(path) as made:
        mkfs(made)
        fs = open_fs(made)
        cast(fs)
        for number in range(40):
            mkfile(fs, b"file%d" % number, b"%d" % number * 3000)
    return path


def overwrite(path: str, damage: Damage) -> None:
    with open(path, "r+b") as file:
        file.seek(damage.start)
        file.write(damage.fill(damage.end - damage.start))


def files(path: str) -> dict[bytes, Shape]:
    """All but the directories that a repair may make, or make anew with other owners."""
    with open_region(path, readonly=True) as opened:
        shapes = tree(open_fs(opened))
    return {name: one for name, one in shapes.items() if name not in (b"", b"/iommu", b"/lost+found")}


def refused(path: str) -> str:
    """What a mount says."""
    with open_region(path) as opened, pytest.raises(FormatError) as caught:
        open_filesystem(opened)
    line = str(caught.value)
    assert "\n" not in line
    return line


def look(path: str) -> Result:
    return fsck(path, None)


def repair(path: str) -> Result:
    return fsck(path, lambda _: True)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_overwritten_beginning(region: str, damage: Damage) -> None:
    """The mount says what it is and who helps, -n finds what -y will, and -y brings everything back that is there."""
    before = files(region)
    overwrite(region, damage)
    at = 0x200000 if damage.end <= BLOCK else SIZE - PAGE
    line = refused(region)
    assert line.startswith(f"{region}: looks like a pkernfs region whose superblock is damaged (")
    assert line.endswith(f"; its copy at {at:#x} is sound: fsck.pkernfs {region}")
    assert "mkfs" not in line
    bytes_before = digest(region)
    looked = look(region)
    assert digest(region) == bytes_before
    assert looked.problems[0].code == Code.SUPERBLOCK
    assert looked.check is not None
    assert len(looked.problems) > 1 or damage.end == 512
    repaired = repair(region)
    assert [finding.text for finding in repaired.problems] == [finding.text for finding in looked.problems]
    assert repaired.left == []
    assert repaired.repairs
    again = repair(region)
    assert (again.problems, again.repairs) == ([], [])
    assert files(region) == before


def test_a_damage_of_both_ends(region: str) -> None:
    """The last block has names and inodes: what lost its name comes to lost+found, or is lost with its slab."""
    overwrite(region, Damage(0, PAGE, zeros))
    overwrite(region, Damage(SIZE - BLOCK, SIZE, noise))
    assert "its copy at 0x200000 is sound" in refused(region)
    looked = look(region)
    repaired = repair(region)
    assert len(looked.problems) == len(repaired.problems) > 2
    assert repaired.left == []
    again = repair(region)
    assert (again.problems, again.repairs) == ([], [])
    with open_region(region) as opened:
        fs = open_fs(opened)
        assert opened.read(SIZE - PAGE, SUPERBLOCK_CHECKED) == opened.read(0, SUPERBLOCK_CHECKED)
        mkfile(fs, b"new", b"x" * 5000)


def test_a_longer_file(region: str) -> None:
    """The far copy is at the end of the region, and not of the file."""
    overwrite(region, Damage(0, BLOCK + PAGE, zeros))
    os.truncate(region, 3 * SIZE)
    assert f"its copy at {SIZE - PAGE:#x} is sound" in refused(region)
    assert repair(region).left == []


# -- what is said -----------------------------------------------------------------------------------------------------


def without_superblocks(path: str) -> None:
    with open_region(path, readonly=True) as opened:
        sb = open_filesystem(opened).volume.sb
    for at in (0, *copies_of(sb)):
        overwrite(path, Damage(at, at + 256, zeros))


def data_far_in(path: str) -> None:
    os.truncate(path, 0)
    sparse_file(path, SIZE)
    overwrite(path, Damage(40 * MiB + 5000, 40 * MiB + 6000, ones))


def nothing(path: str) -> None:
    os.truncate(path, 0)
    sparse_file(path, SIZE)


def allocated_nothing(path: str) -> None:
    nothing(path)
    overwrite(path, Damage(0, SIZE, zeros))


SAID = {
    "no-superblock": (without_superblocks, "looks like a pkernfs region of which no superblock is sound", False),
    "data": (lambda path: overwrite(path, Damage(0, SIZE, ones)), "not a pkernfs region: .*other data", False),
    "data-far-in": (data_far_in, "not a pkernfs region: .*other data", False),
    "hole": (nothing, "not a pkernfs region: .*zeros only: mkfs", True),
    "zeros": (allocated_nothing, "not a pkernfs region: .*zeros only: mkfs", True),
    "cut": (lambda path: os.truncate(path, SIZE - BLOCK), "is truncated: expected .*: truncate -s 67108864 ", False),
}


@pytest.mark.parametrize(("plant", "said", "empty"), SAID.values(), ids=SAID)
def test_hints_cost_nobody_a_region(region: str, plant: Callable[[str], None], said: str, empty: bool) -> None:
    plant(region)
    with open_region(region, readonly=True) as opened, pytest.raises(FormatError, match=said) as caught:
        open_filesystem(opened)
    assert ("mkfs" in str(caught.value)) == empty


@pytest.mark.parametrize("size", [SIZE - 100, 5000, 3 * BLOCK])
def test_a_region_cut_to_a_size_that_none_has(region: str, size: int) -> None:
    os.truncate(region, size)
    with pytest.raises(
        FormatError, match=f"truncated: expected {SIZE} bytes, found {size}: truncate -s {SIZE} "
    ) as cut:
        open_region(region)
    assert "mkfs" not in str(cut.value)


@pytest.mark.parametrize(("content", "hint"), [(b"", "mkfs"), (b"text", "is it the right file")])
def test_a_file_of_a_size_that_no_region_has(shm: os.PathLike[str], content: bytes, hint: str) -> None:
    path = f"{shm}/file"
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(FormatError, match=f"expected a multiple of 2 MiB, at least 8 MiB, found .*: {hint}"):
        open_region(path)


@pytest.mark.parametrize(
    "plant",
    [without_superblocks, *(lambda p, d=d: overwrite(p, d) for name, d in DAMAGES.items() if name.endswith("zeros"))],
)
def test_mkfs_refuses_what_looks_like_a_region(region: str, plant: Callable[[str], None]) -> None:
    """And says who helps, and not how to force it."""
    plant(region)
    before = digest(region)
    with pytest.raises(RegionError, match="looks like a pkernfs region whose superblock is damaged: fsck") as caught:
        mkfs_command([region])
    assert "force" not in str(caught.value)
    assert digest(region) == before
    assert mkfs_command(["-q", "--force", region]) == 0
    assert stat.S_IMODE(os.stat(region).st_mode)
    assert repair(region).problems == []


def test_looking_takes_no_memory_and_little_time(shm: os.PathLike[str]) -> None:
    """16 TiB of holes, and one structure in the middle: found by its data."""
    path = f"{shm}/large"
    sparse_file(path, 16 << 40)
    middle = 8 << 40
    with open(path, "r+b") as file:
        file.seek(middle)
        file.write(MAGIC.to_bytes(8, "little"))
    with open(path, "rb") as file:
        source = remains_module.Descriptor(file.fileno(), 16 << 40)
        assert find_copies(source) == []
        assert remains_module.look_for_structures(source) == (0, False, False, True)
    assert os.stat(path).st_blocks * 512 <= 2 * PAGE
