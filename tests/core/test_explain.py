"""What owns an address; and verifying checksums block by block."""

import errno
import random
import stat

import pytest

from pkernfs.cli.main import run
from pkernfs.errors import PkernfsError, UsageError
from pkernfs.format import BLOCK, BLOCK_DATA, BLOCK_FREE, PAGE, PAGES_PER_BLOCK, PageNo
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.paths import paths_of
from pkernfs.fsck.explain import Record, explain
from pkernfs.fsck.scrub import Damage, scrub_all, scrub_step
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import MemoryRegion, open_region
from tests.core.faults import leak_blocks, set_block
from tests.core.faults_iommu import domain
from tests.core.support import ME, ROOT, MiB, map_file, mkdir, mkdomain, mkfile, open_fs
from tests.core.test_check import damaged_regions


def test_every_kind_of_place(fs: Filesystem) -> None:
    folder = mkdir(fs, b"d")
    small, large = mkfile(fs, b"small", b"x" * 5000), mkfile(fs, b"large")
    fs.link(small, folder, b"other")
    fs.setattr(large, SetAttr(size=3 * MiB))
    fs.setxattr(small, b"user.big", b"v" * 9000)
    sb = fs.volume.sb
    assert explain(fs, 8).structure == "superblock"
    assert explain(fs, 256).path == "/"
    assert explain(fs, PAGE).structure == "block table, page 0"
    assert explain(fs, sb.journal_offset).structure == "copy of the superblock"
    assert explain(fs, sb.blocks * BLOCK - 1).structure == "far copy of the superblock"
    assert explain(fs, sb.journal_offset + PAGE).structure == "journal header"
    assert explain(fs, (sb.blocks // 2) * BLOCK).structure == "free"
    extent = fs.content.extents(large)[0]
    facts = explain(fs, extent.page * PAGE + 2 * MiB + 7)
    assert (facts.path, facts.file_offset, facts.beyond_end) == ("/large", 2 * MiB + 7, False)
    assert explain(fs, extent.page * PAGE + 3 * MiB).beyond_end
    page = fs.content.extents(small)[0].page
    facts = explain(fs, page * PAGE + PAGE + 1)
    assert (facts.structure, facts.ino, facts.file_offset) == ("data", small, PAGE + 1)
    assert facts.path in ("/small", "/d/other")
    assert explain(fs, small * 256).structure == "inode"
    assert explain(fs, fs.getattr(small).xattrs * PAGE).structure == "tree node"
    assert explain(fs, fs.getattr(ROOT).root * PAGE).path == "/"
    assert explain(fs, page // 512 * BLOCK).structure == "slab header"
    with pytest.raises(UsageError, match="the size of the region") as refused:
        explain(fs, sb.blocks * BLOCK)
    assert refused.value.errno == errno.EINVAL


def test_page_tables(fs: Filesystem) -> None:
    """Their records, what they are for in the journal, and the memory that they are in."""
    domain = mkdomain(fs)
    map_file(fs, domain, 7, mkfile(fs, b"f", b"x"))
    facts = explain(fs, fs.getattr(domain).iommu * PAGE)
    assert (facts.path, facts.structure, facts.tree) == ("/iommu/dom-0", "tree node", "records")
    (extent,) = fs.content.extents(domain)
    assert explain(fs, extent.page * PAGE + 9).path == "/iommu/dom-0"
    with fs.volume.transaction() as tx:
        tx.put_inode(domain, fs.getattr(domain))
        tx.words.append((extent.page * PAGE + 8, b"w" * 16))
    at = fs.volume.journal.body_at + 16 + 256
    record = Record(fs.volume.journal.sequence, "words", extent.page * PAGE + 8, 16)
    assert explain(fs, at + 31).record == record
    assert explain(fs, at + 32).record is None


def test_content_that_awaits_an_invalidation(fs: Filesystem) -> None:
    domain(fs)
    was = fs.resolve(b"was")
    place = fs.content.extents(was)[0].page * PAGE
    assert explain(fs, place).awaits is None
    fs.unlink(ROOT, b"was")
    facts = explain(fs, place + 7)
    assert (facts.ino, facts.path, facts.orphan, facts.awaits) == (was, None, True, 0)


def test_records_of_the_journal(fs: Filesystem) -> None:
    """Those of the last transaction, each with what it is for; nothing behind them."""
    ino = mkfile(fs, b"f")
    at = fs.volume.journal.body_at
    found = []
    while (record := (facts := explain(fs, at)).record) is not None:
        found.append(record)
        assert facts.structure == f"journal record {len(found) - 1} of the last transaction"
        at += 16 + record.length * (record.kind == "store")
        assert explain(fs, at - 1).record == found[-1]
    assert facts.structure == "journal body, not in use"
    assert {record.sequence for record in found} == {fs.volume.journal.sequence}
    assert any(record.offset <= ino * 256 < record.offset + record.length for record in found)


def test_a_journal_record_of_no_kind(fs: Filesystem) -> None:
    """A crash in the middle of storing a body leaves anything: nothing is made of it."""
    mkfile(fs, b"f")
    at = fs.volume.journal.body_at
    fs.region.store_word(at + 8, 160 << 32 | 8)
    assert explain(fs, at).structure == "journal body, not in use"


def test_trees_and_attributes(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f")
    for n in range(20):
        fs.write(ino, n * 3 * PAGE, b"x")
    fs.setxattr(ino, b"user.big", b"v" * 9000)
    inode = fs.getattr(ino)
    assert explain(fs, inode.root * PAGE).tree == "extents"
    assert explain(fs, inode.xattrs * PAGE).tree == "attributes"
    assert explain(fs, fs.getattr(ROOT).root * PAGE).tree == "directory"
    facts = explain(fs, bytes(fs.region.view).index(b"v" * 9000) + 4096)
    assert (facts.structure, facts.attribute, facts.path) == ("attribute value", "user.big", "/f")
    assert facts.file_offset is None


def test_an_orphan_has_no_path(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"x")
    offset = fs.content.extents(ino)[0].page * PAGE
    assert explain(fs, offset).orphan is False
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"f")
    facts = explain(fs, offset)
    assert (facts.ino, facts.paths, facts.path, facts.orphan) == (ino, [], None, True)


def test_memory_without_an_owner(fs: Filesystem) -> None:
    leak_blocks(fs)
    again = open_fs(fs.region)
    block = again.volume.space.table.find(BLOCK_DATA)
    assert explain(again, block * BLOCK).structure == "data, allocated but owned by nobody"
    set_block(fs, block, BLOCK_FREE)


def test_damaged_regions_are_explained_and_scrubbed() -> None:
    """Or the damage is named: nothing else is raised, and nothing goes on for ever."""
    rng = random.Random(5)
    told = 0
    for region in damaged_regions(5, 30):
        try:
            fs = open_filesystem(region)
        except PkernfsError:
            continue
        for step in scrub_all(fs):
            told += len(step.problems)
        for _ in range(5):
            try:
                told += bool(explain(fs, rng.randrange(region.size)))
            except PkernfsError:
                continue
        assert len(paths_of(fs.volume, range(1 << 20))) < 1000
    assert told > 50


def scrub(fs: Filesystem) -> list[Damage]:
    """All blocks, one after the other."""
    problems: list[Damage] = []
    page = 0
    for step in scrub_all(fs):
        assert step.next > page
        page = step.next
        problems += step.problems
    assert page == fs.volume.total_pages
    return problems


def test_scrub_finds_what_is_damaged_and_nothing_else(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"x")
    fs.setxattr(ino, b"user.big", b"v" * 9000)
    assert scrub(fs) == []
    good = bytes(fs.region.view)
    value = good.index(b"v" * 9000)
    for offset in (
        fs.volume.sb.journal_offset + 20,
        fs.volume.space.far_copy * PAGE + 20,
        PAGE + 40,
        ino * 256 + 40,
        fs.getattr(ROOT).root * PAGE + 60,
        value,
    ):
        other = MemoryRegion(image=good)
        damaged = open_fs(other)
        other.store(offset, bytes([other.view[offset] ^ 1]))
        assert len(scrub(damaged)) == 1, hex(offset)
        is_superblock = offset % PAGE == 20
        assert len(damaged.volume.damage.found) == 1 - is_superblock
        assert damaged.volume.damage.inodes == ({ino} if offset in (ino * 256 + 40, value) else set())


def test_scrub_of_a_block_that_is_no_slab_any_more(fs: Filesystem) -> None:
    """The caller remembers where to go on; what was a slab then may be free now."""
    slab = fs.volume.space.slab_blocks()[0]
    assert scrub_step(fs, PageNo(slab * PAGES_PER_BLOCK)).structures > 0
    assert scrub_step(fs, PageNo((slab - 1) * PAGES_PER_BLOCK)).structures > 0
    assert fs.volume.space.table[fs.volume.sb.first_block] == BLOCK_FREE
    last = scrub_step(fs, PageNo(fs.volume.total_pages - 1))
    assert (last.next, last.problems) == (fs.volume.total_pages, [])
    assert scrub_step(fs, PageNo(10**9)) == (10**9, 0, [])


@pytest.mark.parametrize("name", [b"\xff", b"\x1b[2J", b"two\nlines"], ids=["not-utf-8", "escape", "newline"])
def test_names_do_nothing_to_a_terminal(made: str, capsys: pytest.CaptureFixture[str], name: bytes) -> None:
    with open_region(made) as region:
        fs = open_fs(region)
        ino = mkfile(fs, name, b"x", mkdir(fs, name))
        fs.create(ROOT, b"link", stat.S_IFLNK | 0o777, ME, target=name)
        offset = fs.content.extents(ino)[0].page * PAGE
    for words in (["ls", "-lR", made], ["explain", "--offset", made, str(offset)]):
        assert run(words) == 0
        out = capsys.readouterr().out
        assert "\\" in out
        assert "\x1b" not in out
        assert "two\n" not in out
