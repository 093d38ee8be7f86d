"""The proof finds faults: each is planted into the product, and the same functions that prove must then report it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest

from pkernfs import format as on_region
from pkernfs.format import BLOCK_FREE, BlockNo, Ino, PageNo
from pkernfs.fs import journal
from pkernfs.fs.allocator import Allocator
from pkernfs.fs.content import Content
from pkernfs.fs.journal import Journal
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.space import block_of
from pkernfs.fs.transaction import Transaction
from pkernfs.region import MemoryRegion, Region
from tests.core.crash import proof
from tests.core.crash.operations import OPERATIONS
from tests.core.crash.proof import CrashFailure, Proof, Tally, prove_power_cuts, prove_prefixes, record
from tests.core.crash.states import STATES, empty_space, image_of

Step = tuple[str, Any, Any]  #: a method of the region, and what it is called with


class Steps:
    """Stands for a region while a transaction is committed, and notes what would be done to it."""

    whole = True  #: no page must be asked for

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def store(self, offset: int, data: bytes) -> None:
        self.steps.append(("store", offset, data))

    def store_word(self, offset: int, value: int) -> None:
        self.steps.append(("store_word", offset, value))

    def discard(self, offset: int, length: int) -> None:
        self.steps.append(("discard", offset, length))

    def barrier(self) -> None:
        self.steps.append(("barrier", 0, 0))


class Commit(NamedTuple):
    """The steps of a commit by their names; ``order`` gives them in the order of the product."""

    before_body: list[Step]  #: a barrier, as all of ``before_...``
    body: list[Step]
    header: list[Step]
    before_commit: list[Step]
    commit: list[Step]
    before_apply: list[Step]
    stores: list[Step]
    discards: list[Step]
    before_checkpoint: list[Step]
    checkpoint: list[Step]


def named(steps: list[Step]) -> Commit:
    discards = [step for step in steps if step[0] == "discard"]
    rest = [[step] for step in steps if step[0] != "discard"]
    first, stores, last = rest[:6], [step for one in rest[6:-2] for step in one], rest[-2:]
    return Commit(*first, stores, discards, *last)  # type: ignore[call-arg]


Order = Callable[[Commit], Iterable[list[Step]]]
Plant = Callable[[pytest.MonkeyPatch], None]


def commits(order: Order) -> Plant:
    """Let every commit take its steps in this order."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = Journal.commit

        def commit(self: Journal, stores: Any, discards: Any, words: Any) -> None:
            region, steps = self.region, Steps()
            self.region = steps  # type: ignore[assignment]
            try:
                real(self, stores, discards, words)
            finally:
                self.region = region
            for part in order(named(steps.steps)):
                for method, *values in part:
                    getattr(region, method)(*(values if method != "barrier" else ()))

        patch.setattr(Journal, "commit", commit)

    return plant


def without(name: str) -> Plant:
    """Commits without one of their steps."""
    return commits(lambda c: [part for key, part in c._asdict().items() if key != name])


def moved(name: str, ahead_of: str) -> Plant:
    """Commits that take one of their steps too early."""

    def order(c: Commit) -> Iterable[list[Step]]:
        for key, part in c._asdict().items():
            if key == ahead_of:
                yield getattr(c, name)
            if key != name:
                yield part

    return commits(order)


def in_place(c: Commit) -> Iterable[list[Step]]:
    """No journal at all."""
    return c.stores, c.discards


class Quiet:
    """A region without its ``count``-th barrier."""

    def __init__(self, region: Region, count: int) -> None:
        self.region = region
        self.count = count

    def barrier(self) -> None:
        self.count -= 1
        if self.count:
            self.region.barrier()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.region, name)


def recovery_without_barrier(count: int) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = Journal.recover

        def recover(self: Journal) -> int:
            region = self.region
            self.region = Quiet(region, count)  # type: ignore[assignment]
            try:
                return real(self)
            finally:
                self.region = region

        patch.setattr(Journal, "recover", recover)

    return plant


