"""fsck -y: what was planted is mended, a second run is clean, and files that were sound are what they were."""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkernfs import format as f
from pkernfs.cli.fsck import main
from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.pages import encode_inode
from pkernfs.fs.slab import Slab
from pkernfs.fs.volume import Volume
from pkernfs.fsck.problems import PROBLEMS
from pkernfs.fsck.repair import Outcome
from pkernfs.iommu.guard import PageTableGuard, open_filesystem
from pkernfs.iommu.records import Records
from pkernfs.region import MemoryRegion, RecordingRegion, Region, copies_of
from tests.core.faults import (
    CHECKSUMS,
    DOUBLE,
    FAULTS,
    child,
    drop_name,
    flip,
    inode_of,
    orphan_files,
    page_of,
    patch_extent,
    set_block,
    set_kind,
    slab_of,
    sparse_tree,
)
from tests.core.images import CowRegion, cast, torn
from tests.core.support import (
    ME,
    ROOT,
    MiB,
    Shape,
    check,
    check_region,
    full,
    map_file,
    mkdir,
    mkdomain,
    mkfile,
    new_fs,
    open_fs,
    patch_inode,
    repair_region,
)
from tests.core.test_check import damaged_regions

Plant = Callable[[Filesystem], object]

#: Paths that a fault (by the beginning of its name) may change: what was damaged itself, and the counts of the root.
VICTIMS: dict[str, set[bytes]] = {
    "inode-damaged": {b"/g", b"/d/f"},
    "inode-of-a-directory-damaged": {b"/d"},
    "inode-type-damaged": {b"/g", b"/d/f", b"/d"},
    "inode-type-of-a-directory-damaged": {b"/d", b"/g", b"/d/f", b"/d/e", b"/d/e/inner"},
    "inode-without-type": {b"/g", b"/d/f", b"/d"},
    "file-too-large": {b"/g", b"/d/f"},
    "name-does-not-fit-its-key": {b"/g", b"/h"},
    "name-twice": {b"/g", b"/d/f"},
    "name-with-": {b"/g", b"/d/f"},
    "name-is-a-dot": {b"/g", b"/d/f"},
    "name-is-empty": {b"/big"},
    "directory-loop-apart": {b"/d", b"/d/f", b"/d/e", b"/d/e/inner"},
    "name-length": {b"/big"},
    "name-of-nothing": {b"/nothing", b"/big"},
    "name-of-the-list-of-orphans": {b"/nothing", b"/big"},
    "directory-with-two-names": {b"/empty", b"/again"},
    "lost-file": {b"/big"},
    "lost-directory": {b"/empty"},
    "node-of-directory-damaged": {b"/g", b"/d", b"/d/f", b"/d/e", b"/d/e/inner", b"/empty", b"/big", b"/sparse"}
    | {b"/link", b"/iommu", b"/iommu/root-pgtables"},
    "node-": {b"/sparse"},
    "checksum-of-an-inner-node": {b"/sparse"},  # made larger first
    "checksum-of-a-leaf": {b"/sparse"},
    "extent-of-shared": {b"/two"},
    "extent-of-the-far-copy": {b"/g", b"/d/f"},
    "extent-": {b"/big"},
    "extents-overlap": {b"/sparse"},
    "attribute-": {b"/d"},
    "held-": {b"/g", b"/d/f", b"/big", b"/empty"},
    "fifo-": {b"/made"},
    "link-with": {b"/made"},
    "iommu-": {b"/iommu", b"/iommu/root-pgtables"},
    "checksum-of-records": {b"/iommu", b"/iommu/root-pgtables"},
    "orphan-says-listed": set(),
}


def shapes(region: Region) -> dict[bytes, Shape | None]:
    """Every path with what stands there; None where it cannot be read."""
    return look(MemoryRegion(image=region.view))


