"""Content: reading, writing, truncating, allocation, holes, the end of the space, stale data."""

import errno
import itertools
import random
import stat
from collections.abc import Callable

import pytest

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, BLOCK_DATA, MAX_FILE_SIZE, PAGE, PAGES_PER_BLOCK, Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.region import MemoryRegion
from tests.core.support import (
    ME,
    ROOT,
    MiB,
    assert_sound,
    content,
    fails,
    full,
    mkdir,
    mkfile,
    new_fs,
    open_fs,
    shape,
    tree,
    unchanged,
)

#: around pages, half blocks (where a chunk becomes a block), and blocks
SIZES = [
    0,
    1,
    4095,
    4096,
    4097,
    MiB - 4096,
    MiB - 1,
    MiB,
    MiB + 1,
    2 * MiB - 1,
    2 * MiB,
    2 * MiB + 1,
    5 * MiB,
    7 * MiB + 5,
]
EDGES = sorted({0, 1, 2, 4094, 4095, 4096, 4097, *(n * MiB + d for n in (1, 2, 4) for d in (-4097, -1, 0, 1, 4096))})


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes without zeros, different at every page."""
    return (b"%16d" % seed + bytes(range(1, 240))).ljust(251, b"!") * (size // 251 + 1) if size else b""


def data_of(size: int, seed: int = 1) -> bytes:
    return pattern(size, seed)[:size]


def is_contiguous(fs: Filesystem, ino: Ino) -> bool:
    return len(fs.content.extents(ino)) <= 1


# -- write, read, resize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_write_and_read_back(fs: Filesystem, size: int) -> None:
    space = fs.statfs()
    data = data_of(size)
    ino = mkfile(fs, b"f", data)
    inode = fs.getattr(ino)
    assert inode.size == size
    assert content(fs, ino) == data
    assert inode.pages >= -(-size // PAGE)
    for offset in EDGES:
        assert bytes(fs.read(ino, offset, 5000)) == data[offset : offset + 5000]
    assert bytes(fs.read(ino, size, 10)) == b""
    assert bytes(fs.read(ino, 1 << 50, 10)) == b""
    assert content(open_fs(fs.region), ino) == data
    fs.unlink(ROOT, b"f")
    assert fs.statfs() == space


@pytest.mark.parametrize("size", [s for s in SIZES if s <= 2 * MiB + 1])
def test_write_in_pieces_is_like_in_one(fs: Filesystem, size: int) -> None:
    data = data_of(size)
    ino = mkfile(fs, b"f")
    for at in range(0, size, 130_001):
        part = data[at : at + 130_001]
        assert fs.write(ino, at, part) == len(part)
    assert content(fs, ino) == data


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_resize(fs: Filesystem, old: int, new: int) -> None:
    space = fs.statfs()
    data = data_of(old)
    ino = mkfile(fs, b"f", data)
    inode = fs.setattr(ino, SetAttr(size=new))
    assert inode == fs.getattr(ino)
    assert inode.size == new
    assert inode.mtime == inode.ctime
    # A growing file has memory for all of it at once; a shrinking one keeps no more than the block it ends in.
    assert inode.pages >= -(-new // PAGE)
    assert inode.pages <= -(-max(new, 1) // BLOCK) * PAGES_PER_BLOCK
    if new % BLOCK and new % BLOCK <= MiB - PAGE and new < old:
        assert inode.pages == -(-new // PAGE)
    expected = data[:new].ljust(new, b"\0")
    assert content(fs, ino) == expected
    assert_sound(fs)
    assert content(open_fs(fs.region), ino) == expected
    # And back: what was cut off does not come back.
    fs.setattr(ino, SetAttr(size=old))
    assert content(fs, ino) == data[: min(old, new)].ljust(old, b"\0")
    fs.unlink(ROOT, b"f")
    assert fs.statfs() == space


def test_grown_files_have_all_their_memory(fs: Filesystem) -> None:
    """What truncate promised, stores keep: no later write allocates."""
    ino = mkfile(fs, b"f")
    fs.setattr(ino, SetAttr(size=20 * MiB + 5))
    full(fs)
    space = fs.statfs()
    for at in range(0, 20 * MiB, MiB - 7):
        assert fs.write(ino, at, b"x" * 9) == 9
    assert fs.write(ino, 20 * MiB, b"12345") == 5
    assert fs.statfs() == space


def test_large_files_are_contiguous(fs: Filesystem) -> None:
    by_truncate, by_write = mkfile(fs, b"t"), mkfile(fs, b"w")
    fs.setattr(by_truncate, SetAttr(size=20 * MiB))
    (extent,) = fs.content.extents(by_truncate)
    assert (extent.start, extent.length, extent.page % PAGES_PER_BLOCK) == (0, 20 * MiB // PAGE, 0)
    for at in range(0, 20 * MiB, MiB):
        fs.write(by_write, at, b"w" * MiB)
    # The first half block was written as pages and moved: all the same one piece.
    assert is_contiguous(fs, by_write)
    assert fs.content.extents(by_write)[0].page % PAGES_PER_BLOCK == 0


@pytest.mark.parametrize("size", [2 * MiB + 5, 3 * MiB - 1, 20 * MiB + 4097])
def test_the_end_of_a_large_file_is_in_one_piece_with_the_rest(fs: Filesystem, size: int) -> None:
    ino = mkfile(fs, b"f")
    fs.setattr(ino, SetAttr(size=size))
    assert is_contiguous(fs, ino)
    fs.setattr(ino, SetAttr(size=size + 100_000))
    assert is_contiguous(fs, ino)


def test_contiguous_though_others_grow_beside(fs: Filesystem) -> None:
    """A file that is given its size at once stays in one piece whatever is allocated in between."""
    a = mkfile(fs, b"a")
    fs.setattr(a, SetAttr(size=10 * MiB))
    others = [mkfile(fs, b"o%d" % n) for n in range(3)]
    for at in range(0, 6 * MiB, MiB):
        for other in others:
            fs.write(other, at, data_of(MiB, other))
    assert is_contiguous(fs, a)
    for other in others:
        assert content(fs, other) == data_of(MiB, other) * 6


def test_truncate_of_one_byte_costs_one_page(fs: Filesystem) -> None:
    free = fs.statfs().free
    ino = mkfile(fs, b"f", b"1")
    assert fs.getattr(ino).pages == 1
    assert free - fs.statfs().free == 2, "one page of content, one of inodes"


@pytest.mark.parametrize("offset", [0, 4096, 12345, 3 * MiB + 1, 1 << 40, MAX_FILE_SIZE - 10])
def test_sparse_write(fs: Filesystem, offset: int) -> None:
    ino = mkfile(fs, b"f")
    assert fs.write(ino, offset, b"0123456789") == 10
    inode = fs.getattr(ino)
    assert inode.size == offset + 10
    assert inode.pages == -(-(offset + 10) // PAGE) - offset // PAGE
    assert bytes(fs.read(ino, offset, 100)) == b"0123456789"
    low = max(0, offset - 9000)
    assert bytes(fs.read(ino, low, 9010)) == bytes(offset - low) + b"0123456789"
    assert bytes(fs.read(ino, 0, 10)) == (bytes(10) if offset else b"0123456789")


def test_offsets_that_are_too_large(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"x")
    unchanged(fs, errno.EFBIG, lambda: fs.write(ino, MAX_FILE_SIZE, b"x"))
    unchanged(fs, errno.EFBIG, lambda: fs.write(ino, MAX_FILE_SIZE + PAGE, b"x"))
    unchanged(fs, errno.EFBIG, lambda: fs.setattr(ino, SetAttr(size=MAX_FILE_SIZE + 1)))
    unchanged(fs, errno.ENOSPC, lambda: fs.setattr(ino, SetAttr(size=MAX_FILE_SIZE)))
    assert fs.write(ino, MAX_FILE_SIZE, b"") == 0
    assert fs.write(ino, MAX_FILE_SIZE - 3, b"12345") == 3
    assert fs.getattr(ino).size == MAX_FILE_SIZE
    fs.setattr(ino, SetAttr(size=1))


def test_write_of_nothing_changes_nothing(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"abc")
    before = fs.getattr(ino)
    assert fs.write(ino, 1000, b"") == 0
    assert fs.getattr(ino) == before


def test_overwrite_across_extents(fs: Filesystem) -> None:
    """Many holes and runs, then one write over all of them."""
    ino = mkfile(fs, b"f")
    image = bytearray(600 * PAGE)
    for n in range(0, 600, 3):
        fs.write(ino, n * PAGE + 10, b"%04d" % n)
        image[n * PAGE + 10 : n * PAGE + 14] = b"%04d" % n
    size = fs.getattr(ino).size
    assert len(fs.content.extents(ino)) > 5, "more than an inode holds"
    assert content(fs, ino) == image[:size]
    fs.write(ino, 5000, data_of(MiB + 999))
    image[5000 : 5000 + MiB + 999] = data_of(MiB + 999)
    assert content(fs, ino) == image[:size]
    fs.setattr(ino, SetAttr(size=100))
    assert content(fs, ino) == image[:100]


def test_chunks_become_blocks_when_half_full(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f")
    expected = bytearray(BLOCK)
    pages = list(range(PAGES_PER_BLOCK))
    random.Random(1).shuffle(pages)
    table = fs.volume.space.table
    for n, page in enumerate(pages):
        fs.write(ino, page * PAGE, b"%d" % page)
        expected[page * PAGE : page * PAGE + len(b"%d" % page)] = b"%d" % page
        assert table.count(BLOCK_DATA) == (n >= PAGES_PER_BLOCK // 2 - 1)
    assert is_contiguous(fs, ino)
    assert content(fs, ino) == expected[: fs.getattr(ino).size]


def test_direct_mapped_files_do_not_move(fs: Filesystem) -> None:
    small, large = mkfile(fs, b"s", b"s" * PAGE), mkfile(fs, b"l", b"l" * (4 * MiB))
    for ino in (small, large):
        fs.attributes.set_region_mapped(ino, True)
    places = [fs.content.extents(ino)[0].page for ino in (small, large)]
    fs.write(small, PAGE, b"t" * (MiB + PAGE))
    fs.setattr(large, SetAttr(size=100))
    assert [fs.content.extents(ino)[0].page for ino in (small, large)] == places
    assert content(fs, small) == b"s" * PAGE + b"t" * (MiB + PAGE)
    assert content(fs, large) == b"l" * 100
    fs.attributes.set_region_mapped(small, False)
    with fails(errno.EINVAL):
        fs.attributes.set_region_mapped(mkdir(fs, b"d"), True)


def test_pages_of_a_pinned_file_that_is_as_large_as_possible(make_fs: Callable[..., Filesystem]) -> None:
    """A guest's RAM as large as the region has blocks."""
    fs = make_fs(32)
    ino = mkfile(fs, b"ram")
    blocks = fs.volume.space.free_blocks
    fs.setattr(ino, SetAttr(size=blocks * BLOCK))
    assert is_contiguous(fs, ino)
    fs.attributes.set_region_mapped(ino, True)
    assert bytes(fs.read(ino, blocks * BLOCK - 10, 100)) == bytes(10)
    fs.unlink(ROOT, b"ram")
    assert fs.volume.space.free_blocks == blocks


