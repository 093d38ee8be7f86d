"""Crashes: every operation is cut at every store, and what the next mount finds is the state before or after it.

The last store may be torn: of its 8-byte words any may be there and any not.  Stores of words are whole.
"""

import errno
import functools
import itertools
import mmap
import os
import random
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from pkernfs.errors import FormatError, FsError
from pkernfs.format import PAGE
from pkernfs.fs.check import check
from pkernfs.fs.filesystem import Filesystem, SetAttr, Statfs
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.names import RENAME_EXCHANGE
from pkernfs.region import MemoryRegion, RecordingRegion, Region, Store
from tests.core.support import ME, ROOT, SEED, UUID, MiB, Shape, full, mkdir, mkfile, open_fs, tree

SIZE = 20 * MiB


class CowRegion(Region):
    """A private view of an image in a memory file: what recovery writes is gone afterwards."""

    def __init__(self, fd: int) -> None:
        self.map = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        super().__init__(memoryview(self.map))

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length)


class RecordingCowRegion(CowRegion):
    """The same, with a log."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.log: list[Store] = []

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.log.append(Store(offset, bytes(data), False))
        super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        self.log.append(Store(offset, value.to_bytes(8, "little"), True))
        super().store_word(offset, value)


# -- starting states --------------------------------------------------------------------------------------------------


def cast(fs: Filesystem) -> None:
    """The files that the operations below work on."""
    d = mkdir(fs, b"d")
    mkfile(fs, b"f", b"small file", d)
    fs.link(fs.lookup(d, b"f"), ROOT, b"g")
    mkdir(fs, b"empty")
    mkfile(fs, b"inner", b"x", mkdir(fs, b"e", d))
    mkfile(fs, b"big", bytes(range(1, 251)) * 12_000)
    sparse = mkfile(fs, b"sparse")
    for n in range(80):
        fs.write(sparse, n * 2 * PAGE, b"%d" % n)
    fs.create(ROOT, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 500)
    for name, size in ((b"user.small", 100), (b"user.large", 9000)):
        fs.setxattr(d, name, b"v" * size)
    # Memory that was used before and is free now: what a file must never show.
    mkfile(fs, b"junk", b"\xee" * (MiB - PAGE))
    fs.unlink(ROOT, b"junk")


def small(fs: Filesystem) -> None:
    """A handful of files."""
    cast(fs)


def nodes(fs: Filesystem, ino: int) -> int:
    return len(list(fs.directory(ino).tree.all_pages()))


def about_to_split(fs: Filesystem) -> None:
    """One name more, "new", and the leaf that it goes to is split."""
    cast(fs)
    for n in range(10_000):
        before = nodes(fs, ROOT)
        mkfile(fs, b"new")
        after = nodes(fs, ROOT)
        fs.unlink(ROOT, b"new")
        if after > before:
            return
        mkfile(fs, b"filler%04d" % n)


def about_to_merge(fs: Filesystem) -> None:
    """One name less, "link", and nodes are merged."""
    cast(fs)
    for n in range(300):
        mkfile(fs, b"filler%03d" % n)
    for n in range(300):
        before = nodes(fs, ROOT)
        fs.unlink(ROOT, b"link")
        after = nodes(fs, ROOT)
        fs.create(ROOT, b"link", stat.S_IFLNK | 0o777, ME, target=b"t" * 500)
        if after < before:
            return
        fs.unlink(ROOT, b"filler%03d" % n)


def tight(fs: Filesystem) -> None:
    """Three pages are free."""
    cast(fs)
    full(fs, leave=3)


STATES: dict[str, Callable[[Filesystem], None]] = {
    "small": small,
    "split": about_to_split,
    "merge": about_to_merge,
    "tight": tight,
}


@functools.cache
def image_of(state: str) -> bytes:
    """The image of a region in this state."""
    region = MemoryRegion(SIZE)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    fs = open_fs(region)
    STATES[state](fs)
    return bytes(region.view)


# -- operations -------------------------------------------------------------------------------------------------------


def removed_while_open(fs: Filesystem) -> None:
    fs.remember(fs.lookup(ROOT, b"sparse"))
    fs.unlink(ROOT, b"sparse")


def forgotten(fs: Filesystem) -> None:
    removed_while_open(fs)
    for ino in fs.orphans():
        fs.forget(ino, 1)


OPERATIONS: dict[str, Callable[[Filesystem], object]] = {
    "create": lambda fs: fs.create(ROOT, b"new", stat.S_IFREG | 0o644, ME),
    "create-first": lambda fs: fs.create(fs.resolve(b"empty"), b"new", stat.S_IFREG | 0o644, ME),
    "mkdir": lambda fs: mkdir(fs, b"new"),
    "symlink": lambda fs: fs.create(ROOT, b"new", stat.S_IFLNK | 0o777, ME, target=b"t" * 999),
    "link": lambda fs: fs.link(fs.resolve(b"g"), ROOT, b"new"),
    "unlink": lambda fs: fs.unlink(ROOT, b"link"),
    "unlink-one-of-two": lambda fs: fs.unlink(ROOT, b"g"),
    "unlink-big": lambda fs: fs.unlink(ROOT, b"big"),
    "unlink-sparse": lambda fs: fs.unlink(ROOT, b"sparse"),
    "unlink-open": removed_while_open,
    "unlink-open-and-forget": forgotten,
    "rmdir": lambda fs: fs.rmdir(ROOT, b"empty"),
    "rename": lambda fs: fs.rename(ROOT, b"link", ROOT, b"new"),
    "rename-to-other-directory": lambda fs: fs.rename(ROOT, b"empty", fs.resolve(b"d"), b"new"),
    "rename-over-file": lambda fs: fs.rename(ROOT, b"g", ROOT, b"big"),
    "rename-over-directory": lambda fs: fs.rename(fs.resolve(b"d"), b"e", ROOT, b"empty"),
    "exchange": lambda fs: fs.rename(ROOT, b"empty", fs.resolve(b"d"), b"f", RENAME_EXCHANGE),
    "chmod": lambda fs: fs.setattr(fs.resolve(b"g"), SetAttr(mode=0o4711, uid=3, mtime=5)),
    "grow-to-pages": lambda fs: fs.setattr(fs.resolve(b"g"), SetAttr(size=3 * PAGE + 1)),
    "grow-to-blocks": lambda fs: fs.setattr(fs.resolve(b"g"), SetAttr(size=5 * MiB)),
    "cut-big": lambda fs: fs.setattr(fs.resolve(b"big"), SetAttr(size=2 * MiB + 100_000)),
    "cut-to-pages": lambda fs: fs.setattr(fs.resolve(b"big"), SetAttr(size=100_000)),
    "cut-sparse": lambda fs: fs.setattr(fs.resolve(b"sparse"), SetAttr(size=PAGE)),
    "cut-sparse-a-little": lambda fs: fs.setattr(fs.resolve(b"sparse"), SetAttr(size=100 * PAGE)),
    "set-direct": lambda fs: fs.set_direct(fs.resolve(b"big"), True),
    "first-attribute": lambda fs: fs.setxattr(fs.resolve(b"g"), b"user.new", b"value"),
    "large-attribute": lambda fs: fs.setxattr(fs.resolve(b"d"), b"user.new", b"w" * 60_000),
    "replace-attribute": lambda fs: fs.setxattr(fs.resolve(b"d"), b"user.large", b"w" * 9001),
    "shrink-attribute": lambda fs: fs.setxattr(fs.resolve(b"d"), b"user.large", b"w"),
    "remove-attribute": lambda fs: fs.removexattr(fs.resolve(b"d"), b"user.large"),
}

WRITES: dict[str, Callable[[Filesystem], object]] = {
    "overwrite": lambda fs: fs.write(fs.resolve(b"big"), 12_345, b"W" * 20_000),
    "append-in-page": lambda fs: fs.write(fs.resolve(b"g"), 10, b"W" * 100),
    "append-behind-gap": lambda fs: fs.write(fs.resolve(b"g"), 1000, b"W" * 100),
    "append-pages": lambda fs: fs.write(fs.resolve(b"g"), 4000, b"W" * 30_000),
    "append-to-block": lambda fs: fs.write(fs.resolve(b"big"), 3_000_100, b"W" * 5000),
    "hole": lambda fs: fs.write(fs.resolve(b"sparse"), 5 * PAGE, b"W" * 5000),
    "over-holes": lambda fs: fs.write(fs.resolve(b"sparse"), 100, b"W" * 500_000),
    "makes-block": lambda fs: fs.write(fs.resolve(b"sparse"), 0, b"W" * (MiB + 70_000)),
    "far-away": lambda fs: fs.write(fs.resolve(b"g"), 1 << 40, b"W" * 10),
}


#: which operations do something else in a state than in "small"
CASES = {
    "small": list(OPERATIONS),
    "split": ["create", "mkdir", "symlink", "link", "rename"],
    "merge": ["unlink", "rename"],
    "tight": list(OPERATIONS),
}
EVERY = pytest.mark.parametrize(
    ("state", "name"), [pytest.param(state, name, id=f"{state}-{name}") for state in CASES for name in CASES[state]]
)


class State(NamedTuple):
    """What can be seen, with the space."""

    tree: dict[bytes, Shape]
    space: Statfs


def state_of(region: Region) -> State:
    """Mount, check, look."""
    fs = open_fs(region)
    assert check(fs.volume) == []
    return State(tree(fs), fs.statfs())


def run(image: bytes, operation: Callable[[Filesystem], object]) -> tuple[State, list[Store], State]:
    """The state before, the stores, and the state after an operation (whose files nobody has open any more)."""
    region = RecordingRegion(image=image)
    before = state_of(MemoryRegion(image=image))
    fs = open_fs(region)
    fs.atime_policy = "noatime"
    region.log.clear()
    try:
        operation(fs)
    except FsError as error:
        if error.errno != errno.ENOSPC:
            raise
    log = list(region.log)
    return before, log, state_of(MemoryRegion(image=region.view))


def torn(store: Store, how: int) -> list[Store]:
    """Some of the 8-byte words of a store; ``how`` counts the ways."""
    if store.word or len(store.data) <= 8:
        return []
    start = -store.offset % 8
    edges = [0, *range(start or 8, len(store.data), 8), len(store.data)]
    words = list(itertools.pairwise(edges))
    rng = random.Random(how)
    if len(words) > 4096:
        # Long stores of content: a few pieces are enough.
        words = [(0, 8), (8, len(store.data) // 2)] if how % 2 else [(len(store.data) // 2, len(store.data))]
    elif how == 0:
        words = words[: max(1, len(words) // 2)]
    elif how == 1:
        words = words[-max(1, len(words) // 2) :]
    else:
        words = [word for word in words if rng.random() < 0.5]
    return [Store(store.offset + low, store.data[low:high], True) for low, high in words]


def crashes(image: bytes, log: list[Store], ways: int) -> Iterator[tuple[str, int]]:
    """Every state that a crash can leave, as (description, memory file with the image)."""
    fd = os.memfd_create("image")
    try:
        os.truncate(fd, SIZE)
        os.pwrite(fd, image, 0)
        yield "before the first store", fd
        for n, store in enumerate(log):
            for how in range(ways):
                pieces = torn(store, how)
                old = os.pread(fd, len(store.data), store.offset) if pieces else b""
                for piece in pieces:
                    os.pwrite(fd, piece.data, piece.offset)
                if pieces:
                    yield f"in store {n} of {len(log)}, torn in way {how}, at {store.offset:#x}", fd
                    os.pwrite(fd, old, store.offset)
            os.pwrite(fd, store.data, store.offset)
            yield f"after store {n} of {len(log)} at {store.offset:#x}", fd
    finally:
        os.close(fd)


def check_crashes(image: bytes, operation: Callable[[Filesystem], object], ways: int) -> None:
    before, log, after = run(image, operation)
    seen = set()
    for description, fd in crashes(image, log, ways):
        found = state_of(CowRegion(fd))
        assert found in (before, after), description
        seen.add(found == after)
    if before != after:
        assert seen == {False, True}


@EVERY
def test_every_operation_happens_or_not(state: str, name: str) -> None:
    check_crashes(image_of(state), OPERATIONS[name], ways=1)


@pytest.mark.slow
@EVERY
def test_every_operation_happens_or_not_torn_in_many_ways(state: str, name: str) -> None:
    check_crashes(image_of(state), OPERATIONS[name], ways=8)


# -- writes: metadata happen or not, content may be there in part -----------------------------------------------------


def without_content(state: State) -> State:
    """The content left out."""
    return State({path: shape._replace(content=b"") for path, shape in state.tree.items()}, state.space)


def mixed(found: bytes, old: bytes, new: bytes) -> bool:
    """Every byte of ``found`` is that of ``old`` or of ``new``; beyond their ends those are zeros."""
    old, new = old.ljust(len(found), b"\0"), new.ljust(len(found), b"\0")
    for low in range(0, len(found), PAGE):
        parts = found[low : low + PAGE], old[low : low + PAGE], new[low : low + PAGE]
        if parts[0] not in parts[1:] and any(one not in (a, b) for one, a, b in zip(*parts, strict=False)):
            return False
    return True


def check_write(image: bytes, operation: Callable[[Filesystem], object], ways: int) -> None:
    before, log, after = run(image, operation)
    for description, fd in crashes(image, log, ways):
        found = state_of(CowRegion(fd))
        assert without_content(found) in (without_content(before), without_content(after)), description
        for path, shape in found.tree.items():
            old, new = before.tree[path].content, after.tree[path].content
            assert shape.content == old or mixed(shape.content, old, new), f"{path!r} {description}"


@pytest.fixture(autouse=True)
def _far_files_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 1 TiB of holes is compared by its first and last MiB."""
    real = Filesystem.read

    def read(self: Filesystem, ino: int, offset: int, length: int, **more: bool) -> bytes | memoryview:
        if length > 100 * MiB:
            return bytes(real(self, ino, 0, MiB, **more)) + bytes(real(self, ino, offset + length - MiB, MiB, **more))
        return real(self, ino, offset, length, **more)

    monkeypatch.setattr(Filesystem, "read", read)