def look(region: Region) -> dict[bytes, Shape | None]:
    """The same, of a region that may be changed by looking: a journal is replayed."""
    fs = Filesystem(Volume(region), PageTableGuard)
    fs.times.policy = "noatime"
    found: dict[bytes, Shape | None] = {}
    todo = [(b"", ROOT)]
    while todo:
        path, ino = todo.pop()
        try:
            inode = fs.getattr(ino)
            size = min(inode.size, 16 * MiB)
            data = fs.readlink(ino) if stat.S_ISLNK(inode.mode) else b""
            data = bytes(fs.read(ino, 0, size)) if stat.S_ISREG(inode.mode) else data
            xattrs = tuple(sorted((name, fs.getxattr(ino, name)) for name in fs.listxattr(ino)))
            found[path] = Shape(
                inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, inode.size, inode.pages, data, xattrs
            )
            if stat.S_ISDIR(inode.mode):
                todo += [(path + b"/" + entry.name, entry.ino) for entry in fs.readdir(ino)]
        except CorruptError:
            found[path] = None
    return found


def sound(image: bytes | memoryview) -> dict[bytes, Shape | None]:
    """The shapes of a sound region."""
    region = MemoryRegion(image=image)
    assert check(Volume(region)) == []
    return shapes(region)


def mended(region: Region, *, nothing_left: bool = True) -> Outcome:
    """Repair; a second run has nothing to do and changes nothing."""
    outcome = repair_region(region)
    if nothing_left:
        assert outcome.left == []
        image = bytes(region.view)
        again = repair_region(region)
        assert (again.repairs, again.left) == ([], [])
        assert bytes(region.view) == image
        check_usable(region)
    for repair in outcome.repairs:
        assert repair.code in PROBLEMS
        assert repair.text
        assert "\n" not in repair.text
    return outcome


def check_usable(region: Region) -> None:
    """The volume can be written: what the repair left in use is not given away again."""
    twin = MemoryRegion(image=region.view)
    fs = open_fs(twin)
    mkfile(fs, b"after the repair", b"x" * (3 * MiB))
    mkdir(fs, b"and a directory")
    assert check(fs.volume) == []


def victims(name: str) -> set[bytes]:
    return VICTIMS.get(name) or next((found for start, found in VICTIMS.items() if name.startswith(start)), set())


@pytest.fixture
def victim() -> Filesystem:
    """A filesystem with a bit of everything, for damage."""
    fs = new_fs(20)
    cast(fs)
    return fs


ALL = {name: plant for name, (_, plant) in (FAULTS | DOUBLE).items()}


@pytest.mark.parametrize("name", ALL)
def test_a_fault_is_mended(victim: Filesystem, name: str) -> None:
    before = shapes(victim.region)
    ALL[name](victim)
    region = MemoryRegion(image=victim.region.view)
    outcome = mended(region)
    assert outcome.repairs
    after = sound(region.view)
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed <= victims(name) | {b""}, [repair.text for repair in outcome.repairs]
    # The root may have lost or got names, or another owner, and nothing else.
    root, was = after[b""], before[b""]
    assert root
    assert was
    owner = name == "root-of-another-owner"
    assert root[:1] + root[2 + owner : 5] + root[7:] == was[:1] + was[2 + owner : 5] + was[7:]


@pytest.mark.parametrize("name", ["superblock-damaged", "slab-header-damaged", *(n for n in ALL if "iommu" in n)])
def test_what_is_mapped_stays_where_it_is(victim: Filesystem, name: str) -> None:
    """The memory that sound mappings name, of a file with a name and of one without."""
    domain = mkdomain(victim, b"guard")
    files = [mkfile(victim, n, n * f.PAGE) for n in (b"named", b"gone")]
    for number, ino in enumerate(files):
        map_file(victim, domain, 10 * number, ino, 1, 2)
    victim.unlink(ROOT, b"gone")
    places = [victim.content.extents(ino) for ino in files]
    ALL[name](victim)
    region = MemoryRegion(image=victim.region.view)
    mended(region)
    fs = open_fs(region)
    assert [fs.content.extents(ino) for ino in files] == places
    assert [mapping.ino for _, mapping in Records(fs.volume, domain).mappings()] == files
    assert [fs.getattr(ino).iommu for ino in files] == [1, 1]
    assert bytes(fs.read(files[1], 0, 4 * f.PAGE)) == b"gone" * f.PAGE


# -- what is kept -----------------------------------------------------------------------------------------------------


def without_journal(fs: Filesystem) -> bytes:
    """All bytes of the region but those of the journal."""
    sb = fs.volume.sb
    return bytes(fs.region.view[: sb.journal_offset + f.PAGE]) + bytes(fs.region.view[sb.first_block * f.BLOCK :])


