"""What owns an address; and verifying checksums block by block."""

import errno

import pytest

from pkernfs.errors import UsageError
from pkernfs.format import BLOCK, BLOCK_FREE, PAGE, PAGES_PER_BLOCK
from pkernfs.fs.explain import explain
from pkernfs.fs.filesystem import Filesystem, SetAttr
from pkernfs.fs.scrub import Damage, scrub_all, scrub_step
from pkernfs.region import MemoryRegion
from tests.core.support import ROOT, MiB, mkdir, mkfile, open_fs


def test_every_kind_of_place(fs: Filesystem) -> None:
    folder = mkdir(fs, b"d")
    small, large = mkfile(fs, b"small", b"x" * 5000), mkfile(fs, b"large")
    fs.link(small, folder, b"other")
    fs.setattr(large, SetAttr(size=3 * MiB))
    fs.setxattr(small, b"user.big", b"v" * 9000)
    sb = fs.volume.sb
    assert explain(fs, 8)["structure"] == "superblock"
    assert explain(fs, 256)["path"] == "/"
    assert explain(fs, PAGE)["structure"] == "block table, page 0"
    assert explain(fs, sb.journal_offset)["structure"] == "copy of the superblock"
    assert explain(fs, sb.journal_offset + PAGE)["structure"] == "journal header"
    assert explain(fs, (sb.blocks // 2) * BLOCK)["structure"] == "free"
    extent = fs.extents(large)[0]
    facts = explain(fs, extent.page * PAGE + 2 * MiB + 7)
    assert (facts["path"], facts["file_offset"], facts["beyond_end"]) == ("/large", 2 * MiB + 7, False)
    assert explain(fs, extent.page * PAGE + 3 * MiB)["beyond_end"]
    page = fs.extents(small)[0].page
    facts = explain(fs, page * PAGE + PAGE + 1)
    assert (facts["structure"], facts["ino"], facts["file_offset"]) == ("data", small, PAGE + 1)
    assert facts["path"] in ("/small", "/d/other")
    assert explain(fs, small * 256)["structure"] == "inode"
    assert explain(fs, fs.getattr(small).xattrs * PAGE)["structure"] == "tree node"
    assert explain(fs, fs.getattr(ROOT).root * PAGE)["path"] == "/"
    assert explain(fs, page // 512 * BLOCK)["structure"] == "slab header"
    with pytest.raises(UsageError, match="the size of the region") as refused:
        explain(fs, sb.blocks * BLOCK)
    assert refused.value.errno == errno.EINVAL


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
        PAGE + 40,
        ino * 256 + 40,
        fs.getattr(ROOT).root * PAGE + 60,
        value,
    ):
        other = MemoryRegion(image=good)
        damaged = open_fs(other)
        other.store(offset, bytes([other.view[offset] ^ 1]))
        assert len(scrub(damaged)) == 1, hex(offset)


def test_scrub_of_a_block_that_is_no_slab_any_more(fs: Filesystem) -> None:
    """The caller remembers where to go on; what was a slab then may be free now."""
    slab = fs.volume.allocator.slab_blocks()[0]
    assert scrub_step(fs, slab * PAGES_PER_BLOCK).structures > 0
    assert scrub_step(fs, (slab - 1) * PAGES_PER_BLOCK).structures > 0
    assert fs.volume.allocator.table[fs.volume.sb.first_block] == BLOCK_FREE
    last = scrub_step(fs, fs.volume.total_pages - 1)
    assert (last.next, last.problems) == (fs.volume.total_pages, [])
    assert scrub_step(fs, 10**9) == (10**9, 0, [])
