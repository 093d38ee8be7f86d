"""What a region holds when an operation begins: images by the name of the state."""

import functools
import stat
from collections.abc import Callable

from pkernfs.format import (
    BLOCK,
    BLOCK_FREE,
    INODES_PER_PAGE,
    JOURNAL_HEADER,
    PAGE,
    PAGE_FREE,
    PAGES_PER_BLOCK,
    RO_COMPAT_AWAITING,
    ROOT_PGTABLES_INO,
    DomainId,
    Extent,
    FilePage,
    Ino,
    Mapping,
)
from pkernfs.fs.filesystem import Filesystem, Statfs
from pkernfs.fs.journal import MAX_SEQUENCE
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.reclaim import STEP
from pkernfs.iommu.awaiting import add
from pkernfs.iommu.records import Records
from pkernfs.region import MemoryRegion, Region
from tests.core.crash.scratch import Scratch
from tests.core.images import cast
from tests.core.support import ME, ROOT, SEED, UUID, MiB, full, map_file, mkdir, mkdomain, mkfile, open_fs

SIZE = 20 * MiB
LEAF_EXTENTS = 156  #: that one node holds


def everything(fs: Filesystem) -> None:
    """The files that the operations work on."""
    cast(fs)
    d = fs.resolve(b"d")
    mkfile(fs, b"set-id", b"program", mode=0o6755)
    scattered(fs, b"five", 5, 3)
    fs.create(ROOT, b"fifo", stat.S_IFIFO | 0o600, ME)
    for n in range(40):
        fs.setxattr(fs.lookup(d, b"f"), b"user.%02d" % n, b"v" * 200)
    fs.setxattr(fs.resolve(b"empty"), b"user.only", b"v")


def scattered(fs: Filesystem, name: bytes, count: int, step: int) -> Ino:
    """A file of ``count`` pages that are not side by side."""
    ino = mkfile(fs, name)
    for n in range(count):
        fs.write(ino, n * step * PAGE, b"%d" % n)
    return ino


def nodes(fs: Filesystem) -> int:
    """Tree nodes of the root directory."""
    return len(list(fs.names.directory(ROOT).tree.all_pages()))


def nodes_after(fs: Filesystem, run: Callable[[Filesystem], object]) -> int:
    """The same after a call that is taken back."""
    assert isinstance(fs.region, Scratch)
    mark = fs.region.mark()
    twin = open_fs(fs.region)
    run(twin)
    found = nodes(twin)
    fs.region.take_back(mark)
    return found


def split(fs: Filesystem) -> None:
    """One name more, "new", and the leaf that it goes to is split."""
    everything(fs)
    for n in range(1000):
        if nodes_after(fs, lambda twin: mkfile(twin, b"new")) > nodes(fs):
            return
        mkfile(fs, b"filler%04d" % n)
    raise AssertionError("nothing is ever split")


def merge(fs: Filesystem) -> None:
    """One name less, "link", and nodes are merged: those beside it went, most of the others not."""
    everything(fs)
    for n in range(200):
        mkfile(fs, b"%03d" % n)
    entries = [entry for entry in fs.readdir(ROOT) if entry.name.isdigit()]
    key = next(entry.key for entry in fs.readdir(ROOT) if entry.name == b"link")
    for entry in entries[::2] + sorted(entries[1::2], key=lambda entry: abs(entry.key - key)):
        if nodes_after(fs, lambda twin: twin.unlink(ROOT, b"link")) < nodes(fs):
            return
        fs.unlink(ROOT, entry.name)
    raise AssertionError("nothing is ever merged")


def tight(fs: Filesystem) -> None:
    """Three pages are free."""
    everything(fs)
    full(fs, leave=3)


def no_slots(fs: Filesystem) -> None:
    """Every page of inodes is full: the next inode takes a page."""
    everything(fs)
    fill_slots(fs)