@pytest.mark.parametrize("what", CHECKSUMS)
def test_a_damaged_checksum_is_made_right_and_nothing_else(victim: Filesystem, what: str) -> None:
    offset = CHECKSUMS[what][1](victim)
    before = without_journal(victim)
    flip(victim, offset)
    mended(victim.region)
    assert without_journal(victim) == before


def test_an_orphan_with_a_damaged_checksum_is_kept(victim: Filesystem) -> None:
    inos = orphan_files(victim)
    flip(victim, inos[0] * 256 + 32)
    mended(victim.region)
    assert sorted(Filesystem(Volume(victim.region), PageTableGuard).orphans.inos()) == sorted(inos)


@pytest.mark.parametrize("at", range(40, 1000, 90))
def test_a_bit_of_a_node_of_names_is_one_name_at_most(victim: Filesystem, at: int) -> None:
    before = shapes(victim.region)
    root = inode_of(victim, b"").root
    flip(victim, root * f.PAGE + at)
    mended(victim.region)
    after = sound(victim.region.view)
    gone = {path.split(b"/")[1] for path in before if path not in after}
    assert len(gone) <= 1
    contents = {shape.content for shape in after.values() if shape}
    assert {shape.content for shape in before.values() if shape} <= contents


@pytest.mark.parametrize(("mine", "other"), [(b"g", b"d/e/inner"), (b"d/e/inner", b"g"), (b"empty/a", b"g")])
def test_an_inode_with_a_wrong_checksum_takes_memory_of_nobody(victim: Filesystem, mine: bytes, other: bytes) -> None:
    mkfile(victim, b"a", b"of its own", victim.resolve(b"empty"))
    ino, page = victim.resolve(mine), page_of(victim, other)
    patch_extent(victim, mine, page=page)
    before = shapes(victim.region)
    flip(victim, ino * 256 + 32)
    mended(victim.region)
    after = sound(victim.region.view)
    assert after[b"/" + other] == before[b"/" + other]
    found = after[b"/" + mine]
    assert found
    assert found.content == bytes(found.size)


STARTS = {what: (2 * f.PAGE, place) for what, (_, place) in CHECKSUMS.items()} | {
    "a-file-of-blocks": (2 * f.PAGE, lambda fs: fs.resolve(b"big") * 256 + 32),
    "more": (MiB, lambda fs: fs.resolve(b"big") * 256 + 32),
}


@pytest.mark.parametrize(("length", "place"), STARTS.values(), ids=STARTS)
def test_a_region_whose_start_is_gone(victim: Filesystem, length: int, place: Callable[[Filesystem], Ino]) -> None:
    """Superblock, reserved inodes and block table: slabs are known by their headers, names by their leaves.

    A checksum elsewhere is damaged, too.
    """
    offset = place(victim)
    before = shapes(victim.region)
    flip(victim, offset)
    victim.region.store(0, bytes(length))
    mended(victim.region)
    after = sound(victim.region.view)
    del before[b""], after[b""]
    assert after == before


def test_a_slab_in_the_data_of_a_file_is_none(victim: Filesystem) -> None:
    """Where the block table is gone, a file that is named has its blocks, whatever stands in them."""
    ino = victim.resolve(b"big")
    block = page_of(victim, b"big") // f.PAGES_PER_BLOCK
    forged = Slab.empty(f.BlockNo(block))
    forged.kinds[1], forged.slots[1] = f.PAGE_INODES, 1
    own = (block * f.PAGES_PER_BLOCK + 1) * f.INODES_PER_PAGE
    inode = encode_inode(f.Ino(own), f.Inode(mode=stat.S_IFREG | 0o4755, nlink=1, flags=f.FLAG_FILE))
    victim.write(ino, 0, forged.encode() + inode)
    before = shapes(victim.region)
    victim.region.store(0, bytes(2 * f.PAGE))
    mended(victim.region)
    after = sound(victim.region.view)
    del before[b""], after[b""]
    assert after == before


