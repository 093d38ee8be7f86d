"""fsck: one fault is planted, and exactly that one is reported; damage of any kind neither raises nor loops."""

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pkernfs import format as f
from pkernfs.errors import FormatError
from pkernfs.fs.allocator import Slab
from pkernfs.fs.btree import Node
from pkernfs.fs.check import Checker, check, check_region
from pkernfs.fs.check.ledger import MAX_PROBLEMS
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.pages import read_inode, seal_page
from pkernfs.fs.volume import Volume
from pkernfs.region import MemoryRegion
from pkernfs.region.superblock import seal_superblock
from tests.core.support import ME, ROOT, MiB, mkdir, mkfile, new_fs, patch_inode
from tests.core.test_crash import CowRegion, cast

# -- planting ---------------------------------------------------------------------------------------------------------


def patch_node(fs: Filesystem, page: int, change: Callable[[Node], object]) -> None:
    """Change a node and give it a right checksum."""
    header = f.PAGE_HEADER_LAYOUT.unpack(fs.region.view, page * f.PAGE)
    node = Node.decode(fs.region.read(page * f.PAGE, f.PAGE), page, header.owner)
    change(node)
    fs.region.store(node.offset, node.encode())


def patch_slab(fs: Filesystem, page: int, change: Callable[[Slab, int], object]) -> None:
    """Change what the slab's header says of a page."""
    block, index = divmod(page, f.PAGES_PER_BLOCK)
    slab = Slab.decode(fs.region.read(block * f.BLOCK, f.PAGE), block)
    change(slab, index)
    fs.region.store(slab.offset, slab.encode())


def set_kind(fs: Filesystem, page: int, kind: int) -> None:
    patch_slab(fs, page, lambda slab, index: slab.kinds.__setitem__(index, kind))


