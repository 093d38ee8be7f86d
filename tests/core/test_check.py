"""fsck: one fault is planted, and exactly that one is reported; damage of any kind neither raises nor loops."""

import ast
import errno
import os
import random
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs import format as f
from pkernfs.errors import FormatError
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.pages import encode_page
from pkernfs.fs.volume import Volume
from pkernfs.fsck import check as check_package
from pkernfs.fsck.check import check, check_region, run_check
from pkernfs.fsck.check.passes import EACH_INODE, PASSES
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import MAX_FINDINGS
from pkernfs.fsck.problems import PROBLEMS, Code, Stage
from pkernfs.fsck.repair.stages import STAGES, STEPS
from pkernfs.iommu.guard import PageTableGuard
from pkernfs.region import MemoryRegion, copies_of
from tests.core.faults import DOUBLE, FAULTS, flip, inode_of, orphan_files
from tests.core.images import CowRegion, cast
from tests.core.support import ME, ROOT, MiB, mkdir, mkfile, new_fs, patch_inode


def noted_codes() -> set[Code]:
    """What the checks note: the codes in the first argument of each note, or kept as ``code`` before."""
    found = []
    for path in Path(str(check_package.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="note" | "note_error"), args=[first, *_]):
                    found.append(first)
                case ast.Call(func=ast.Name("note" | "Finding"), args=[first, *_]):
                    found.append(first)
                case ast.Assign(targets=[ast.Name("code")], value=value):
                    found.append(value)
    names = [node for first in found for node in ast.walk(first) if isinstance(node, ast.Attribute)]
    return {Code[node.attr] for node in names if isinstance(node.value, ast.Name) and node.value.id == "Code"}


def test_every_invariant_has_a_fault() -> None:
    """Who adds a check adds a line to the table, and a fault that only it reports.

    Those of page tables, whose records are sound, are in tests/iommu/test_audit.py, and mended by test_fsck.py there.
    """
    assert {code for code, _ in FAULTS.values()} | {Code.IOMMU_TABLES} == set(PROBLEMS)
    assert noted_codes() == set(PROBLEMS)


def test_the_table_of_problems() -> None:
    """Every code has a line, and every stage something to mend, and its place in the order."""
    assert list(PROBLEMS) == [code for code in Code if code != Code.IOMMU_TABLES] + [Code.IOMMU_TABLES]
    for code, problem in PROBLEMS.items():
        assert problem.statement, code
        assert list(problem.mended_by) == sorted(problem.mended_by, key=list(Stage).index) != [], code
    assert {stage for problem in PROBLEMS.values() for stage in problem.mended_by} == set(Stage)
    assert [stage for step in STEPS for stage in step] == list(STAGES) == [s for s in Stage if s != Stage.METADATA]


def test_texts_count_the_invariants() -> None:
    """Wherever their number stands."""
    root = Path(__file__).parents[2]
    texts = [
        path for folder in ("", "pkernfs", "tests", "examples", ".github") for path in (root / folder).glob("*.md")
    ]
    texts += (root / "pkernfs").glob("**/*.py")
    found = [int(n) for path in texts for n in re.findall(r"(\d+) invariants", path.read_text())]
    assert set(found) <= {len(PROBLEMS)}


def codes_of(fs: Filesystem) -> set[str]:
    """What a check of a copy finds."""
    region = MemoryRegion(image=fs.region.view)
    region.readonly = True
    problems, _ = check_region(region)
    assert bytes(region.view) == bytes(fs.region.view), "a check writes nothing"
    for problem in problems:
        assert problem.text
        assert "\n" not in problem.text
        assert problem.code in PROBLEMS
    return {problem.code for problem in problems}


@pytest.fixture
def victim() -> Filesystem:
    """A filesystem with a bit of everything, for damage."""
    fs = new_fs(20)
    cast(fs)
    return fs


def test_a_sound_region_has_no_problems(victim: Filesystem) -> None:
    assert codes_of(victim) == set()
    found = run_check(victim.volume)
    assert found.findings.all == []
    assert (found.reached.files, found.reached.directories) == (6, 5)


@pytest.mark.parametrize(("code", "plant"), FAULTS.values(), ids=FAULTS)
def test_one_fault_is_one_problem(victim: Filesystem, code: str, plant: Callable[[Filesystem], object]) -> None:
    plant(victim)
    assert codes_of(victim) == {code}


@pytest.mark.parametrize(("codes", "plant"), DOUBLE.values(), ids=DOUBLE)
def test_faults_that_are_two_facts(victim: Filesystem, codes: set[str], plant: Callable[[Filesystem], object]) -> None:
    plant(victim)
    found = codes_of(victim)
    assert found == codes


def test_problems_say_where(victim: Filesystem) -> None:
    ino = victim.resolve(b"big")
    patch_inode(victim, ino, pages=7)
    page = victim.resolve(b"sparse")
    offset = inode_of(victim, b"sparse").root * f.PAGE
    flip(victim, offset + 50)
    problems = check(Volume(MemoryRegion(image=victim.region.view)))
    assert [(p.code, p.ino, p.offset) for p in sorted(problems)] == [
        ("inode-pages", ino, 0),
        ("tree-node", page, offset),
    ]
    assert f"inode {ino}: expected 1024 pages, found a count of 7" in problems[0].text + problems[1].text