def test_names_that_are_lost_in_a_full_region(shm: Path) -> None:
    """What has room is named in the root directory; when something was deleted, the others are."""
    fs = new_fs(20)
    for n in range(120):
        mkfile(fs, b"%x" % n, b"")
    full(fs)
    flip(fs, inode_of(fs, b"").root * f.PAGE)
    path = shm / "region"
    path.write_bytes(fs.region.view)
    assert main(["-y", str(path)]) == 1 | 4
    image = path.read_bytes()
    assert main(["-y", str(path)]) == 4
    assert path.read_bytes() == image
    region = MemoryRegion(image=image)
    assert {problem.code for problem in check(Volume(region))} == {"inode-lost"}
    named = [path for path in shapes(region) if path.startswith(b"/#")]
    assert len(named) > 100
    fs = open_fs(region)
    largest = max(fs.readdir(ROOT), key=lambda entry: fs.getattr(entry.ino).pages)
    fs.unlink(ROOT, largest.name)
    assert repair_region(region).left == []
    sound(region.view)


def test_leaves_beside_a_damaged_root_are_kept(victim: Filesystem) -> None:
    root = sparse_tree(victim)
    before = sound(victim.region.view)
    flip(victim, root * f.PAGE + 99)
    mended(victim.region)
    assert sound(victim.region.view) == before


def test_a_damaged_leaf_is_dropped_and_its_neighbours_are_kept(victim: Filesystem) -> None:
    root = sparse_tree(victim)
    before = sound(victim.region.view)[b"/sparse"]
    flip(victim, child(victim, root, 1) * f.PAGE + 99)
    mended(victim.region)
    after = sound(victim.region.view)[b"/sparse"]
    assert before
    assert after
    assert after.size == before.size
    assert len(after.content) == len(before.content)
    pages = range(0, before.size, f.PAGE)
    kept = [at for at in pages if after.content[at : at + f.PAGE] == before.content[at : at + f.PAGE]]
    assert len(pages) // 2 < len(kept) < len(pages)
    assert all(not any(after.content[at : at + f.PAGE]) for at in pages if at not in kept)


def test_a_directory_without_its_root_node_keeps_its_leaves() -> None:
    fs = new_fs(20)
    many = mkdir(fs, b"many")
    for n in range(300):
        mkfile(fs, b"file%d" % n, b"%d" % n, many)
    before = sound(fs.region.view)
    flip(fs, inode_of(fs, b"many").root * f.PAGE + 50)
    mended(fs.region)
    after = sound(fs.region.view)
    # Nodes that are filled in one go are fewer.
    assert {path for path in before if after[path] != before[path]} <= {b"/many"}
    assert after.keys() == before.keys()


def test_a_lost_tree_is_named_once(victim: Filesystem) -> None:
    """A directory without a name goes to lost+found as a whole."""
    ino = victim.resolve(b"d")
    before = sound(victim.region.view)
    drop_name(victim, b"d")
    mended(victim.region)
    after = sound(victim.region.view)
    place = b"/lost+found/#%d" % ino
    assert {path.replace(b"/d", place, 1): found for path, found in before.items() if path.startswith(b"/d")} == {
        path: found for path, found in after.items() if path.startswith(place)
    }
    assert after[b"/lost+found"]
    assert stat.S_IMODE(after[b"/lost+found"].mode) == 0o700


def test_a_loop_of_lost_directories(victim: Filesystem) -> None:
    """/d names nothing above it any more, and /d/e names /d."""
    outer, inner = victim.resolve(b"d"), victim.resolve(b"d/e")
    drop_name(victim, b"d")
    directory = victim.names.directory(inner)
    with victim.volume.transaction() as tx:
        directory.add(tx, b"loop", outer, stat.S_IFDIR)
        inode = directory.finish(0)
        tx.put_inode(inner, inode._replace(nlink=3))
        tx.put_inode(outer, victim.volume.inode(outer)._replace(parent=inner))
    mended(victim.region)
    after = sound(victim.region.view)
    assert len([path for path in after if path.startswith(b"/lost+found/#")]) >= 3
    assert b"content" not in after


def test_a_damaged_slab_header_loses_nothing(victim: Filesystem) -> None:
    orphan_files(victim)
    drop_name(victim, b"big")
    before = sound_contents(victim)
    flip(victim, slab_of(victim) * f.BLOCK + 100)
    mended(victim.region)
    assert sound_contents(victim) >= before


def sound_contents(fs: Filesystem) -> set[bytes]:
    """The contents of all files that have names."""
    return {shape.content for shape in shapes(fs.region).values() if shape}


