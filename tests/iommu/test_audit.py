"""Each thing that can be wrong with tables is planted, and the audit reports just that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pkernfs.api import Audited
from pkernfs.format import ATTACHMENT, ATTACHMENT_KEY, MAPPING, READ, ROOT_PGTABLES_INO, Attachment, Requester
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu import devices, mapping, reclaim, replace, views
from pkernfs.iommu.audit import KINDS
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.records import Records
from pkernfs.iommu.walk import walk, walk_device
from tests.iommu.space import BASE, DEVICE, OTHER, GiB, KiB, MiB, guest, make, new

IOVA = 16 * MiB
SMALL = GiB  #: where leaves of 4 KiB are


def prepared() -> Filesystem:
    """Leaves of 2 MiB and 4 KiB, rw and ro; two devices in two domains."""
    fs = make()
    ino, other = guest(fs), guest(fs, b"other", 4 * MiB)
    dom = new(fs)
    mapping.map_file(fs, dom, IOVA, ino)
    mapping.map_file(fs, dom, SMALL + 4 * KiB, other, 64 * KiB, 64 * KiB, "ro")
    mapping.map_file(fs, new(fs, b"dom-1"), 0, other)
    devices.attach(fs, dom, DEVICE)
    devices.attach(fs, fs.resolve(b"iommu/dom-1"), OTHER)
    assert views.audit(fs).problems == []
    return fs


def entry_of(fs: Filesystem, iova: int, level: int = 0, name: bytes = b"dom-0") -> tuple[int, int]:
    """(region offset, value) of the entry of a level (0: the last) for an IOVA."""
    steps = walk(fs, fs.resolve(b"iommu/" + name), iova).steps
    step = next((step for step in steps if step.level == level), steps[-1])
    return step.address - BASE, step.entry


def patch(iova: int, change: Callable[[Filesystem, int], int], level: int = 0) -> Callable[[Filesystem], None]:
    """Change the entry for an IOVA."""

    def plant(fs: Filesystem) -> None:
        at, entry = entry_of(fs, iova, level)
        fs.region.store_word(at, change(fs, entry))

    return plant


def physical(fs: Filesystem, name: bytes) -> int:
    """Where a file's memory begins."""
    return BASE + fs.content.extents(fs.resolve(name))[0].page * 4096


def free_block(fs: Filesystem) -> int:
    """The physical address of a block that nobody uses."""
    return BASE + bytes(fs.volume.space.table).rindex(b"\0") * 2 * MiB


def of_other_domain(fs: Filesystem, _entry: int) -> int:
    """An entry that points to a table of the other domain."""
    return entry_of(fs, 0, 4, b"dom-1")[1]


def twice(fs: Filesystem) -> None:
    """An empty entry that points to a table which another one points to."""
    at, entry = entry_of(fs, IOVA, 3)
    fs.region.store_word(at + 8 * 7, entry)


def leaf_before(fs: Filesystem) -> None:
    """A leaf ahead of the first one of a mapping."""
    fs.region.store_word(entry_of(fs, SMALL + 4 * KiB)[0] - 8, BASE | 3)


def set_bit(page: int, name: bytes = b"iommu/dom-0", on: bool = True) -> Callable[[Filesystem], None]:
    """Change the bitmap of a file of page tables."""

    def plant(fs: Filesystem) -> None:
        at = fs.content.extents(fs.resolve(name))[0].page * 4096 + page // 64 * 8
        word = fs.region.word(at)
        assert bool(word >> page % 64 & 1) != on
        fs.region.store_word(at, word ^ 1 << page % 64)

    return plant


def records(ino_of: bytes, change: Callable[[Records, Transaction], None]) -> Callable[[Filesystem], None]:
    """Change records."""

    def plant(fs: Filesystem) -> None:
        with fs.volume.transaction() as tx:
            found = Records(fs.volume, fs.resolve(ino_of))
            change(found, tx)
            found.finish(tx)

    return plant


def context_word(requester: Requester, word: int, change: Callable[[int], int]) -> Callable[[Filesystem], None]:
    """Change a word of a device's entry."""

    def plant(fs: Filesystem) -> None:
        contexts = Contexts(fs.volume)
        page, index = contexts.place(0, requester)
        at = contexts.pages.offset(page) + 8 * (index + word)
        fs.region.store_word(at, change(fs.region.word(at)))

    return plant


def lost_mapping(found: Records, tx: Transaction) -> None:
    """A mapping that gives fewer rights than the tables."""
    key = IOVA // 4096
    found.put(tx, key, MAPPING.pack(MAPPING.unpack(found.get(key) or b"")._replace(access=READ)))


def attach_to_nothing(found: Records, tx: Transaction) -> None:
    found.put(tx, ATTACHMENT_KEY + 0x77, ATTACHMENT.pack(Attachment(ROOT_PGTABLES_INO, 9, 0)))


#: Kinds and faults that are not of a domain's tables.
NOT_OF_TABLES = {"context", "attachment", "record", "root-table-marked-as-free", "no-page-marked"}


def last_page(fs: Filesystem) -> None:
    set_bit(max(page for page, _ in Domain(fs.volume, fs.resolve(b"iommu/dom-0")).pages.used()) + 100)(fs)