@pytest.mark.parametrize("operation", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("state", ["small", "tight"])
def test_every_write_stores_new_bytes_or_leaves_old_ones(state: str, operation: Callable[[Filesystem], object]) -> None:
    check_write(image_of(state), operation, ways=1)


@pytest.mark.slow
@pytest.mark.parametrize("operation", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("state", ["small", "tight"])
def test_every_write_torn_in_many_ways(state: str, operation: Callable[[Filesystem], object]) -> None:
    check_write(image_of(state), operation, ways=8)


# -- crashes while recovering -----------------------------------------------------------------------------------------

TWICE = ["unlink-big", "unlink-open", "rename-over-directory", "cut-sparse", "large-attribute"]


@pytest.mark.parametrize("name", TWICE)
def test_a_crash_while_recovering(name: str) -> None:
    """The second recovery finds what the first would have."""
    image = image_of("small")
    before, log, after = run(image, OPERATIONS[name])
    for description, fd in crashes(image, log, 0):
        region = RecordingCowRegion(fd)
        open_fs(region)
        if not region.log:
            continue
        state = os.pread(fd, SIZE, 0)
        step = max(1, len(region.log) // 6)
        for n, (second, again) in enumerate(crashes(state, region.log, 1)):
            if n % step == 0:
                assert state_of(CowRegion(again)) in (before, after), f"{description}, then {second}"


def test_a_crash_in_mkfs_leaves_no_region() -> None:
    """The magic comes last: what is half made is not taken for a region, and what is one is sound."""
    region = RecordingRegion(SIZE)
    region.store(0, b"\xee" * MiB)
    image = bytes(region.view)
    region.log.clear()
    mkfs(region, uuid=UUID, hash_seed=SEED)
    opened = 0
    for _, fd in crashes(image, region.log, 1):
        view = CowRegion(fd)
        try:
            fs = Filesystem.open(view)
        except FormatError:
            assert not opened
            continue
        opened += 1
        assert check(fs.volume) == []
    assert opened