def test_a_slab_that_the_table_has_as_free(victim: Filesystem) -> None:
    """Everything stands in it."""
    before = sound(victim.region.view)
    set_block(victim, slab_of(victim), f.BLOCK_FREE)
    mended(victim.region)
    assert sound(victim.region.view) == before


def test_a_data_block_that_the_table_has_as_a_slab(victim: Filesystem) -> None:
    before = sound(victim.region.view)
    set_block(victim, page_of(victim, b"big") // 512, f.BLOCK_SLAB)
    mended(victim.region)
    assert sound(victim.region.view) == before


def test_a_page_of_inodes_that_the_slab_has_as_data(victim: Filesystem) -> None:
    before = sound(victim.region.view)
    set_kind(victim, victim.resolve(b"g") // 16, f.PAGE_DATA)
    mended(victim.region)
    assert sound(victim.region.view) == before


@pytest.mark.parametrize("ino", [f.ROOT_INO, f.ORPHANS_INO, f.IOMMU_INO, f.ROOT_PGTABLES_INO])
def test_reserved_inodes_are_made_anew(victim: Filesystem, ino: Ino) -> None:
    before = sound(victim.region.view)
    flip(victim, ino * 256 + 37)
    mended(victim.region)
    assert sound(victim.region.view) == before


def test_reserved_inodes_get_their_names_back(victim: Filesystem) -> None:
    before = sound(victim.region.view)
    drop_name(victim, b"iommu")
    mended(victim.region)
    assert sound(victim.region.view) == before


def test_many_faults_at_once(victim: Filesystem) -> None:
    before = sound(victim.region.view)
    patch_inode(victim, victim.resolve(b"big"), pages=7)
    patch_inode(victim, victim.resolve(b"g"), nlink=9)
    flip(victim, 5000)
    flip(victim, slab_of(victim) * f.BLOCK + 100)
    flip(victim, 60)
    mended(victim.region)
    assert sound(victim.region.view) == before


def test_a_full_region_is_repaired_in_place() -> None:
    """A tree that is made anew takes the pages of the old one."""
    fs = new_fs(20)
    cast(fs)
    full(fs)
    before = sound(fs.region.view)
    sparse_root = inode_of(fs, b"sparse").root * f.PAGE + 99
    flip(fs, sparse_root)
    assert repair_region(fs.region).left == []
    after = sound(fs.region.view)
    assert {path for path in before if after[path] != before[path]} == {b"/sparse"}


def test_what_lost_found_has_no_room_for_is_named_in_the_root() -> None:
    fs = new_fs(20)
    cast(fs)
    assert full(fs)
    ino = fs.resolve(b"empty")
    drop_name(fs, b"empty")
    before = shapes(fs.region)
    mended(fs.region, nothing_left=False)
    after = sound(fs.region.view)
    assert {path for path in after if after[path] != before.get(path)} == {b"", b"/#%d" % ino, b"/lost+found"}


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO], ids=["file", "link", "fifo"])
def test_lost_found_is_no_directory(victim: Filesystem, kind: int) -> None:
    """What has the name keeps it."""
    victim.create(ROOT, b"lost+found", kind | 0o644, ME, target=b"d" if kind == stat.S_IFLNK else b"")
    before = sound(victim.region.view)
    ino = victim.resolve(b"big")
    drop_name(victim, b"big")
    mended(victim.region)
    after = sound(victim.region.view)
    assert after[b"/lost+found"] == before[b"/lost+found"]
    assert after[b"/lost+found~/#%d" % ino] == before[b"/big"]


def test_names_in_lost_found_are_not_taken_twice(victim: Filesystem) -> None:
    ino = victim.resolve(b"big")
    earlier = mkfile(victim, b"#%d" % ino, b"from an earlier run", mkdir(victim, b"lost+found"))
    before = sound(victim.region.view)
    drop_name(victim, b"big")
    mended(victim.region)
    after = sound(victim.region.view)
    assert after[b"/lost+found/#%d" % ino] == before[b"/lost+found/#%d" % ino]
    assert after[b"/lost+found/#%d~" % ino] == before[b"/big"]
    assert open_filesystem(victim.region).resolve(b"lost+found/#%d" % ino) == earlier