def no_barrier_before_size(patch: pytest.MonkeyPatch) -> None:
    real = Content._written

    def written(self: Content, *words: Any) -> None:
        region = self.region
        self.region = Quiet(region, 1)  # type: ignore[assignment]
        try:
            real(self, *words)
        finally:
            self.region = region

    patch.setattr(Content, "_written", written)


def size_before_content(patch: pytest.MonkeyPatch) -> None:
    real = Content.write

    def write(self: Content, ino: Ino, offset: int, data: bytes, **more: Any) -> int:
        self._written(ino, self.volume.inode(ino), offset + len(data), self.volume.clock(), self.volume.clock())
        return real(self, ino, offset, data, **more)

    patch.setattr(Content, "write", write)


def no_checksum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal, "checksum", lambda data, start=0: 0)


def wrong_checksum(patch: pytest.MonkeyPatch) -> None:
    """Of the header only: what the body holds is not in it."""
    real = on_region.checksum
    patch.setattr(journal, "checksum", lambda data, start=0: real(b"" if len(data) > 40 else data, start))


def table_in_place(patch: pytest.MonkeyPatch) -> None:
    """The allocation table is stored when it changes, and not by the journal."""
    real = Allocator._set_kind

    def set_kind(self: Allocator, tx: Transaction, block: BlockNo, count: int, kind: int) -> None:
        real(self, tx, block, count, kind)
        for page in self.space.pages:
            self.region.store(page.offset, page.encode())

    patch.setattr(Allocator, "_set_kind", set_kind)


def slabs_in_place(patch: pytest.MonkeyPatch) -> None:
    """The header of a slab is stored when a page of it is allocated."""
    real = Allocator.alloc_pages

    def alloc_pages(self: Allocator, tx: Transaction, count: int, kind: int) -> list[tuple[PageNo, int]]:
        runs = real(self, tx, count, kind)
        for page, _ in runs:
            slab = self.space.slab(block_of(page)[0])
            if not slab.fresh:
                self.region.store(slab.offset, slab.encode())
        return runs

    patch.setattr(Allocator, "alloc_pages", alloc_pages)


def pages_free_at_once(patch: pytest.MonkeyPatch) -> None:
    """What a transaction frees it allocates again itself, before it is sealed."""

    def free_pages(self: Transaction, page: PageNo, count: int = 1) -> None:
        block, index = block_of(page)
        slab = self.cache.space.slab(block)
        self.change(slab)
        slab.kinds[index : index + count] = bytes(count)
        slab.free += count
        self.cache.space.with_pages.add(block)

    patch.setattr(Transaction, "free_pages", free_pages)


def blocks_free_at_once(patch: pytest.MonkeyPatch) -> None:
    def free_blocks(self: Transaction, block: BlockNo, count: int) -> None:
        Allocator(self.cache.space)._set_kind(self, block, count, BLOCK_FREE)
        self.cache.region.discard(block << 21, count << 21)

    patch.setattr(Transaction, "free_blocks", free_blocks)


def memory_as_it_is(patch: pytest.MonkeyPatch) -> None:
    """Allocated memory is not made zero."""
    patch.setattr(MemoryRegion, "reserve", lambda self, offset, length: None)


def orphans_unlisted_first(patch: pytest.MonkeyPatch) -> None:
    """What takes several transactions is not listed meanwhile."""
    patch.setattr(Orphans, "add", lambda self, tx, ino: None)


class Fault(NamedTuple):
    """``caught_by``: cases (state, operation) of which at least one must fail."""

    plant: Plant
    caught_by: list[tuple[str, str]]


