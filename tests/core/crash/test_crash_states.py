"""The starting states are what their names say: the operations meet the growth and shrinking that they stand for."""

import pytest

from pkernfs.format import JOURNAL_HEADER, PAGE, PAGE_INODES, PAGE_NODE
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.journal import MAX_SEQUENCE
from pkernfs.region import MemoryRegion
from tests.core.crash.operations import CASES, OPERATIONS
from tests.core.crash.states import STATES, image_of
from tests.core.support import open_fs


def structures(fs: Filesystem) -> dict[str, int]:
    """How many there are of each."""
    space = fs.volume.space
    kinds = [kind for block in space.slab_blocks() for kind in space.slab(block).kinds]
    return {
        "slabs": len(space.slab_blocks()),
        "pages of inodes": kinds.count(PAGE_INODES),
        "nodes": kinds.count(PAGE_NODE),
        "blocks": space.blocks - space.free_blocks,
        "orphans": len(fs.orphans.inos()),
        "sequence": fs.volume.journal.sequence,
    }


@pytest.mark.parametrize(
    ("state", "name", "structure", "change"),
    [
        ("split", "create", "nodes", 2),
        ("merge", "unlink", "nodes", -2),
        ("small", "create-first", "nodes", 1),
        ("small", "unlink-only-name", "nodes", -1),
        ("no-slots", "create", "pages of inodes", 1),
        ("last-slot", "last-slot-goes", "pages of inodes", -1),
        ("no-pages", "create", "slabs", 1),
        ("last-page", "last-page-goes", "slabs", -1),
        ("small", "sixth-extent", "nodes", 1),
        ("small", "cut-sparse-0", "nodes", -1),
        ("leaves", "new-extent-level", "nodes", 2),
        ("leaves", "cut-extent-level", "nodes", -2),
        ("small", "makes-block", "blocks", 1),
        ("small", "cut-100000", "blocks", -2),
        ("small", "unlink-open", "orphans", 1),
    ],
)
def test_growth_and_shrinking(state: str, name: str, structure: str, change: int) -> None:
    fs = open_fs(MemoryRegion(image=image_of(state)))
    before = structures(fs)
    OPERATIONS[name].run(fs)
    assert structures(fs)[structure] - before[structure] == change


def test_a_sequence_that_begins_again() -> None:
    fs = open_fs(MemoryRegion(image=image_of("old-sequence")))
    assert structures(fs)["sequence"] == MAX_SEQUENCE
    OPERATIONS["create"].run(fs)
    assert structures(fs)["sequence"] == 1


def test_the_largest_transaction() -> None:
    """It changes the headers of all slabs that have room, and fits the journal that mkfs makes for it."""
    fs = open_fs(MemoryRegion(image=image_of("holes")))
    slabs = structures(fs)["slabs"]
    assert slabs == fs.volume.space.blocks - fs.volume.space.first_block
    OPERATIONS["fill-holes"].run(fs)
    journal = fs.volume.journal
    header = JOURNAL_HEADER.unpack(fs.region.read(journal.header_at, JOURNAL_HEADER.size))
    assert (slabs - 1) * PAGE < header.length <= journal.capacity


def test_every_state_and_operation_is_used() -> None:
    assert set(CASES) == set(STATES)
    assert {name for names in CASES.values() for name in names} == set(OPERATIONS)