def set_slots(fs: Filesystem, ino: int, in_use: bool) -> None:
    def change(slab: Slab, index: int) -> None:
        bit = 1 << ino % 16
        slab.slots[index] = slab.slots[index] | bit if in_use else slab.slots[index] & ~bit

    patch_slab(fs, ino // 16, change)


def set_block(fs: Filesystem, block: int, kind: int) -> None:
    """Change the kind of a block in the table."""
    kinds = bytearray(fs.region.read(f.PAGE + 32, f.TABLE_FANOUT))
    kinds[block] = kind
    fs.region.store(f.PAGE, seal_page(f.TABLE_MAGIC, f.PAGE, 0, 0, 0, bytes(kinds)))


def flip(fs: Filesystem, offset: int) -> None:
    """Damage one byte."""
    fs.region.store(offset, bytes([fs.region.view[offset] ^ 0x10]))


def inode_of(fs: Filesystem, path: bytes) -> Any:
    return read_inode(fs.region, fs.resolve(path))


def patch_extent(fs: Filesystem, path: bytes, n: int = 0, **fields: int) -> None:
    """Change an extent in the inode."""
    ino = fs.resolve(path)
    inline = bytearray(read_inode(fs.region, ino).inline)
    extent = f.EXTENT.unpack(inline, n * 24)._replace(**fields)
    inline[n * 24 : n * 24 + 24] = f.EXTENT.pack(extent)
    patch_inode(fs, ino, inline=bytes(inline))


def page_of(fs: Filesystem, path: bytes) -> int:
    return fs.extents(fs.resolve(path))[0].page


def rename_in_place(fs: Filesystem, old: bytes, new: bytes) -> None:
    """Change the bytes of a name in the root directory, its key and its length left alone."""
    replace_value(fs, inode_of(fs, b"").root, old, lambda value: value[:16] + new)


def replace_value(fs: Filesystem, page: int, tail: bytes, change: Callable[[bytes], bytes]) -> None:
    def apply(node: Node) -> None:
        (at,) = [n for n, value in enumerate(node.values) if value[16:].startswith(tail)]
        node.values[at] = change(node.values[at])

    patch_node(fs, page, apply)


def patch_dirent(fs: Filesystem, name: bytes, **fields: int) -> None:
    replace_value(
        fs,
        inode_of(fs, b"").root,
        name,
        lambda value: f.DIRENT.pack(f.DIRENT.unpack(value)._replace(**fields)) + value[16:],
    )


def second_name(fs: Filesystem, of: bytes, name: bytes, key: int | None = None) -> None:
    """A name more in the root directory, the counts right, but for the inode's nlink."""
    ino = fs.resolve(of)
    inode = inode_of(fs, of)
    key = f.name_key(fs.volume.sb.hash_seed, name) if key is None else key
    value = f.DIRENT.pack(f.Dirent(ino, stat.S_IFMT(inode.mode), len(name))) + name

    def insert(node: Node) -> None:
        at = sum(k < key for k in node.keys)
        node.keys.insert(at, key)
        node.values.insert(at, value)

    root = inode_of(fs, b"")
    patch_node(fs, root.root, insert)
    patch_inode(fs, ROOT, size=root.size + 1, nlink=root.nlink + stat.S_ISDIR(inode.mode))


def name_twice(fs: Filesystem) -> None:
    entry = next(entry for entry in fs.readdir(ROOT) if entry.name == b"g")
    second_name(fs, b"g", b"g", entry.key + 1)
    patch_inode(fs, fs.resolve(b"g"), nlink=3)


def share_page(fs: Filesystem) -> None:
    """Two files in one page; the page of the one is freed."""
    mkfile(fs, b"one", b"1")
    mkfile(fs, b"two", b"2")
    set_kind(fs, page_of(fs, b"two"), f.PAGE_FREE)
    patch_extent(fs, b"two", page=page_of(fs, b"one"))


def share_block(fs: Filesystem) -> None:
    mkfile(fs, b"one", b"1" * (2 * MiB))
    mkfile(fs, b"two", b"2" * (2 * MiB))
    set_block(fs, page_of(fs, b"two") // 512, f.BLOCK_FREE)
    patch_extent(fs, b"two", page=page_of(fs, b"one"))


def drop_name(fs: Filesystem, name: bytes) -> None:
    """Take a name away, and nothing else."""

    def remove(node: Node) -> None:
        (at,) = [n for n, value in enumerate(node.values) if value[16:] == name]
        del node.keys[at], node.values[at]

    root = inode_of(fs, b"")
    is_dir = stat.S_ISDIR(inode_of(fs, name).mode)
    patch_node(fs, root.root, remove)
    patch_inode(fs, ROOT, size=root.size - 1, nlink=root.nlink - is_dir)


def sparse_tree(fs: Filesystem) -> int:
    """The root page of the tree of /sparse, made two levels deep."""
    ino = fs.resolve(b"sparse")
    for n in range(80, 330):
        fs.write(ino, n * 3 * f.PAGE, b"x")
    root = inode_of(fs, b"sparse").root
    assert f.PAGE_HEADER_LAYOUT.unpack(fs.region.view, root * f.PAGE).level == 1
    return int(root)


def child(fs: Filesystem, root: int, n: int = 0) -> int:
    return Node.decode(fs.region.read(root * f.PAGE, f.PAGE), root, fs.resolve(b"sparse")).children[n]


def wrong_separator(fs: Filesystem) -> None:
    def change(node: Node) -> None:
        node.keys[1] += 1

    patch_node(fs, sparse_tree(fs), change)


def wrong_level(fs: Filesystem) -> None:
    root = sparse_tree(fs)

    def change(node: Node) -> None:
        node.level = 3

    patch_node(fs, root, change)


def tree_loop(fs: Filesystem) -> None:
    """A node that is its own child; what the child had is not looked for."""
    root = sparse_tree(fs)
    patch_node(fs, root, lambda node: node.children.__setitem__(1, root))


def orphan_files(fs: Filesystem, count: int = 2) -> list[int]:
    found = []
    for n in range(count):
        found.append(mkfile(fs, b"gone%d" % n, b"x"))
        fs.remember(found[-1])
        fs.unlink(ROOT, b"gone%d" % n)
    return found


def cut_out_orphan(fs: Filesystem) -> None:
    """An orphan that is taken from the list, and says so."""
    one, two = orphan_files(fs)
    patch_inode(fs, f.ORPHANS_INO, orphan_next=two, orphan_prev=two)
    patch_inode(fs, two, orphan_next=f.ORPHANS_INO)
    patch_inode(fs, one, orphan_next=0, orphan_prev=0)


def extent_in_tree(fs: Filesystem, change: Callable[[Node], object]) -> None:
    root = inode_of(fs, b"sparse").root
    patch_node(fs, root, change)


def overlap(node: Node) -> None:
    """The second extent begins a page earlier, in the middle of a longer first one."""
    node.values[0] = f.EXTENT_VALUE.pack(f.EXTENT_VALUE.unpack(node.values[0])._replace(length=3))


def short_extent(node: Node) -> None:
    """One extent more, without a count."""
    node.keys.append(1 << 30)
    node.values.append(b"x" * 8)


def xattr_page(fs: Filesystem, path: bytes = b"d") -> int:
    """The page of the root of the tree of attributes."""
    return int(inode_of(fs, path).xattrs)


def external_page(fs: Filesystem) -> int:
    """The first page of the large attribute of /d."""
    node = Node.decode(fs.region.read(xattr_page(fs) * f.PAGE, f.PAGE), xattr_page(fs), fs.resolve(b"d"))
    (value,) = [value for value in node.values if b"user.large" in value]
    return f.EXTENT_VALUE.unpack(value, 16 + 10).page


def patch_xattr(fs: Filesystem, name: bytes, change: Callable[[bytes], bytes]) -> None:
    replace_value(fs, xattr_page(fs), name, change)


def set_superblock(fs: Filesystem, offset: int, **fields: Any) -> None:
    fs.region.store(offset, seal_superblock(fs.volume.sb._replace(**fields)))


def leak_blocks(fs: Filesystem) -> None:
    set_block(fs, fs.volume.allocator.table.find(0), f.BLOCK_DATA)


def empty_slab(fs: Filesystem) -> None:
    block = fs.volume.allocator.table.find(0)
    fs.region.store(block * f.BLOCK, Slab.empty(block).encode())
    set_block(fs, block, f.BLOCK_SLAB)


def slab_of(fs: Filesystem) -> int:
    return page_of(fs, b"g") // 512


def flip_seal(fs: Filesystem) -> None:
    """A sealed transaction that does not fit its checksum."""
    at = fs.volume.journal.header_at
    fs.region.store_word(at, fs.region.word(at) | 1)
    flip(fs, at + 2 * f.PAGE // 2 + 5)


def move_header(fs: Filesystem) -> None:
    """The header of a slab, with a right checksum, in another block."""
    block = slab_of(fs)
    raw = bytearray(fs.region.read(block * f.BLOCK, f.PAGE))
    fs.region.store(block * f.BLOCK, seal_page(f.SLAB_MAGIC, (block - 1) * f.BLOCK, block - 1, 0, 0, bytes(raw[32:])))


def set_mode(fs: Filesystem, path: bytes, kind: int) -> None:
    """Another type, in the inode and in its names (two here)."""
    ino = fs.resolve(path)
    patch_inode(fs, ino, mode=kind | 0o644)
    patch_dirent(fs, b"g", mode=kind)
    replace_value(
        fs,
        inode_of(fs, b"d").root,
        b"f",
        lambda value: f.DIRENT.pack(f.DIRENT.unpack(value)._replace(mode=kind)) + value[16:],
    )
    # A type that does not exist has no content: keep the page's owner known.
    page = f.EXTENT.unpack(inode_of(fs, path).inline).page
    patch_inode(fs, ino, inline=b"", size=0, pages=0)
    set_kind(fs, page, f.PAGE_FREE)


def free_slot(fs: Filesystem) -> int:
    """A free slot in a page of inodes."""
    ino = fs.create(ROOT, b"slot", stat.S_IFREG, ME)
    fs.unlink(ROOT, b"slot")
    assert fs.volume.allocator.slab(ino // 16 // 512).kinds[ino // 16 % 512] == f.PAGE_INODES
    return int(ino)


def use_empty_slot(fs: Filesystem) -> None:
    set_slots(fs, free_slot(fs), True)


def fill_free_slot(fs: Filesystem) -> None:
    patch_inode(fs, free_slot(fs), mode=stat.S_IFREG)


def made(fs: Filesystem, kind: int, target: bytes = b"") -> int:
    return int(fs.create(ROOT, b"made", kind | 0o644, ME, target=target))


def second_name_of_nothing(fs: Filesystem, ino: int | None = None) -> None:
    ino = free_slot(fs) if ino is None else ino
    second_name(fs, b"big", b"nothing")
    patch_dirent(fs, b"nothing", ino=ino)


def orphan_loop(fs: Filesystem) -> None:
    one, two = orphan_files(fs)
    patch_inode(fs, one, orphan_next=two)


def other_owner(fs: Filesystem) -> None:
    page = inode_of(fs, b"sparse").root

    def change(node: Node) -> None:
        node.owner += 1

    patch_node(fs, page, change)


def free_page(fs: Filesystem, *, zero: bool = False) -> int:
    block = slab_of(fs)
    page = block * 512 + fs.volume.allocator.slab(block).kinds.find(0)
    if zero:
        fs.region.zero(page * f.PAGE, f.PAGE)
    return page


FAULTS: dict[str, tuple[str, Callable[[Filesystem], object]]] = {
    # the frame
    "superblock-copy-damaged": ("superblock", lambda fs: flip(fs, fs.volume.sb.journal_offset + 60)),
    "superblock-copies-differ": ("superblock", lambda fs: set_superblock(fs, fs.volume.sb.journal_offset, label=b"x")),
    "superblock-damaged": ("superblock", lambda fs: flip(fs, 60)),
    "superblock-magic-gone": ("superblock", lambda fs: flip(fs, 3)),
    "journal-header-magic": ("journal", lambda fs: flip(fs, fs.volume.journal.header_at + 8)),
    "journal-sealed-and-damaged": ("journal", flip_seal),
    "block-table-damaged": ("block-table", lambda fs: flip(fs, 5000)),
    "block-table-unknown-kind": ("block-table", lambda fs: set_block(fs, 9, 77)),
    "block-table-kinds-beyond-the-end": ("block-table", lambda fs: set_block(fs, fs.volume.sb.blocks, 2)),
    "metadata-block-not-marked": ("block-kind", lambda fs: set_block(fs, 0, f.BLOCK_FREE)),
    "metadata-block-elsewhere": (
        "block-kind",
        lambda fs: set_block(fs, fs.volume.allocator.table.find(0), f.BLOCK_META),
    ),
    "slab-header-damaged": ("slab-header", lambda fs: flip(fs, slab_of(fs) * f.BLOCK + 100)),
    "slab-header-of-another-block": ("slab-header", move_header),
    "slots-in-a-page-of-data": (
        "slab-slots",
        lambda fs: patch_slab(fs, page_of(fs, b"g"), lambda slab, index: slab.slots.__setitem__(index, 4)),
    ),
    "slab-empty": ("leaked-block", empty_slab),
    # inodes
    "reserved-inode-type": ("reserved-inode", lambda fs: patch_inode(fs, 4, flags=f.FLAG_FILE)),
    "reserved-inode-made": ("reserved-inode", lambda fs: patch_inode(fs, 9, mode=stat.S_IFREG)),
    "orphans-with-content": ("reserved-inode", lambda fs: patch_inode(fs, f.ORPHANS_INO, size=5)),
    "inode-damaged": ("inode-checksum", lambda fs: flip(fs, fs.resolve(b"g") * 256 + 50)),
    "inode-of-a-directory-damaged": ("inode-checksum", lambda fs: flip(fs, fs.resolve(b"d") * 256 + 50)),
    "root-damaged": ("inode-checksum", lambda fs: flip(fs, 256 + 50)),
    "inode-without-type": ("inode-mode", lambda fs: set_mode(fs, b"g", 0o170000)),
    "inode-slot-empty": ("inode-mode", use_empty_slot),
    "inode-in-a-free-slot": ("inode-free", fill_free_slot),
    "free-slot-damaged": ("inode-free", lambda fs: flip(fs, free_slot(fs) * 256 + 44)),
    "file-with-directory-flag": ("inode-flags", lambda fs: patch_inode(fs, fs.resolve(b"g"), flags=f.FLAG_DIR)),
    "file-with-parent": ("inode-parent", lambda fs: patch_inode(fs, fs.resolve(b"g"), parent=1)),
    "file-too-large": ("inode-size", lambda fs: patch_inode(fs, fs.resolve(b"g"), size=f.MAX_FILE_SIZE + 1)),
    "fifo-with-size": ("inode-size", lambda fs: patch_inode(fs, made(fs, stat.S_IFIFO), size=1)),
    "fifo-with-content": ("inode-content", lambda fs: patch_inode(fs, made(fs, stat.S_IFIFO), inline=b"x")),
    "link-with-more-than-its-target": (
        "symlink",
        lambda fs: patch_inode(fs, made(fs, stat.S_IFLNK, b"abc"), inline=b"abcd"),
    ),
    "page-count": ("inode-pages", lambda fs: patch_inode(fs, fs.resolve(b"big"), pages=7)),
    "page-count-of-directory": ("inode-pages", lambda fs: patch_inode(fs, fs.resolve(b"d"), pages=7)),
    # names
    "name-does-not-fit-its-key": ("name-key", lambda fs: rename_in_place(fs, b"g", b"h")),
    "name-twice": ("name-twice", name_twice),
    "name-with-slash": ("dirent", lambda fs: rename_in_place(fs, b"g", b"/")),
    "name-length": ("dirent", lambda fs: patch_dirent(fs, b"big", length=2)),
    "name-of-nothing": ("dirent-dangling", second_name_of_nothing),
    "name-of-the-list-of-orphans": ("dirent-dangling", lambda fs: second_name_of_nothing(fs, f.ORPHANS_INO)),
    "name-with-other-type": ("dirent-mode", lambda fs: patch_dirent(fs, b"g", mode=stat.S_IFSOCK)),
    "directory-with-two-names": ("directory-names", lambda fs: second_name(fs, b"empty", b"again")),
    "directory-parent": ("directory-parent", lambda fs: patch_inode(fs, fs.resolve(b"empty"), parent=77)),
    "parent-of-the-root": ("directory-parent", lambda fs: patch_inode(fs, ROOT, parent=77)),
    "directory-size": ("directory-size", lambda fs: patch_inode(fs, fs.resolve(b"d"), size=7)),
    "too-few-links": ("link-count", lambda fs: patch_inode(fs, fs.resolve(b"g"), nlink=1)),
    "too-many-links": ("link-count", lambda fs: patch_inode(fs, fs.resolve(b"g"), nlink=3)),
    "no-links": ("link-count", lambda fs: patch_inode(fs, fs.resolve(b"big"), nlink=0)),
    "links-of-directory": ("link-count", lambda fs: patch_inode(fs, fs.resolve(b"d"), nlink=9)),
    "no-links-of-directory": ("link-count", lambda fs: patch_inode(fs, fs.resolve(b"empty"), nlink=0)),
    "lost-file": ("inode-lost", lambda fs: drop_name(fs, b"big")),
    "lost-directory": ("inode-lost", lambda fs: drop_name(fs, b"empty")),
    # orphans
    "orphan-not-listed": ("orphan-unlisted", cut_out_orphan),
    "orphan-says-listed": ("orphan-links", lambda fs: patch_inode(fs, fs.resolve(b"g"), orphan_next=2, orphan_prev=2)),
    "orphan-list-backwards": ("orphan-links", lambda fs: patch_inode(fs, orphan_files(fs)[0], orphan_prev=2)),
    "orphan-list-end": ("orphan-links", lambda fs: patch_inode(fs, f.ORPHANS_INO, orphan_prev=99)),
    "orphan-list-loop": ("orphan-list", orphan_loop),
    "orphan-list-leads-nowhere": ("orphan-list", lambda fs: patch_inode(fs, f.ORPHANS_INO, orphan_next=1 << 40)),
    "orphan-list-of-nothing": ("orphan-list", lambda fs: patch_inode(fs, f.ORPHANS_INO, orphan_next=0)),
    # trees
    "node-damaged": ("tree-node", lambda fs: flip(fs, inode_of(fs, b"sparse").root * f.PAGE + 99)),
    "node-of-directory-damaged": ("tree-node", lambda fs: flip(fs, inode_of(fs, b"").root * f.PAGE + 99)),
    "node-of-another-owner": ("tree-node", other_owner),
    "node-level": ("tree-level", wrong_level),
    "node-out-of-bounds": ("tree-order", wrong_separator),
    "node-loop": ("double-use", tree_loop),
    "node-beyond-the-region": ("page-range", lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=1 << 60)),
    "node-in-metadata": ("page-range", lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=1)),
    "node-free": ("page-free", lambda fs: set_kind(fs, inode_of(fs, b"sparse").root, f.PAGE_FREE)),
    "node-of-another-kind": ("page-kind", lambda fs: set_kind(fs, inode_of(fs, b"sparse").root, f.PAGE_DATA)),
    # extents
    "extent-of-free-page": ("page-free", lambda fs: set_kind(fs, page_of(fs, b"g"), f.PAGE_FREE)),
    "extent-of-another-kind": ("page-kind", lambda fs: set_kind(fs, page_of(fs, b"g"), f.PAGE_XATTR)),
    "extent-of-free-block": ("block-free", lambda fs: set_block(fs, page_of(fs, b"big") // 512, f.BLOCK_FREE)),
    "extent-of-shared-page": ("double-use", share_page),
    "extent-of-shared-block": ("double-use", share_block),
    "extents-behind-the-last": ("extent-value", lambda fs: patch_extent(fs, b"g", 3, start=9)),
    "extent-value-size": ("extent-value", lambda fs: extent_in_tree(fs, short_extent)),
    # attributes
    "attribute-damaged": ("xattr", lambda fs: patch_xattr(fs, b"user.small", lambda v: v[:-1])),
    "attribute-name": ("name-key", lambda fs: patch_xattr(fs, b"user.small", lambda v: v.replace(b"small", b"smull"))),
    "attribute-value-damaged": ("xattr-value", lambda fs: flip(fs, external_page(fs) * f.PAGE + 10)),
    "attribute-page-free": ("page-free", lambda fs: set_kind(fs, external_page(fs), f.PAGE_FREE)),
    # leaks
    "page-without-owner": ("leaked-page", lambda fs: set_kind(fs, free_page(fs), f.PAGE_DATA)),
    "page-of-inodes-without-inodes": ("leaked-page", lambda fs: set_kind(fs, free_page(fs, zero=True), f.PAGE_INODES)),
    "block-without-owner": ("leaked-block", leak_blocks),
}


def codes_of(fs: Filesystem) -> set[str]:
    """What a check of a copy finds."""
    region = MemoryRegion(image=fs.region.view)
    region.readonly = True
    problems, _ = check_region(region)
    assert bytes(region.view) == bytes(fs.region.view), "a check writes nothing"
    for problem in problems:
        assert problem.text
        assert "\n" not in problem.text
    return {problem.code for problem in problems}


@pytest.fixture
def victim() -> Filesystem:
    """A filesystem with a bit of everything, for damage."""
    fs = new_fs(20)
    cast(fs)
    return fs


def test_a_sound_region_has_no_problems(victim: Filesystem) -> None:
    assert codes_of(victim) == set()
    checker = Checker(victim.volume)
    assert checker.run() == []
    assert (checker.files, checker.directories) == (6, 5)


@pytest.mark.parametrize(("code", "plant"), FAULTS.values(), ids=FAULTS)
def test_one_fault_is_one_problem(victim: Filesystem, code: str, plant: Callable[[Filesystem], object]) -> None:
    plant(victim)
    assert codes_of(victim) == {code}


#: Faults that are two facts: what is used wrongly, and what is not used any more.
DOUBLE: dict[str, tuple[set[str], Callable[[Filesystem], object]]] = {
    "extent-outside": (
        {"extent-range", "leaked-block"},
        lambda fs: patch_extent(fs, b"big", page=fs.volume.total_pages),
    ),
    "extent-in-metadata": ({"extent-range", "leaked-block"}, lambda fs: patch_extent(fs, b"big", page=0)),
    "extent-endless": ({"extent-range", "leaked-block"}, lambda fs: patch_extent(fs, b"big", length=1 << 63)),
    "extent-beyond-the-largest-file": (
        {"extent-range", "leaked-block"},
        lambda fs: patch_extent(fs, b"big", start=f.MAX_FILE_SIZE // f.PAGE),
    ),
    "extent-part-of-block": ({"block-part", "leaked-block"}, lambda fs: patch_extent(fs, b"big", length=600)),
    "extent-not-aligned": ({"block-align", "leaked-block"}, lambda fs: patch_extent(fs, b"big", start=1)),
    "extents-overlap": (
        {"extent-order", "double-use", "leaked-page"},
        lambda fs: extent_in_tree(fs, overlap),
    ),
    "attribute-in-wrong-pages": (
        {"xattr", "leaked-page"},
        lambda fs: patch_xattr(fs, b"user.large", lambda v: v[:-16] if len(v) > 42 else v[:-8] + bytes(8)),
    ),
    "slot-of-a-file-free": (
        {"dirent-dangling", "leaked-page", "inode-free"},
        lambda fs: set_slots(fs, fs.resolve(b"sparse"), False),
    ),
}


@pytest.mark.parametrize(("codes", "plant"), DOUBLE.values(), ids=DOUBLE)
def test_faults_that_are_two_facts(victim: Filesystem, codes: set[str], plant: Callable[[Filesystem], object]) -> None:
    plant(victim)
    found = codes_of(victim)
    assert found
    assert found <= codes
    assert min(codes - {"page-free", "page-kind", "leaked-page", "leaked-block", "inode-free"}) in found


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
    assert f"inode {ino:#x}: expected 1024 pages, found a count of 7" in problems[0].text + problems[1].text


def test_a_check_of_a_live_volume_looks_at_the_region(victim: Filesystem) -> None:
    """What the volume holds decoded is not what counts."""
    victim.getattr(victim.resolve(b"g"))
    flip(victim, victim.resolve(b"g") * 256 + 50)
    assert {problem.code for problem in check(victim.volume)} == {"inode-checksum"}


def test_both_superblocks_damaged(victim: Filesystem) -> None:
    flip(victim, 60)
    flip(victim, victim.volume.sb.journal_offset + 60)
    with pytest.raises(FormatError, match="superblock checksum"):
        check_region(victim.region)


def test_a_transaction_to_replay_is_no_problem(victim: Filesystem) -> None:
    at = victim.volume.journal.header_at
    mkfile(victim, b"new", b"x")
    victim.region.store_word(at, victim.region.word(at) + 1 - 2)
    # The transaction before, sealed again: replaying it changes nothing, for it was applied already.
    victim.region.store_word(at, victim.volume.journal.sequence * 2 + 1)
    region = MemoryRegion(image=victim.region.view)
    problems, checker = check_region(region)
    assert problems == []
    assert checker
    assert checker.volume.recovered > 0


def test_a_sealed_journal_behind_the_back_of_a_volume(victim: Filesystem) -> None:
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
        assert len(problems) <= MAX_PROBLEMS
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
        twin = Filesystem(Volume(region))
        for _ in range(rng.choice([1, 3, 20])):
            damage(twin, rng, rng.choice(pages))
        yield region
    os.close(fd)


def is_metadata(fs: Filesystem, page: int) -> bool:
    block, index = divmod(page, 512)
    kind = fs.volume.allocator.table[block]
    if kind == f.BLOCK_SLAB:
        return fs.volume.allocator.slab(block).kinds[index] in (f.PAGE_HEADER, f.PAGE_NODE, f.PAGE_INODES)
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
        fs.region.store(offset, seal_page(header.magic, header.offset, header.owner, header.keys, header.level, body))
    else:
        ino = at // 256
        raw = fs.region.read(ino * 256, 256)
        crc = f.checksum(bytes(4) + raw[36:], ino & 0xFFFFFFFF)
        fs.region.store(ino * 256 + 32, crc.to_bytes(4, "little") + raw[36:40])


def test_problems_are_limited() -> None:
    fs = new_fs(64)
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"many", parent=d)
    fs.remember(ino)
    for n in range(20):
        fs.create(d, b"%d" % n, stat.S_IFREG, ME)
    checker = Checker(fs.volume)
    for n in range(2 * MAX_PROBLEMS):
        checker.note("test", f"{n}")
    assert len(checker.run()) == MAX_PROBLEMS


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