# -- the end of the space ---------------------------------------------------------------------------------------------


def test_one_block_more_than_there_is(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"abc")
    size = (fs.volume.space.free_blocks + 1) * BLOCK
    unchanged(fs, errno.ENOSPC, lambda: fs.setattr(ino, SetAttr(size=size)))
    unchanged(fs, errno.ENOSPC, lambda: fs.setattr(ino, SetAttr(size=1 << 45)))


OPERATIONS: dict[str, Callable[[Filesystem, Ino, Ino], object]] = {
    "create-symlink": lambda fs, ino, d: fs.create(d, b"l", stat.S_IFLNK, ME, target=b"t" * 500),
    "write": lambda fs, ino, d: fs.write(ino, 10 * PAGE, b"x"),
    "grow-a-little": lambda fs, ino, d: fs.setattr(ino, SetAttr(size=2 * PAGE)),
    "grow-much": lambda fs, ino, d: fs.setattr(ino, SetAttr(size=9 * MiB + 1)),
    "large-attribute": lambda fs, ino, d: fs.setxattr(ino, b"user.x", b"v" * 65536),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_no_space_changes_nothing(make_fs: Callable[..., Filesystem], operation: Callable[..., object]) -> None:
    fs = make_fs(16)
    ino, d = mkfile(fs, b"f", b"abc"), mkdir(fs, b"d")
    full(fs)
    unchanged(fs, errno.ENOSPC, lambda: operation(fs, ino, d))


def test_a_full_region_can_be_emptied(make_fs: Callable[..., Filesystem]) -> None:
    """Nothing that frees needs memory."""
    fs = make_fs(16)
    space = fs.statfs()
    d = mkdir(fs, b"d")
    for n in range(100):
        mkfile(fs, b"f%d" % n, b"x", d)
    fs.setxattr(d, b"user.a", b"v" * 10_000)
    full(fs)
    fs.removexattr(d, b"user.a")
    for n in range(100):
        fs.setattr(fs.lookup(d, b"f%d" % n), SetAttr(size=0))
        fs.unlink(d, b"f%d" % n)
    fs.rmdir(ROOT, b"d")
    for entry in list(fs.readdir(ROOT)):
        if entry.name.startswith(b"fill"):
            fs.unlink(ROOT, entry.name)
    assert fs.statfs() == space


def test_open_files_can_be_removed_from_a_full_region(make_fs: Callable[..., Filesystem]) -> None:
    """The kernel has always looked a file up before it removes it, so this is what `rm` does."""
    fs = make_fs(16)
    made = full(fs)
    name = next(entry.name for entry in fs.readdir(ROOT) if entry.ino == made[0])
    fs.lookups.add(made[0])
    fs.unlink(ROOT, name)
    fs.reclaimer.forget(made[0], 1)
    assert fs.statfs().free >= PAGES_PER_BLOCK


def test_writes_end_short_where_the_space_ends(make_fs: Callable[..., Filesystem]) -> None:
    fs = make_fs(16)
    ino = mkfile(fs, b"f")
    full(fs, leave=5)
    free = fs.statfs().free
    assert 4 <= free <= 6
    data = data_of(64 * PAGE)
    done = 0
    while True:
        try:
            step = fs.write(ino, done, data[done:])
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            break
        assert step > 0
        done += step
    assert done == free * PAGE
    assert fs.statfs().free == 0
    assert content(fs, ino) == data[:done]


def test_a_file_as_large_as_the_region(make_fs: Callable[..., Filesystem]) -> None:
    fs = make_fs(32)
    space = fs.statfs()
    ino = mkfile(fs, b"f")
    free = fs.statfs().free
    done = 0
    part = data_of(MiB)
    while done < free * PAGE:
        step = fs.write(ino, done, part[: free * PAGE - done])
        assert step
        done += step
    assert fs.statfs().free == 0
    assert fs.getattr(ino).size == done
    with fails(errno.ENOSPC):
        fs.write(ino, done, b"x")
    assert content(fs, ino) == (part * 40)[:done]
    fs.unlink(ROOT, b"f")
    assert fs.statfs() == space


def test_a_fragmented_region_gives_all_its_memory(make_fs: Callable[..., Filesystem]) -> None:
    fs = make_fs(48)
    names = [b"f%02d" % n for n in range(fs.volume.space.free_blocks)]
    for name in names:
        fs.setattr(mkfile(fs, name), SetAttr(size=BLOCK))
    assert fs.volume.space.free_blocks == 0
    for name in names[::2]:
        fs.unlink(ROOT, name)
    holes = len(names[::2])
    ino = mkfile(fs, b"pieces")
    fs.setattr(ino, SetAttr(size=holes * BLOCK))
    assert len(fs.content.extents(ino)) == holes
    data = data_of(holes * BLOCK)
    for at in range(0, len(data), MiB + 1):
        fs.write(ino, at, data[at : at + MiB + 1])
    assert content(fs, ino) == data
    assert_sound(fs)
    assert content(open_fs(fs.region), ino) == data
    fs.setattr(ino, SetAttr(size=3 * BLOCK + 5))
    assert content(fs, ino) == data[: 3 * BLOCK + 5]


def test_a_large_run_is_found_in_a_fragmented_region(make_fs: Callable[..., Filesystem]) -> None:
    fs = make_fs(48)
    names = [b"f%02d" % n for n in range(fs.volume.space.free_blocks)]
    for name in names:
        fs.setattr(mkfile(fs, name), SetAttr(size=BLOCK))
    for n in (1, 3, 5, 6, 7, 8, 10):
        fs.unlink(ROOT, names[n])
    ino = mkfile(fs, b"one-piece")
    fs.setattr(ino, SetAttr(size=4 * BLOCK))
    assert is_contiguous(fs, ino)


# -- what was there before --------------------------------------------------------------------------------------------


def is_zero(data: bytes) -> bool:
    return not data.strip(b"\0")


def test_freed_memory_is_zero_when_it_comes_back(make_fs: Callable[..., Filesystem]) -> None:
    fs = make_fs(16)
    assert not any(is_zero(content(fs, ino)[-100:]) for ino in full(fs))
    for entry in list(fs.readdir(ROOT)):
        if entry.name.startswith(b"fill"):
            fs.unlink(ROOT, entry.name)
    names = itertools.count()
    for size in (3 * MiB, MiB + 1, 100, 5000, MiB - 1):
        ino = mkfile(fs, b"new%d" % next(names))
        fs.setattr(ino, SetAttr(size=size))
        assert is_zero(content(fs, ino))
        sparse = mkfile(fs, b"new%d" % next(names))
        fs.write(sparse, size, b"!")
        assert is_zero(content(fs, sparse)[:-1])
        assert content(fs, sparse)[-1:] == b"!"


@pytest.mark.parametrize("kept", [1, 4096, 5000, MiB - 1, MiB, MiB + 1, 2 * MiB + 1, 3 * MiB + 4096])
@pytest.mark.parametrize("how", ["truncate", "write", "write-far"])
def test_what_was_cut_away_does_not_come_back(fs: Filesystem, kept: int, how: str) -> None:
    ino = mkfile(fs, b"f", b"\xff" * (5 * MiB))
    fs.setattr(ino, SetAttr(size=kept))
    if how == "truncate":
        fs.setattr(ino, SetAttr(size=6 * MiB))
        expected = b"\xff" * kept + bytes(6 * MiB - kept)
    else:
        offset = kept + (10 if how == "write" else 2 * MiB)
        fs.write(ino, offset, b"!")
        expected = b"\xff" * kept + bytes(offset - kept) + b"!"
    assert content(fs, ino) == expected


def test_an_aborted_allocation_leaves_nothing_behind(make_fs: Callable[..., Filesystem]) -> None:
    """Blocks that a failing operation had taken already are zero for the next."""
    fs = make_fs(32)
    ino = mkfile(fs, b"f", b"x" * 5)
    blocks = fs.volume.space.free_blocks
    unchanged(fs, errno.ENOSPC, lambda: fs.setattr(ino, SetAttr(size=(blocks + 1) * BLOCK)))
    fs.setattr(ino, SetAttr(size=blocks * BLOCK))
    assert is_zero(content(fs, ino)[5:])


# -- against a plain bytearray ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_writes_and_truncates(seed: int) -> None:
    """Offsets and lengths like those of programs: around pages and blocks, sequential, far away."""
    rng = random.Random(seed)
    fs = new_fs(64)
    files = [(mkfile(fs, b"f%d" % n), bytearray()) for n in range(3)]
    for _ in range(150):
        ino, image = rng.choice(files)
        near = rng.choice([len(image), rng.choice(EDGES), rng.randrange(8 * MiB)])
        if rng.random() < 0.7:
            offset = min(near, 8 * MiB)
            size = rng.choice([1, 100, 4096, 5000, 65536, rng.randrange(MiB), MiB])
            data = bytes([rng.randrange(1, 256)]) * size
            assert fs.write(ino, offset, data) == size
            image.extend(bytes(max(0, offset + size - len(image))))
            image[offset : offset + size] = data
        else:
            size = max(0, near + rng.choice([-1, 0, 1]))
            fs.setattr(ino, SetAttr(size=size))
            del image[size:]
            image.extend(bytes(size - len(image)))
        offset = rng.randrange(9 * MiB)
        assert bytes(fs.read(ino, offset, 200_000)) == image[offset : offset + 200_000]
    for ino, image in files:
        assert content(fs, ino) == image
    assert_sound(fs)
    again = open_fs(fs.region)
    for ino, image in files:
        assert content(again, ino) == image


def test_reads_give_views_where_they_can(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", data_of(5 * MiB))
    assert isinstance(fs.read(ino, 12345, 4 * MiB), memoryview)


def test_times_of_content(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"abc")
    made = fs.getattr(ino)
    fs.write(ino, 1, b"x")
    written = fs.getattr(ino)
    assert written.mtime == written.ctime > made.mtime
    fs.read(ino, 0, 1)
    read = fs.getattr(ino)
    assert read.atime > written.mtime
    fs.read(ino, 0, 1)
    assert fs.getattr(ino) == read, "relatime"
    assert shape(open_fs(fs.region), ino) == shape(fs, ino)
    assert open_fs(fs.region).getattr(ino)[:4] == read[:4]


def test_readlink_of_something_else(fs: Filesystem) -> None:
    with fails(errno.EINVAL):
        fs.readlink(mkfile(fs, b"f"))
    with fails(errno.EINVAL):
        fs.content.extents(ROOT)


def test_a_read_only_region_is_not_written(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"abc")
    image = bytes(fs.region.view)
    region = MemoryRegion(image=image)
    region.readonly = True
    other = open_fs(region)
    assert tree(other) == tree(fs)
    other.times.policy = "strictatime"
    assert content(other, ino) == b"abc"
    list(other.readdir(ROOT))
    for operation in (
        lambda: mkfile(other, b"g"),
        lambda: other.unlink(ROOT, b"f"),
        lambda: other.setattr(ino, SetAttr(size=0)),
        lambda: other.setattr(ino, SetAttr(mode=0)),
        lambda: other.write(ino, 0, b"x"),
        lambda: other.write(ino, 10_000, b"x"),
        lambda: other.setxattr(ino, b"user.x", b""),
        lambda: other.rename(ROOT, b"f", ROOT, b"g"),
    ):
        with fails(errno.EROFS):
            operation()
    assert bytes(region.view) == image
