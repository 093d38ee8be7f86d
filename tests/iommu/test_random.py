"""Random mappings, held against a dict of pages by the second walker; and a look at the tables after every store."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pkernfs.errors import FsError
from pkernfs.format import PAGE, ROOT_INO, GiB, Ino, MiB, Requester
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.mkfs import mkfs
from pkernfs.iommu import devices, domain, mapping, reclaim, replace
from pkernfs.iommu.audit import Audit
from pkernfs.region import MemoryRegion
from tests.core.support import ME, assert_sound, open_fs
from tests.iommu import walker
from tests.iommu.stamped import by_page, scattered_files, stamp, stamp_at, stamped_file
from tests.iommu.walker import READ, WRITE, Memory, Translation, translate

BASE = 1 << 40  #: physical address of the region
DEVICE = Requester(0x28)  #: 00:05.0
BLOCK = 2 * MiB
RIGHTS = {"rw": READ | WRITE, "ro": READ, "wo": WRITE}


class Watched(MemoryRegion):
    """A region that calls ``watch`` after every store of an 8-byte word, and in between those of what is longer."""

    watch: Callable[[], None] | None = None

    def store_word(self, offset: int, value: int) -> None:
        super().store_word(offset, value)
        if self.watch:
            self.watch()

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().store(offset, data)
        if self.watch:
            self.watch()


class World:
    """A domain with one device, files to map, and what is mapped: by IOVA page the stamp and the rights."""

    def __init__(self, form: str, levels: int, seed: int, mib: int = 128) -> None:
        self.random = random.Random(seed)
        region = Watched(mib * MiB)
        mkfs(region, phys_base=BASE)
        self.region, self.fs = region, open_fs(region)
        self.memory = Memory(region.view, BASE)
        self.levels = levels
        self.files = {stamped_file(self.fs, b"large", 24 * MiB): 24 * MiB // PAGE}
        self.files |= dict.fromkeys(scattered_files(self.fs, (b"a", b"b"), 40), 40)
        self.files[stamped_file(self.fs, b"odd", BLOCK + 5 * PAGE)] = BLOCK // PAGE + 5
        self.ino = domain.create(self.fs, b"dom-0", form, levels, ME)
        devices.attach(self.fs, self.ino, DEVICE)
        root = devices.root_table(self.fs, form, 0)
        self.walker: Any = (walker.Vtd if form == "vtd" else walker.Amd)(self.memory, root)
        self.pages: dict[int, tuple[int, int]] = {}
        self.pierced: list[tuple[int, Ino, int, int, str]] = []  #: arguments of ``enter``
        # IOVAs are close together, so that mappings meet, at the beginning, about the middle and at the very end.
        window = 64 * MiB // PAGE
        last = 1 << 9 * levels
        self.windows = [0, GiB // PAGE - window // 2, last - window]

    # -- steps ----------------------------------------------------------------------------------------------------

    def some_range(self) -> tuple[int, int]:
        """(first page, pages) of IOVAs."""
        start = self.random.choice(self.windows) + self.random.randrange(64 * MiB // PAGE)
        count = self.random.choice((1, 2, 30, 511, 512, 513, 1024, 1500))
        if self.random.random() < 0.7:
            start &= -512
        return start, min(count, (1 << 9 * self.levels) - start)

    def map(self) -> None:
        ino, size = self.random.choice(list(self.files.items()))
        first, count = self.some_range()
        count = min(count, size)
        offset = self.random.randrange(size - count + 1)
        if self.random.random() < 0.7:
            offset &= -512
        self.enter(first, ino, offset, count, self.random.choice(("rw", "rw", "ro", "wo")))

    def enter(self, first: int, ino: Ino, offset: int, count: int, access: str) -> None:
        """Map, or see that it is refused."""
        new = {first + n: (stamp(ino, offset + n), RIGHTS[access]) for n in range(count)}
        taken = not self.pages.keys().isdisjoint(new)
        with self.refused(errno.EEXIST if taken else 0), self.watching({**self.pages, **new}):
            mapping.map_file(self.fs, self.ino, first * PAGE, ino, offset * PAGE, count * PAGE, access)
        if not taken:
            self.pages |= new
        self.check(range(first - 2, first + count + 2))

    def unmap(self) -> None:
        self.leave(*self.some_range())

    def pierce(self) -> None:
        """Unmap a few pages of something, which are mapped again later: large leaves are split and merged."""
        if not self.pages:
            return
        first = self.random.choice(list(self.pages))
        (mark, access), count = self.pages[first], 1
        while count < 40 and self.pages.get(first + count) == (mark + count, access):
            count += 1
        self.leave(first, count)
        name = next(name for name, rights in RIGHTS.items() if rights == access)
        self.pierced.append((first, Ino(mark >> 32), mark & 0xFFFFFFFF, count, name))

    def heal(self) -> None:
        """Map again what was pierced last."""
        if self.pierced:
            self.enter(*self.pierced.pop())

    def leave(self, first: int, count: int) -> None:
        """Unmap, or see that it is refused."""
        left = {page: found for page, found in self.pages.items() if not first <= page < first + count}
        gone = len(self.pages) - len(left)
        with self.refused(0 if gone else errno.ENOENT), self.watching(left):
            assert mapping.unmap(self.fs, self.ino, first * PAGE, count * PAGE) == gone * PAGE
        self.pages = left
        self.check(range(first - 2, first + count + 2))

    def replace(self) -> None:
        with self.watching(self.pages):
            replace.replace(self.fs, self.ino, self.random.choice((0, 1, 2, 3)))

    def acknowledge(self) -> None:
        with self.watching(self.pages):
            reclaim.acknowledge(self.fs)

    def step(self) -> None:
        choices = (self.map, self.unmap, self.pierce, self.heal, self.replace, self.acknowledge)
        self.random.choices(choices, weights=(10, 6, 6, 6, 1, 1))[0]()

    @contextmanager
    def refused(self, number: int) -> Iterator[None]:
        """The block raises FsError with this errno; 0: it does not."""
        if not number:
            yield
            return
        with pytest.raises(FsError) as caught:
            yield
        assert caught.value.errno == number, caught.value

    # -- judging --------------------------------------------------------------------------------------------------

    def found(self, page: int) -> tuple[int, int] | None:
        """The stamp and the rights of an IOVA page, as the hardware finds them; None: nothing is there."""
        for access in (READ, WRITE):
            found = self.walker.translate(DEVICE, page * PAGE + 8, access)
            if isinstance(found, Translation):
                return stamp_at(self.memory, found), found.access
        return None

    def check(self, pages: range) -> None:
        """The edges of a range, and a few pages of it."""
        for page in {*pages[:4], *pages[-4:], *self.random.choices(pages, k=4)}:
            if 0 <= page < 1 << 9 * self.levels:
                assert self.found(page) == self.pages.get(page), f"IOVA {page * PAGE:#x}"

    def check_all(self) -> None:
        """Every page, in the order of the tables."""
        leaves = list(self.walker.leaves(DEVICE))
        assert leaves == sorted(leaves)
        assert by_page(self.memory, leaves) == self.pages

    @contextmanager
    def watching(self, after: dict[int, tuple[int, int]]) -> Iterator[None]:
        """After every store in the block, some pages translate to what they did, or to what they are to.

        They are those at the edges of what changes, and of what lies about it.
        """
        before = self.pages
        edges = [page for page in before if before.get(page) == after.get(page)]
        changed = before.keys() ^ after.keys()
        near = [min(changed), max(changed)] if changed else []
        sample = {page + by for page in near for by in (-1, 0, 1)} | {page & -512 for page in near}
        sample.update(page | 511 for page in near)
        sample.update(self.random.choices(edges, k=3) if edges else ())
        expected = [(page, {before.get(page), after.get(page)}) for page in sample if 0 <= page < 1 << 9 * self.levels]

        def watch() -> None:
            for page, allowed in expected:
                assert self.found(page) in allowed, f"IOVA {page * PAGE:#x}, in the middle of a change"

        self.region.watch = watch
        try:
            yield
        finally:
            self.region.watch = None

    def finish(self) -> None:
        """The filesystem is sound, and its own audit finds nothing."""
        self.check_all()
        audit = Audit(self.fs)
        for _ in audit.run():
            pass
        assert audit.problems == []
        assert_sound(self.fs)


FORMATS = [(form, levels) for form in ("vtd", "amd") for levels in (3, 4, 5)]


@pytest.mark.parametrize(("form", "levels"), FORMATS)
def test_random_mappings(form: str, levels: int) -> None:
    world = World(form, levels, seed=levels)
    for step in range(120):
        world.step()
        if step % 10 == 0:
            world.check_all()
    world.finish()
    if world.pages:
        for start in world.windows:
            count = 64 * MiB // PAGE
            if any(start <= page < start + count for page in world.pages):
                mapping.unmap(world.fs, world.ino, start * PAGE, count * PAGE)
    world.pages = {}
    world.finish()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "levels"), FORMATS)
@pytest.mark.parametrize("seed", range(100, 103))
def test_many_random_mappings(form: str, levels: int, seed: int) -> None:
    world = World(form, levels, seed)
    for step in range(1000):
        world.step()
        if step % 50 == 0:
            world.check_all()
    world.finish()


@pytest.mark.parametrize("form", ["vtd", "amd"])
def test_tables_that_were_given_up_are_good_until_hardware_has_invalidated_them(form: str) -> None:
    """Hardware caches entries that point to tables too: walks go on from any table that was reachable once.

    What stays is found; what does not is found where it was, or where it is now, or not at all: never in other memory.
    """
    world = World(form, 4, seed=17)
    for _ in range(30):
        world.map()
    cached = [
        (page, found, walk_of(world, page)) for page, found in world.random.sample(list(world.pages.items()), 200)
    ]
    ever = {page: {found[0]} for page, found, _ in cached}
    before = seen = tables_of(world)
    gone: set[int] = set()  #: pages that were not mapped as they are now all the time: invalidation is asked for
    for step in range(100):
        world.random.choices((world.map, world.unmap, world.pierce, world.heal, world.replace), (8, 8, 6, 6, 1))[0]()
        now = tables_of(world)
        assert not (now - before) & seen, "memory that was a table is one again, for other IOVAs"
        before, seen = now, seen | now
        for page, found, tables in cached:
            expected = world.pages.get(page)
            ever[page] |= {expected[0]} if expected else set()
            gone |= {page} if expected != found else set()
            for level, table in tables if step % 10 == 0 else ():
                walk = translate(pages_below(world, level), table, page * PAGE, READ if found[1] & READ else WRITE)
                where = f"IOVA {page * PAGE:#x} from the table of level {level} at {table:#x}: {walk}"
                if isinstance(walk, Translation):
                    assert stamp_at(world.memory, walk) in (ever[page] if page in gone else {found[0]}), where
                else:
                    assert page in gone, where
    assert 0 < len(gone) < len(cached)
    assert seen != before, "no table was given up"
    reclaim.acknowledge(world.fs)
    world.finish()


def pages_below(world: World, level: int) -> Any:
    """The walker of tables from a level on."""
    if isinstance(world.walker, walker.Vtd):
        return walker.VtdPages(world.memory, level)
    return walker.AmdPages(world.memory, level)


def walk_of(world: World, page: int) -> list[tuple[int, int]]:
    """(level, physical address) of all tables that point to a page."""
    entry = world.walker.context(DEVICE) if hasattr(world.walker, "context") else world.walker.device(DEVICE)
    level, table, found = entry.levels, entry.table, []
    while level:
        found.append((level, table))
        step = pages_below(world, level).step(table, level, page >> 9 * (level - 1) & 511)
        assert step is not None
        table, level = step.target, step.level
    return found


def tables_of(world: World) -> set[int]:
    """The physical addresses of all tables that point to anything."""
    entry = world.walker.context(DEVICE) if hasattr(world.walker, "context") else world.walker.device(DEVICE)
    todo, found = [(entry.levels, entry.table)], set()
    while todo:
        level, table = todo.pop()
        found.add(table)
        pages = pages_below(world, level)
        for index in range(512) if level > 1 else ():
            step = pages.step(table, level, index)
            if step is not None and step.level:
                todo.append((step.level, step.target))
    return found


class Sparse(Watched):
    """A region of fresh memory, which is zero as it is."""

    def reserve(self, offset: int, length: int) -> None:
        pass


@pytest.mark.parametrize("form", ["vtd", "amd"])
def test_leaves_of_1_gib(form: str) -> None:
    region = Sparse(3 * GiB)
    mkfs(region, phys_base=BASE)
    fs = open_fs(region)
    memory = Memory(region.view, BASE)
    ino = domain.create(fs, b"dom-0", form, 4, ME)
    devices.attach(fs, ino, DEVICE)
    hardware: Any = (walker.Vtd if form == "vtd" else walker.Amd)(memory, devices.root_table(fs, form, 0))
    file = fs.create(ROOT_INO, b"ram", 0o100600, ME)
    fs.setattr(file, SetAttr(size=2 * GiB + 512 * MiB))
    (extent,) = fs.content.extents(file)
    start = BASE + extent.page * PAGE
    offset = -start % GiB
    mapping.map_file(fs, ino, 8 * GiB, file, offset, GiB)
    assert [leaf.length for leaf in hardware.leaves(DEVICE)] == [GiB]
    assert hardware.translate(DEVICE, 8 * GiB + 12345, WRITE) == Translation(start + offset + 12345, GiB, READ | WRITE)
    # One page less, and there is a table for each half of the way down.
    mapping.unmap(fs, ino, 8 * GiB + 5 * BLOCK + PAGE, PAGE)
    sizes = [leaf.length for leaf in hardware.leaves(DEVICE)]
    assert (sizes.count(BLOCK), sizes.count(PAGE)) == (511, 511)
    # And again as a whole.
    mapping.map_file(fs, ino, 8 * GiB + 5 * BLOCK + PAGE, file, offset + 5 * BLOCK + PAGE, PAGE)
    assert [leaf.length for leaf in hardware.leaves(DEVICE)] == [GiB]
    # Memory that does not lie as the IOVAs do gets smaller ones.
    mapping.map_file(fs, ino, 16 * GiB + BLOCK, file, offset, BLOCK)
    mapping.map_file(fs, ino, 24 * GiB + PAGE, file, offset, BLOCK)
    sizes = [leaf.length for leaf in hardware.leaves(DEVICE) if leaf.iova >= 16 * GiB]
    assert sizes == [BLOCK, *[PAGE] * 512]
    assert_sound(fs)