def test_a_check_of_a_live_volume_looks_at_the_region(victim: Filesystem) -> None:
    """What the volume holds decoded is not what counts."""
    victim.getattr(victim.resolve(b"g"))
    flip(victim, victim.resolve(b"g") * 256 + 50)
    assert {problem.code for problem in check(victim.volume)} == {"inode-checksum"}


def test_all_superblocks_damaged(victim: Filesystem) -> None:
    for at in (0, *copies_of(victim.volume.sb)):
        flip(victim, at + 60)
    with pytest.raises(FormatError, match="superblock checksum"):
        check_region(victim.region)


def test_a_transaction_to_replay_is_no_problem(victim: Filesystem) -> None:
    at = victim.volume.journal.header_at
    mkfile(victim, b"new", b"x")
    victim.region.store_word(at, victim.region.word(at) + 1 - 2)
    # The transaction before, sealed again: replaying it changes nothing, for it was applied already.
    victim.region.store_word(at, victim.volume.journal.sequence * 2 + 1)
    region = MemoryRegion(image=victim.region.view)
    problems, found = check_region(region)
    assert problems == []
    assert found
    assert found.volume.recovered > 0


def test_a_committed_journal_behind_the_back_of_a_volume(victim: Filesystem) -> None:
    at = victim.volume.journal.header_at
    victim.region.store_word(at, victim.region.word(at) | 1)
    assert {problem.code for problem in check(victim.volume)} == {"journal"}


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_neither_raises_nor_loops(seed: int) -> None:
    """Random damage of metadata, half of it with right checksums."""
    nothing = 0
    for region in damaged_regions(seed, 60):
        try:
            problems, _ = check_region(region)
        except FormatError:
            continue
        nothing += not problems
        assert len(problems) <= MAX_FINDINGS
    assert nothing < 40


def damaged_regions(seed: int, count: int) -> Iterator[CowRegion]:
    """``count`` copies of a region with files of all kinds, each with one or more pages of its metadata damaged."""
    rng = random.Random(seed)
    fs = new_fs(20)
    cast(fs)
    orphan_files(fs, 3)
    for n in range(200):
        mkfile(fs, b"name%d" % n, b"x" if n % 3 == 0 else b"")
    fd = os.memfd_create("image")
    os.write(fd, fs.region.view)
    pages = [page for page in range(fs.volume.total_pages) if is_metadata(fs, page)]
    for _ in range(count):
        region = CowRegion(fd)
        twin = Filesystem(Volume(region), PageTableGuard)
        for _ in range(rng.choice([1, 3, 20])):
            damage(twin, rng, rng.choice(pages))
        yield region
    os.close(fd)


def is_metadata(fs: Filesystem, page: int) -> bool:
    block, index = divmod(page, 512)
    kind = fs.volume.space.table[block]
    if kind == f.BLOCK_SLAB:
        return fs.volume.space.slab(f.BlockNo(block)).kinds[index] in (f.PAGE_HEADER, f.PAGE_NODE, f.PAGE_INODES)
    return kind == f.BLOCK_META and any(fs.region.read(page * f.PAGE, f.PAGE))


def damage(fs: Filesystem, rng: random.Random, page: int) -> None:
    """Change some words of a page, and perhaps make its checksum right again."""
    offset = page * f.PAGE
    at = offset + rng.randrange(f.PAGE // 8) * 8
    old = fs.region.word(at)
    near = [old ^ 1 << rng.randrange(64), (old + 1) % (1 << 64), rng.randrange(1 << 20)]
    fs.region.store_word(at, rng.choice([0, 1, (1 << 64) - 1, *near]))
    if rng.random() < 0.3:
        return
    header = f.PAGE_HEADER_LAYOUT.unpack(fs.region.view, offset)
    if header.magic in (f.NODE_MAGIC, f.SLAB_MAGIC, f.TABLE_MAGIC) and at >= offset + 32:
        body = fs.region.read(offset + 32, f.PAGE - 32)
        fs.region.store(offset, encode_page(header.magic, header.offset, header.owner, header.keys, header.level, body))
    else:
        ino = at // 256
        raw = fs.region.read(ino * 256, 256)
        crc = f.checksum(bytes(4) + raw[36:], ino & 0xFFFFFFFF)
        fs.region.store(ino * 256 + 32, crc.to_bytes(4, "little") + raw[36:40])


def test_problems_are_limited() -> None:
    fs = new_fs(64)
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"many", parent=d)
    fs.lookups.add(ino)
    for n in range(20):
        fs.create(d, b"%d" % n, stat.S_IFREG, ME)
    state = Check(fs.volume, EACH_INODE)
    for n in range(2 * MAX_FINDINGS):
        state.note(Code.LEAKED_PAGE, f"{n}")
    for one in PASSES:
        one(state)
    assert len(state.findings.shown()) == len(state.findings.all) == MAX_FINDINGS


def test_a_fresh_region_is_sound() -> None:
    for mib in (16, 18, 64, 256):
        region = MemoryRegion(mib * MiB)
        mkfs(region)
        assert check(Volume(region)) == []


def test_errno_of_corruption(victim: Filesystem) -> None:
    flip(victim, victim.resolve(b"g") * 256 + 50)
    victim.volume.inodes.clear()
    with pytest.raises(Exception, match="is damaged") as caught:
        victim.getattr(victim.lookup(ROOT, b"g"))
    assert caught.value.errno == errno.EUCLEAN  # type: ignore[attr-defined]