NAMES = [("small", "rename-over-file")]
#: Faults that the end of a process or of the kernel shows.
ORDER = {
    "commit before the body": Fault(moved("commit", "body"), NAMES),
    "commit before the header": Fault(moved("commit", "header"), NAMES),
    "a body without a right checksum": Fault(without("header"), NAMES),
    "applied before the commit": Fault(moved("stores", "before_commit"), NAMES),
    "discarded before the commit": Fault(moved("discards", "before_commit"), [("small", "unlink-big")]),
    "checkpointed before it is applied": Fault(moved("checkpoint", "stores"), NAMES),
    "rename in place": Fault(commits(in_place), [("small", "rename"), ("small", "exchange-directories-elsewhere")]),
    "block table in place": Fault(table_in_place, [("small", "grow-5242880")]),
    "block table in place, cut": Fault(table_in_place, [("small", "unlink-big")]),
    "slab header in place": Fault(slabs_in_place, [("small", "xattr-large")]),
    "pages used again before the commit": Fault(pages_free_at_once, [("small", "xattr-large-by-large")]),
    "blocks used again before the commit": Fault(
        blocks_free_at_once, [("small", "cut-100000"), ("small", "unlink-big")]
    ),
    "size before content": Fault(size_before_content, [("small", "append-in-page")]),
    "memory with old bytes": Fault(memory_as_it_is, [("small", "chmod")]),
    "orphans that nobody lists": Fault(orphans_unlisted_first, [("small", "unlink-sparse"), ("small", "unlink-open")]),
}
#: Missing flushes, which only a power cut shows.
FLUSHES = {
    "before the body": Fault(without("before_body"), NAMES),
    "before the commit": Fault(without("before_commit"), NAMES),
    "before it is applied": Fault(without("before_apply"), NAMES),
    "before it is checkpointed": Fault(without("before_checkpoint"), NAMES),
    "before the size": Fault(no_barrier_before_size, [("small", "append-in-page"), ("small", "append-behind-gap")]),
}
RECOVERY_FLUSHES = {
    "before it is applied": Fault(recovery_without_barrier(1), [("small", "rename")]),
    "before it is checkpointed": Fault(recovery_without_barrier(2), [("small", "rename")]),
}


@pytest.fixture(autouse=True)
def _without_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept between proofs is made without the fault, and what is found with it is not kept."""
    for state in STATES:
        image_of(state)
    empty_space()
    monkeypatch.setattr(proof, "WORKS", set())


def fails(prove: Callable[[str, str], Tally], state: str, name: str) -> bool:
    try:
        prove(state, name)
    except CrashFailure as error:
        print(error)
        return True
    return False


def reported(fault: Fault, monkeypatch: pytest.MonkeyPatch, prove: Callable[[str, str], Tally]) -> None:
    """None of the proofs fails without the fault, and one does with it."""
    for case in fault.caught_by:
        prove(*case)
    monkeypatch.setattr(proof, "WORKS", set())
    fault.plant(monkeypatch)
    assert any(fails(prove, *case) for case in fault.caught_by)


@pytest.mark.parametrize("fault", ORDER.values(), ids=ORDER)
def test_a_wrong_order_is_reported(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    reported(fault, monkeypatch, lambda state, name: prove_prefixes(state, name, ways=2))


@pytest.mark.parametrize("fault", FLUSHES.values(), ids=FLUSHES)
def test_a_missing_flush_is_reported(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    reported(fault, monkeypatch, lambda state, name: prove_power_cuts(state, name, subsets=4))


@pytest.mark.parametrize("fault", RECOVERY_FLUSHES.values(), ids=RECOVERY_FLUSHES)
def test_a_missing_flush_in_recovery_is_reported(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    reported(fault, monkeypatch, lambda state, name: prove_power_cuts(state, name, subsets=1, depth=1))


@pytest.mark.parametrize("plant", [no_checksum, wrong_checksum])
def test_a_missing_checksum_is_reported(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flushes are in place the commit alone would do; the checksum is for a medium that flushes nothing."""

    def prove(state: str, name: str) -> Tally:
        operation = OPERATIONS[name]
        one = Proof(record(image_of(state), [operation.run]), operation, refusal=True)
        one.committed_in_part(subsets=20)
        return one.tally

    reported(Fault(plant, [("small", "rename-over-file")]), monkeypatch, prove)