def fill_slots(fs: Filesystem) -> None:
    for n in range(INODES_PER_PAGE):
        if not any(slab.page_with_slots() >= 0 for slab in fs.volume.space.slabs.values()):
            return
        mkfile(fs, b"slot%d" % n)
    raise AssertionError("there are always free slots")


def last_slot(fs: Filesystem) -> None:
    """A page of inodes holds one only, of "last": it is given back with it."""
    no_slots(fs)
    mkfile(fs, b"last")


def no_pages(fs: Filesystem) -> None:
    """Every slab and every page of inodes is full, and blocks are free: the next page takes a new slab."""
    everything(fs)
    ino = mkfile(fs, b"filler")
    fill_slots(fs)
    for n in range(10 * PAGES_PER_BLOCK):
        if not any(slab.free for slab in fs.volume.space.slabs.values()):
            return
        fs.write(ino, n * 3 * PAGE, b"f")
    raise AssertionError("there are always free pages")


def holes(fs: Filesystem) -> None:
    """All blocks are slabs, with a few free pages in each: what takes many pages changes the headers of all."""
    everything(fs)
    fs.unlink(ROOT, b"big")
    space = fs.volume.space
    for n in range(20):
        for hole in range(6):
            mkfile(fs, b"hole-%d-%d" % (n, hole), b"h")
        ino = mkfile(fs, b"filler%d" % n)
        slabs = len(space.slab_blocks())
        for page in range(PAGES_PER_BLOCK):
            if len(space.slab_blocks()) > slabs or fs.statfs().free < 3:
                break
            fs.write(ino, page * 3 * PAGE, b"f")
        if fs.statfs().free < 3:
            break
    for entry in list(fs.readdir(ROOT)):
        if entry.name.startswith(b"hole-"):
            fs.unlink(ROOT, entry.name)


def quotas(fs: Filesystem) -> None:
    """All counts against the quota of the root, and one directory has one of its own."""
    everything(fs)
    fs.quotas.set(ROOT, 1 << 40)
    fs.quotas.set(mkdir(fs, b"limited"), 1 << 30)


def last_page(fs: Filesystem) -> None:
    """A slab holds one page only, of "last": it is given back with it."""
    no_pages(fs)
    before = len(fs.volume.space.slab_blocks())
    fs.setxattr(fs.resolve(b"filler"), b"user.last", b"v" * 600)
    assert len(fs.volume.space.slab_blocks()) == before + 1


def leaves(fs: Filesystem) -> None:
    """Extents that fill the one node of their tree, in "leaf"; and two levels of them, in "levels"."""
    everything(fs)
    fs.unlink(ROOT, b"big")
    scattered(fs, b"leaf", LEAF_EXTENTS, 3)
    scattered(fs, b"levels", LEAF_EXTENTS + 1, 3)


def removed(fs: Filesystem) -> None:
    """Files that were open when their last name went, and one that was being cut: the next mount frees them."""
    everything(fs)
    leaf = scattered(fs, b"leaf", 40, 3)
    for n in range(40):
        fs.setxattr(leaf, b"user.%d" % n, b"v" * (600 + n))
    for path in (b"big", b"sparse", b"d/e/inner", b"leaf", b"link"):
        fs.lookups.add(fs.resolve(path))
    for path in (b"big", b"sparse", b"leaf", b"link"):
        fs.unlink(ROOT, path)
    fs.unlink(fs.resolve(b"d/e"), b"inner")
    cut = scattered(fs, b"cut", 70, 3)
    with fs.volume.transaction() as tx:
        tx.put_inode(cut, fs.getattr(cut)._replace(size=3 * PAGE + 7))
        fs.orphans.add(tx, cut)


def domains(fs: Filesystem) -> None:
    """Domains: an empty one, and one with more mappings than one step drops, of files with and without a name."""
    everything(fs)
    mkdomain(fs, b"empty", 0)
    domain = mkdomain(fs, b"dom-0")
    for n in range(STEP + 3):
        map_file(fs, domain, 7 * n, fs.resolve(b"big"), n, 2)
    map_file(fs, domain, 1000, mkfile(fs, b"gone", b"G" * 3 * PAGE), 1)
    map_file(fs, domain, 1001, fs.resolve(b"five"))
    fs.unlink(ROOT, b"gone")