def test_no_superblock_at_all(victim: Filesystem) -> None:
    for at in (0, *copies_of(victim.volume.sb)):
        flip(victim, at + 60)
    image = bytes(victim.region.view)
    with pytest.raises(FormatError, match="no copy of the superblock"):
        repair_region(victim.region)
    assert bytes(victim.region.view) == image


def test_the_copy_of_a_smaller_filesystem_in_a_larger_region(victim: Filesystem) -> None:
    before = sound(victim.region.view)
    region = MemoryRegion(image=bytes(victim.region.view) + bytes(44 * MiB))
    region.store(0, bytes(200))
    mended(region)
    assert sound(region.view) == before


# -- crashes ----------------------------------------------------------------------------------------------------------


MISSING = -1


def crashes(fs: Filesystem, name: str, ways: Callable[[int], Iterable[int]]) -> int:
    """Cut a repair at every store; a second repair goes on to a sound end.  The number of crashes.

    ``ways``: from the number of the store that is the last to how it is torn, MISSING: nothing of it is there.
    """
    before = shapes(fs.region)
    ALL[name](fs)
    image = bytes(fs.region.view)
    recorder = RecordingRegion(image=image)
    assert repair_region(recorder).left == []
    fd = os.memfd_create("image")
    os.write(fd, image)
    done = 0
    for cut, last in enumerate(recorder.log):
        for how in ways(cut):
            region = CowRegion(fd)
            for store in (*recorder.log[:cut], *([] if how == MISSING else torn(last, how))):
                region.store(store.offset, store.data)
            outcome = repair_region(region)
            assert outcome.left == [], (cut, outcome)
            after = look(region)
            assert {path for path in before if after.get(path) != before[path]} <= victims(name) | {b""}, cut
            region.words.release()
            region.view.release()
            region.map.close()
            done += 1
    os.close(fd)
    return done


@pytest.mark.parametrize("name", ALL)
def test_a_crash_within_a_repair(victim: Filesystem, name: str) -> None:
    """At every store, which is missing and torn by turns."""
    assert crashes(victim, name, lambda cut: [cut % 4 - 1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_crash_within_a_repair_in_many_ways(victim: Filesystem, name: str) -> None:
    """At every store, missing and torn in ten ways."""
    assert crashes(victim, name, lambda cut: range(MISSING, 10)) > 0


@pytest.mark.parametrize("seed", range(6))
def test_any_damage_is_mended(seed: int) -> None:
    """Random damage of metadata, half of it with right checksums: nothing raises, and in the end all is sound."""
    for region in damaged_regions(seed, 25):
        try:
            outcome = repair_region(region)
        except FormatError:
            continue
        assert outcome.left == []
        assert check_region(region)[0] == []
        open_filesystem(region)
        assert check_region(region)[0] == []


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(victim: Filesystem) -> Iterator[Callable[[str], str]]:
    """A region in a file on tmpfs, with a fault."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-test-") as directory:

        def make(name: str) -> str:
            ALL[name](victim)
            path = Path(directory) / "region"
            path.write_bytes(victim.region.view)
            return str(path)

        yield make


COMMANDS = ["superblock-damaged", "journal-committed-and-damaged", "slab-header-damaged", "lost-file", "node-damaged"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-y", "-p", "-a"])
def test_the_command(file: Callable[[str], str], capsys: pytest.CaptureFixture[str], name: str, option: str) -> None:
    path = file(name)
    before = Path(path).read_bytes()
    assert main(["-n", path]) == 4
    assert Path(path).read_bytes() == before
    capsys.readouterr()
    assert main([option, path]) == 1
    out, err = capsys.readouterr()
    assert f"{path}: repaired: " in out
    assert out.endswith(" made, 0 problems left\n")
    assert err == ""
    assert main([option, path]) == 0
    assert ": clean, " in capsys.readouterr().out
    sound(Path(path).read_bytes())


def test_the_command_in_json(file: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    path = file("lost-file")
    assert main(["-y", "--json", path]) == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["exit"], found["clean"], found["left"]) == (1, True, [])
    assert [problem["checker"] for problem in found["problems"]] == ["inode-lost"]
    assert [repair["code"] for repair in found["repaired"]][:1] == ["inode-lost"]