FAULTS: dict[str, tuple[str, Callable[[Filesystem], None]]] = {
    "leaf-to-free-block": ("dangling", patch(IOVA, lambda fs, entry: free_block(fs) | entry & 0xFFF)),
    "leaf-beyond-the-region": ("dangling", patch(IOVA, lambda fs, entry: BASE + GiB | entry & 0xFFF)),
    "leaf-below-the-region": ("dangling", patch(SMALL + 4 * KiB, lambda fs, entry: 4096 | entry & 0xFFF)),
    "table-out-of-the-file": ("dangling", patch(SMALL + 4 * KiB, lambda fs, entry: free_block(fs) | 3, 2)),
    "leaf-to-other-file": ("foreign", patch(IOVA, lambda fs, entry: physical(fs, b"other") | entry & 0xFFF)),
    "leaf-to-other-part": ("foreign", patch(IOVA, lambda fs, entry: entry + 2 * MiB)),
    "leaf-to-superblock": ("foreign", patch(IOVA, lambda fs, entry: BASE | entry & 0xFFF)),
    "leaf-where-no-mapping-is": (
        "foreign",
        lambda fs: fs.region.store_word(entry_of(fs, SMALL + 4 * KiB)[0] - 8, BASE | 3),
    ),
    "writable-though-ro": ("over-permissive", patch(SMALL + 4 * KiB, lambda fs, entry: entry | 2)),
    "mapping-with-fewer-rights": ("over-permissive", records(b"iommu/dom-0", lost_mapping)),
    "leaf-is-gone": ("under-mapped", patch(IOVA, lambda fs, entry: 0)),
    "read-only-though-rw": ("under-mapped", patch(IOVA, lambda fs, entry: entry & ~2)),
    "bit-62": ("reserved-bits", patch(IOVA, lambda fs, entry: entry | 1 << 62)),
    "snoop-bit": ("reserved-bits", patch(SMALL + 4 * KiB, lambda fs, entry: entry | 1 << 11)),
    "large-leaf-not-aligned": ("reserved-bits", patch(IOVA, lambda fs, entry: entry | 1 << 13)),
    "table-with-large-bit-at-level-4": ("reserved-bits", patch(IOVA, lambda fs, entry: entry | 1 << 7, 4)),
    "rest-of-an-entry": ("reserved-bits", lambda fs: fs.region.store_word(entry_of(fs, IOVA, 4)[0] + 80, 1 << 30)),
    "table-twice": ("overlap", twice),
    "page-in-use-that-is-no-table": ("unreachable", last_page),
    "table-marked-as-free": ("bitmap", set_bit(1, on=False)),
    "entry-points-elsewhere": ("context", context_word(DEVICE, 0, lambda word: word + 4096)),
    "entry-with-other-id": ("context", context_word(DEVICE, 1, lambda word: word ^ 1 << 8)),
    "entry-of-a-stranger": ("context", context_word(Requester(0x30), 0, lambda word: 4096 | 1)),
    "entry-is-gone": ("attachment", context_word(DEVICE, 0, lambda word: 0)),
    "attached-to-no-domain": ("attachment", records(b"iommu/root-pgtables", attach_to_nothing)),
    "root-table-marked-as-free": ("bitmap", set_bit(1, b"iommu/root-pgtables", on=False)),
    "no-page-marked": ("unreachable", set_bit(200, b"iommu/root-pgtables")),
    "mapping-of-nothing": (
        "record",
        records(b"iommu/dom-0", lambda found, tx: found.put(tx, 9, b"short")),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(name: str) -> None:
    kind, plant = FAULTS[name]
    fs = prepared()
    plant(fs)
    found = views.audit(fs).problems
    assert found
    assert {problem.kind for problem in found} <= {kind, *CONSEQUENCES.get(name, ())}, found
    assert kind in {problem.kind for problem in found}


@pytest.mark.parametrize("name", [name for name, (kind, _) in FAULTS.items() if not {kind, name} & NOT_OF_TABLES])
def test_tables_are_made_anew(name: str) -> None:
    """Of the mappings, whatever is wrong with the old ones, and devices are pointed to them."""
    fs = prepared()
    FAULTS[name][1](fs)
    dom = fs.resolve(b"iommu/dom-0")
    assert replace.replace(fs, dom, rebuild=True).compared == 0
    assert views.audit(fs).problems == []
    assert {one.kind for one in views.pending_facts(fs)} == {"context", "iotlb"}
    reclaim.acknowledge(fs)
    assert views.audit(fs).problems == []
    assert walk_device(fs, DEVICE, SMALL + 5 * KiB).offset == 65 * KiB


#: What else is true then.
CONSEQUENCES: dict[str, set[str]] = {"table-out-of-the-file": {"under-mapped", "unreachable"}}


def test_every_kind_is_planted() -> None:
    assert {kind for kind, _ in FAULTS.values()} == set(KINDS)


def test_what_waits_for_hardware_is_no_fault() -> None:
    fs = prepared()
    dom = fs.resolve(b"iommu/dom-0")
    replace.replace(fs, dom, 1)
    facts = views.domain_facts(fs, dom, "")
    assert facts.awaiting > 0
    assert views.audit(fs).problems == []
    assert reclaim.acknowledge(fs) == facts.awaiting
    assert views.audit(fs).problems == []


def test_what_an_audit_counts() -> None:
    bytes_ = 8 * MiB + 64 * KiB + 4 * MiB
    assert views.audit(prepared()) == Audited(
        devices=2, domains=2, mappings=3, tables=3 + 2 + 3, bytes=bytes_, problems=[]
    )