def held(fs: Filesystem) -> None:
    """A file is held."""
    everything(fs)
    fs.holds.hold(mkfile(fs, b"held", b"RAM" * 2000), "saved")


def content_awaits(fs: Filesystem) -> None:
    """Content of files awaits an invalidation, of one of many extents, and of one that was removed."""
    everything(fs)
    fs.volume.enable(RO_COMPAT_AWAITING)
    gone = mkfile(fs, b"gone", b"G" * 3 * PAGE)
    with fs.volume.transaction() as tx:
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        inos = [gone, *map(fs.resolve, (b"big", b"sparse", b"five"))]
        add(tx, roots, DomainId(7), [Mapping(ino, FilePage(0), 1 << 20, 3) for ino in inos])
        roots.finish(tx)
    fs.unlink(ROOT, b"gone")


STATES: dict[str, Callable[[Filesystem], None]] = {
    "small": everything,
    "split": split,
    "merge": merge,
    "tight": tight,
    "no-slots": no_slots,
    "last-slot": last_slot,
    "no-pages": no_pages,
    "last-page": last_page,
    "holes": holes,
    "leaves": leaves,
    "removed": removed,
    "old-sequence": everything,
    "quotas": quotas,
    "domains": domains,
    "held": held,
    "awaiting": content_awaits,
}


@functools.cache
def image_of(state: str) -> bytes:
    """The image of a region in this state."""
    region = Scratch(_empty_image())
    fs = open_fs(region)
    STATES[state](fs)
    spoil(fs)
    if state == "old-sequence":
        # As after so many transactions: the numbers begin again.
        header_at = fs.volume.journal.header_at
        region.store_word(header_at, 2 * MAX_SEQUENCE)
        region.store_word(header_at + JOURNAL_HEADER.offsets["sequence"], MAX_SEQUENCE)
    return bytes(region.view)


def spoil(fs: Filesystem) -> None:
    """Old bytes wherever old bytes can be: in free memory, behind the ends of files, in the journal's body."""
    region, journal, space = fs.region, fs.volume.journal, fs.volume.space
    _soil(region, journal.body_at, fs.volume.sb.first_block * BLOCK - journal.body_at)
    for block in range(space.first_block, space.blocks):
        if space.table[block] == BLOCK_FREE:
            _soil(region, block * BLOCK, BLOCK)
    for block in space.slab_blocks():
        for index, kind in enumerate(space.slab(block).kinds):
            if kind == PAGE_FREE:
                _soil(region, block * BLOCK + index * PAGE, PAGE)
    for extent, beyond in ends(fs):
        _soil(region, extent.page * PAGE + beyond, extent.length * PAGE - beyond)


def ends(fs: Filesystem) -> list[tuple[Extent, int]]:
    """The extents of files that reach beyond the end, and from which byte of theirs on."""
    found = []
    todo = [ROOT]
    while todo:
        ino = todo.pop()
        inode = fs.getattr(ino)
        if stat.S_ISDIR(inode.mode):
            todo += [entry.ino for entry in fs.readdir(ino)]
        elif stat.S_ISREG(inode.mode):
            for extent in fs.content.extents(ino):
                beyond = max(0, inode.size - extent.start * PAGE)
                if beyond < extent.length * PAGE:
                    found.append((extent, -(-beyond // 8) * 8))
    return found


def _soil(region: Region, offset: int, length: int) -> None:
    region.store(offset, b"\xee" * length)


@functools.cache
def _empty_image() -> bytes:
    region = MemoryRegion(SIZE)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    return bytes(region.view)


@functools.cache
def empty_space() -> Statfs:
    """What is free in an empty region."""
    return open_fs(MemoryRegion(image=_empty_image())).statfs()
