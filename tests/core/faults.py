"""Faults to plant in a region, and for each the one invariant that does not hold any more."""

import stat
from collections.abc import Callable
from typing import Any

from pkernfs import format as f
from pkernfs.format import Ino
from pkernfs.fs.charge import quota_of, with_quota
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.node import Node
from pkernfs.fs.pages import encode_page, read_inode
from pkernfs.fs.slab import Slab
from pkernfs.fs.xattrs import Xattrs
from pkernfs.region import copies_of
from pkernfs.region.superblock import encode_superblock
from tests.core import faults_iommu
from tests.core.support import ME, ROOT, MiB, mkdir, mkfile, patch_inode


def patch_node(fs: Filesystem, page: int, change: Callable[[Node], object]) -> None:
    """Change a node and give it a right checksum."""
    header = f.PAGE_HEADER_LAYOUT.unpack(fs.region.view, page * f.PAGE)
    node = Node.decode(fs.region.read(page * f.PAGE, f.PAGE), f.PageNo(page), f.Ino(header.owner))
    change(node)
    fs.region.store(node.offset, node.encode())


def patch_slab(fs: Filesystem, page: int, change: Callable[[Slab, int], object]) -> None:
    """Change what the slab's header says of a page."""
    block, index = divmod(page, f.PAGES_PER_BLOCK)
    slab = Slab.decode(fs.region.read(block * f.BLOCK, f.PAGE), f.BlockNo(block))
    change(slab, index)
    fs.region.store(slab.offset, slab.encode())


def set_kind(fs: Filesystem, page: int, kind: int) -> None:
    patch_slab(fs, page, lambda slab, index: slab.kinds.__setitem__(index, kind))


def set_slots(fs: Filesystem, ino: Ino, in_use: bool) -> None:
    def change(slab: Slab, index: int) -> None:
        bit = 1 << ino % 16
        slab.slots[index] = slab.slots[index] | bit if in_use else slab.slots[index] & ~bit

    patch_slab(fs, ino // 16, change)


def set_block(fs: Filesystem, block: int, kind: int) -> None:
    """Change the kind of a block in the table."""
    kinds = bytearray(fs.region.read(f.PAGE + 32, f.TABLE_FANOUT))
    kinds[block] = kind
    fs.region.store(f.PAGE, encode_page(f.TABLE_MAGIC, f.PAGE, 0, 0, 0, bytes(kinds)))


def flip(fs: Filesystem, offset: int) -> None:
    """Damage one byte."""
    fs.region.store(offset, bytes([fs.region.view[offset] ^ 0x10]))


def flip_both(fs: Filesystem) -> None:
    """The superblock and its near copy."""
    flip(fs, 60)
    flip(fs, fs.volume.sb.journal_offset + 9)


def flip_at(place: Callable[[Filesystem], int]) -> Callable[[Filesystem], None]:
    """Damage one byte of what ``place`` makes."""
    return lambda fs: flip(fs, place(fs))


def inode_of(fs: Filesystem, path: bytes) -> Any:
    return read_inode(fs.region, fs.resolve(path))


def patch_extent(fs: Filesystem, path: bytes, n: int = 0, **fields: Any) -> None:
    """Change an extent in the inode."""
    ino = fs.resolve(path)
    inline = bytearray(read_inode(fs.region, ino).inline)
    extent = f.EXTENT.unpack(inline, n * 24)._replace(**fields)
    inline[n * 24 : n * 24 + 24] = f.EXTENT.pack(extent)
    patch_inode(fs, ino, inline=bytes(inline))


def page_of(fs: Filesystem, path: bytes) -> int:
    return fs.content.extents(fs.resolve(path))[0].page


def rename_in_place(fs: Filesystem, old: bytes, new: bytes) -> None:
    """Change the bytes of a name in the root directory, its key and its length left alone."""
    replace_value(fs, inode_of(fs, b"").root, old, lambda value: value[:16] + new)


def replace_value(fs: Filesystem, page: int, tail: bytes, change: Callable[[bytes], bytes]) -> None:
    def apply(node: Node) -> None:
        (at,) = [n for n, value in enumerate(node.values) if value[16:].startswith(tail)]
        node.values[at] = change(node.values[at])

    patch_node(fs, page, apply)


def patch_dirent(fs: Filesystem, name: bytes, **fields: Any) -> None:
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
    return Node.decode(fs.region.read(root * f.PAGE, f.PAGE), f.PageNo(root), fs.resolve(b"sparse")).children[n]


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
    patch_node(fs, root, lambda node: node.children.__setitem__(1, f.PageNo(root)))


def orphan_files(fs: Filesystem, count: int = 2) -> list[Ino]:
    found = []
    for n in range(count):
        found.append(mkfile(fs, b"gone%d" % n, b"x"))
        fs.lookups.add(found[-1])
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
    node = Node.decode(fs.region.read(xattr_page(fs) * f.PAGE, f.PAGE), f.PageNo(xattr_page(fs)), fs.resolve(b"d"))
    (value,) = [value for value in node.values if b"user.large" in value]
    return f.EXTENT_VALUE.unpack(value, 16 + 10).page


def patch_xattr(fs: Filesystem, name: bytes, change: Callable[[bytes], bytes]) -> None:
    replace_value(fs, xattr_page(fs), name, change)


def set_superblock(fs: Filesystem, offset: int, **fields: Any) -> None:
    fs.region.store(offset, encode_superblock(fs.volume.sb._replace(**fields)))


def leak_blocks(fs: Filesystem) -> None:
    set_block(fs, fs.volume.space.table.find(0), f.BLOCK_DATA)


def empty_slab(fs: Filesystem) -> None:
    block = fs.volume.space.table.find(0)
    fs.region.store(block * f.BLOCK, Slab.empty(f.BlockNo(block)).encode())
    set_block(fs, block, f.BLOCK_SLAB)


def slab_of(fs: Filesystem) -> int:
    return page_of(fs, b"g") // 512


def flip_committed(fs: Filesystem) -> None:
    """A committed transaction that does not fit its checksum."""
    at = fs.volume.journal.header_at
    fs.region.store_word(at, fs.region.word(at) | 1)
    flip(fs, at + 2 * f.PAGE // 2 + 5)


def move_header(fs: Filesystem) -> None:
    """The header of a slab, with a right checksum, in another block."""
    block = slab_of(fs)
    raw = bytearray(fs.region.read(block * f.BLOCK, f.PAGE))
    fs.region.store(block * f.BLOCK, encode_page(f.SLAB_MAGIC, (block - 1) * f.BLOCK, block - 1, 0, 0, bytes(raw[32:])))


def set_mode(fs: Filesystem, path: bytes, kind: int) -> None:
    """Another type, in the inode and in its names (two here)."""
    ino = fs.resolve(path)
    page = page_of(fs, path)
    d = inode_of(fs, b"d").root
    patch_inode(fs, ino, mode=kind | 0o644)
    patch_dirent(fs, b"g", mode=kind)
    replace_value(
        fs,
        d,
        b"f",
        lambda value: f.DIRENT.pack(f.DIRENT.unpack(value)._replace(mode=kind)) + value[16:],
    )
    # A type that does not exist has no content: keep the page's owner known.
    patch_inode(fs, ino, inline=b"", size=0, pages=0)
    set_kind(fs, page, f.PAGE_FREE)


def free_slot(fs: Filesystem) -> Ino:
    """A free slot in a page of inodes."""
    ino = fs.create(ROOT, b"slot", stat.S_IFREG, ME)
    fs.unlink(ROOT, b"slot")
    assert fs.volume.space.slab(f.BlockNo(ino // 16 // 512)).kinds[ino // 16 % 512] == f.PAGE_INODES
    return ino


def use_empty_slot(fs: Filesystem) -> None:
    set_slots(fs, free_slot(fs), True)


def fill_free_slot(fs: Filesystem) -> None:
    patch_inode(fs, free_slot(fs), mode=stat.S_IFREG)


def made(fs: Filesystem, kind: int, target: bytes = b"") -> Ino:
    return fs.create(ROOT, b"made", kind | 0o644, ME, target=target)


def second_name_of_nothing(fs: Filesystem, ino: Ino | None = None) -> None:
    ino = free_slot(fs) if ino is None else ino
    second_name(fs, b"big", b"nothing")
    patch_dirent(fs, b"nothing", ino=ino)


def orphan_loop(fs: Filesystem) -> None:
    one, two = orphan_files(fs)
    patch_inode(fs, one, orphan_next=two)


def extent_outside(fs: Filesystem, **fields: int) -> None:
    """The extent of a file is elsewhere, and its memory free."""
    first = page_of(fs, b"big") // 512
    set_block(fs, first, f.BLOCK_FREE)
    set_block(fs, first + 1, f.BLOCK_FREE)
    patch_extent(fs, b"big", **fields)


def long_extent(fs: Filesystem) -> None:
    """The first of two extents goes on where the second is."""
    ino = mkfile(fs, b"two pieces", b"1" * f.PAGE)
    mkfile(fs, b"between", b"x")
    fs.write(ino, f.PAGE, b"2")
    patch_extent(fs, b"two pieces", length=2)


def directory_loop(fs: Filesystem, *, apart: bool = False) -> None:
    """/d/e names /d, too.  ``apart``: and nothing else does, so that no name from the root leads there."""
    outer, inner = fs.resolve(b"d"), fs.resolve(b"d/e")
    if apart:
        drop_name(fs, b"d")
        patch_inode(fs, outer, parent=inner)
    directory = fs.names.directory(inner)
    with fs.volume.transaction() as tx:
        directory.add(tx, b"loop", outer, stat.S_IFDIR)
        tx.put_inode(inner, directory.finish(0)._replace(nlink=3))


def iommu_elsewhere(fs: Filesystem) -> None:
    second_name(fs, b"iommu", b"elsewhere")
    drop_name(fs, b"iommu")


def high_sequence(fs: Filesystem) -> None:
    fs.region.store_word(fs.volume.journal.header_at, (1 << 64) - 2)


def empty_name(value: bytes) -> bytes:
    return f.DIRENT.pack(f.DIRENT.unpack(value)._replace(length=0))


def swap_keys(node: Node) -> None:
    node.keys[0], node.keys[1] = node.keys[1], node.keys[0]


def other_owner(fs: Filesystem) -> None:
    page = inode_of(fs, b"sparse").root

    def change(node: Node) -> None:
        node.owner = f.Ino(node.owner + 1)

    patch_node(fs, page, change)


def free_page(fs: Filesystem, *, zero: bool = False) -> int:
    block = slab_of(fs)
    page = block * 512 + fs.volume.space.slab(f.BlockNo(block)).kinds.find(0)
    if zero:
        fs.region.zero(page * f.PAGE, f.PAGE)
    return page


def quotas(fs: Filesystem) -> f.Ino:
    """Directories with quotas, one in another, and a file that is open only; the outer directory."""
    q = mkdir(fs, b"q")
    inner = mkdir(fs, b"inner", mkdir(fs, b"e", q))
    fs.quotas.set(inner, MiB)
    mkfile(fs, b"f", b"x" * 5000, fs.resolve(b"q/e"))
    mkfile(fs, b"f", b"x" * 5000, inner)
    fs.quotas.set(q, 4 * MiB)
    fs.lookups.add(mkfile(fs, b"open", b"x" * 5000, q))
    fs.unlink(q, b"open")
    return q


def patch_used(fs: Filesystem, used: int) -> None:
    q = quotas(fs)
    inode = fs.getattr(q)
    patch_inode(fs, q, inline=with_quota(inode, quota_of(inode)._replace(used=used)).inline)


def many_pages(fs: Filesystem) -> None:
    """More than a count of bytes can hold."""
    quotas(fs)
    patch_inode(fs, fs.resolve(b"q/e/f"), pages=1 << 63)


def behind_quota(fs: Filesystem) -> None:
    q = quotas(fs)
    patch_inode(fs, q, inline=fs.getattr(q).inline[:-1] + b"x")


def patch_project(fs: Filesystem, path: bytes, project: int | bytes) -> None:
    """``project``: a number, or a path; ``path`` b"": the file that is open only."""
    quotas(fs)
    ino = fs.resolve(path) if path else fs.orphans.inos()[0]
    patch_inode(fs, ino, project=fs.resolve(project) if isinstance(project, bytes) else project)


def external_twice(value: bytes) -> bytes:
    """A value that is as long as a run of pages, and is neither inside nor outside of the tree."""
    head = f.XATTR_HEAD.unpack(value)._replace(external=2, size=f.PAGE)
    return f.XATTR_HEAD.pack(head) + value[16:26] + f.EXTENT_VALUE.pack(f.ExtentValue(f.PageNo(1), 1))


#: What has a checksum -> what is noted when that is damaged, and where it stands once it is made: offset in bytes.
CHECKSUMS: dict[str, tuple[str, Callable[[Filesystem], int]]] = {
    "a-file": ("inode-checksum", lambda fs: fs.resolve(b"g") * 256 + 32),
    "a-file-with-a-tree": ("inode-checksum", lambda fs: fs.resolve(b"sparse") * 256 + 32),
    "a-link": ("inode-checksum", lambda fs: fs.resolve(b"link") * 256 + 32),
    "a-directory": ("inode-checksum", lambda fs: fs.resolve(b"d") * 256 + 32),
    "the-root": ("inode-checksum", lambda fs: 256 + 32),
    "the-list-of-orphans": ("inode-checksum", lambda fs: f.ORPHANS_INO * 256 + 32),
    "extents": ("tree-node", lambda fs: int(inode_of(fs, b"sparse").root) * f.PAGE + 4),
    "an-inner-node": ("tree-node", lambda fs: sparse_tree(fs) * f.PAGE + 4),
    "a-leaf": ("tree-node", lambda fs: child(fs, sparse_tree(fs), 1) * f.PAGE + 4),
    "attributes": ("tree-node", lambda fs: xattr_page(fs) * f.PAGE + 4),
    "names": ("tree-node", lambda fs: int(inode_of(fs, b"").root) * f.PAGE + 4),
    "records": ("tree-node", faults_iommu.node_of_records),
    "a-slab": ("slab-header", lambda fs: slab_of(fs) * f.BLOCK + 4),
}


def held(fs: Filesystem, path: bytes = b"g") -> Ino:
    """A file that is held."""
    ino = fs.resolve(path)
    fs.holds.hold(ino, "a guest is saved")
    return ino


def held_without_record(fs: Filesystem) -> None:
    """The feature is on, as another file is held."""
    held(fs)
    ino = fs.resolve(b"big")
    patch_inode(fs, ino, flags=fs.getattr(ino).flags | f.FLAG_HELD)


def held_for(fs: Filesystem, value: bytes) -> None:
    """A file whose record of why it is held is ``value``."""
    held(fs)
    record_of(fs, b"g", value)


def record_of(fs: Filesystem, path: bytes, value: bytes) -> None:
    """A record of a hold; the flag stays as it is."""
    xattrs = Xattrs(fs.volume, fs.resolve(path), inode_of(fs, path))
    with fs.volume.transaction() as tx:
        xattrs.set(tx, f.HOLD_NAME, value)
        tx.put_inode(fs.resolve(path), xattrs.finish(0))


def held_directory(fs: Filesystem) -> None:
    held(fs)
    record_of(fs, b"empty", f.HOLD.pack(f.Hold(1)) + b"why")
    ino = fs.resolve(b"empty")
    patch_inode(fs, ino, flags=fs.getattr(ino).flags | f.FLAG_HELD)


def held_without_feature(fs: Filesystem) -> None:
    held(fs)
    for offset in (0, *copies_of(fs.volume.sb)):
        set_superblock(fs, offset, ro_compat=fs.volume.sb.ro_compat & ~f.RO_COMPAT_HELD)


FAULTS: dict[str, tuple[str, Callable[[Filesystem], object]]] = {
    # metadata
    "superblock-copy-damaged": ("superblock", lambda fs: flip(fs, fs.volume.sb.journal_offset + 60)),
    "superblock-copies-differ": ("superblock", lambda fs: set_superblock(fs, fs.volume.sb.journal_offset, label=b"x")),
    "superblock-far-copy-damaged": ("superblock", lambda fs: flip(fs, fs.volume.space.far_copy * f.PAGE + 60)),
    "superblock-far-copy-differs": (
        "superblock",
        lambda fs: set_superblock(fs, fs.volume.space.far_copy * f.PAGE, label=b"x"),
    ),
    "superblock-far-copy-free": ("page-free", lambda fs: set_kind(fs, fs.volume.space.far_copy, f.PAGE_FREE)),
    "superblock-far-copy-of-another-kind": (
        "page-kind",
        lambda fs: set_kind(fs, fs.volume.space.far_copy, f.PAGE_DATA),
    ),
    "superblock-and-its-near-copy-damaged": ("superblock", flip_both),
    "superblock-damaged": ("superblock", lambda fs: flip(fs, 60)),
    "superblock-magic-gone": ("superblock", lambda fs: flip(fs, 3)),
    "journal-header-magic": ("journal", lambda fs: flip(fs, fs.volume.journal.header_at + 8)),
    "journal-committed-and-damaged": ("journal", flip_committed),
    "journal-sequence": ("journal", high_sequence),
    "block-table-damaged": ("block-table", lambda fs: flip(fs, 5000)),
    "block-table-unknown-kind": ("block-table", lambda fs: set_block(fs, 9, 77)),
    "block-table-kinds-beyond-the-end": ("block-table", lambda fs: set_block(fs, fs.volume.sb.blocks, 2)),
    "metadata-block-not-marked": ("block-kind", lambda fs: set_block(fs, 0, f.BLOCK_FREE)),
    "metadata-block-elsewhere": (
        "block-kind",
        lambda fs: set_block(fs, fs.volume.space.table.find(0), f.BLOCK_META),
    ),
    "slab-header-damaged": ("slab-header", lambda fs: flip(fs, slab_of(fs) * f.BLOCK + 100)),
    "slab-header-of-another-block": ("slab-header", move_header),
    "slots-in-a-page-of-data": (
        "slab-slots",
        lambda fs: patch_slab(fs, page_of(fs, b"g"), lambda slab, index: slab.slots.__setitem__(index, 4)),
    ),
    "slab-empty": ("leaked-block", empty_slab),
    # held files
    "held-without-a-record": ("hold", held_without_record),
    "held-without-the-flag": ("hold", lambda fs: patch_inode(fs, held(fs), flags=f.FLAG_FILE)),
    "held-for-no-reason": ("hold", lambda fs: held_for(fs, bytes(8))),
    "held-for-what-is-no-text": ("hold", lambda fs: held_for(fs, bytes(8) + b"\xff")),
    "held-for-too-many-reasons": ("hold", lambda fs: held_for(fs, b"x" * 5000)),
    "held-directory": ("hold", held_directory),
    "held-without-the-feature": ("hold", held_without_feature),
    # quotas
    "quota-used-too-small": ("quota", lambda fs: patch_used(fs, 0)),
    "quota-used-too-large": ("quota", lambda fs: patch_used(fs, 1 << 63)),
    "quota-and-more-behind": ("quota", behind_quota),
    "quota-without-one": ("quota", lambda fs: patch_inode(fs, fs.resolve(b"empty"), inline=b"x" * 120)),
    "project-none-of-a-file": ("project", lambda fs: patch_project(fs, b"q/e/f", 0)),
    "project-none-of-a-directory": ("project", lambda fs: patch_project(fs, b"q/e", 0)),
    "project-a-file": ("project", lambda fs: patch_project(fs, b"q/e/f", b"q/e/f")),
    "project-no-inode": ("project", lambda fs: patch_project(fs, b"q/e/f", 1 << 60)),
    "project-another": ("project", lambda fs: patch_project(fs, b"q/e/f", b"q/e/inner")),
    "project-of-an-orphan": ("project", lambda fs: patch_project(fs, b"", 7)),
    "project-of-the-root": ("project", lambda fs: patch_inode(fs, ROOT, project=9)),
    # inodes
    "reserved-inode-type": ("reserved-inode", lambda fs: patch_inode(fs, Ino(4), flags=f.FLAG_FILE)),
    "reserved-inode-made": ("reserved-inode", lambda fs: patch_inode(fs, Ino(9), mode=stat.S_IFREG)),
    "orphans-with-content": ("reserved-inode", lambda fs: patch_inode(fs, f.ORPHANS_INO, size=5)),
    "list-of-orphans-of-another-type": (
        "reserved-inode",
        lambda fs: patch_inode(fs, f.ORPHANS_INO, mode=stat.S_IFDIR, flags=f.FLAG_DIR, nlink=2),
    ),
    "iommu-is-a-file": (
        "reserved-inode",
        lambda fs: patch_inode(fs, f.ROOT_PGTABLES_INO, flags=f.FLAG_FILE | f.FLAG_IOMMU_DOMAIN_PGTABLES),
    ),
    "iommu-has-no-name": ("reserved-name", lambda fs: drop_name(fs, b"iommu")),
    "iommu-has-another-name": ("reserved-name", iommu_elsewhere),
    "iommu-has-two-names": ("reserved-name", lambda fs: second_name(fs, b"iommu", b"again")),
    "inode-damaged": ("inode-checksum", lambda fs: flip(fs, fs.resolve(b"g") * 256 + 50)),
    "inode-of-a-directory-damaged": ("inode-checksum", lambda fs: flip(fs, fs.resolve(b"d") * 256 + 50)),
    "root-of-another-owner": ("inode-checksum", lambda fs: flip(fs, 256 + 50)),
    "inode-type-damaged": ("inode-checksum", lambda fs: flip(fs, fs.resolve(b"g") * 256 + 37)),
    "inode-type-of-a-directory-damaged": ("inode-checksum", lambda fs: flip(fs, fs.resolve(b"d") * 256 + 37)),
    "root-damaged": ("inode-checksum", lambda fs: flip(fs, 256 + 37)),
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
    "name-with-nul": ("dirent", lambda fs: rename_in_place(fs, b"g", b"\0")),
    "name-is-a-dot": ("dirent", lambda fs: rename_in_place(fs, b"g", b".")),
    "name-is-empty": ("dirent", lambda fs: replace_value(fs, inode_of(fs, b"").root, b"big", empty_name)),
    "name-length": ("dirent", lambda fs: patch_dirent(fs, b"big", length=2)),
    "name-of-nothing": ("dirent-dangling", second_name_of_nothing),
    "name-of-the-list-of-orphans": ("dirent-dangling", lambda fs: second_name_of_nothing(fs, f.ORPHANS_INO)),
    "name-with-other-type": ("dirent-mode", lambda fs: patch_dirent(fs, b"g", mode=stat.S_IFSOCK)),
    "directory-with-two-names": ("directory-names", lambda fs: second_name(fs, b"empty", b"again")),
    "directory-names-the-one-above": ("directory-names", directory_loop),
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
    "node-keys-do-not-rise": ("tree-node", lambda fs: extent_in_tree(fs, swap_keys)),
    "node-loop": ("double-use", tree_loop),
    "node-beyond-the-region": ("page-range", lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=1 << 60)),
    "node-in-metadata": ("page-range", lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=1)),
    "node-free": ("page-free", lambda fs: set_kind(fs, inode_of(fs, b"sparse").root, f.PAGE_FREE)),
    "node-of-another-kind": ("page-kind", lambda fs: set_kind(fs, inode_of(fs, b"sparse").root, f.PAGE_DATA)),
    # extents
    "extent-beyond-the-region": ("extent-range", lambda fs: extent_outside(fs, page=fs.volume.total_pages)),
    "extent-over-metadata": ("extent-range", lambda fs: extent_outside(fs, page=0)),
    "extent-without-end": ("extent-range", lambda fs: extent_outside(fs, length=1 << 63)),
    "extent-part-of-block": ("block-part", lambda fs: patch_extent(fs, b"big", length=600)),
    "extent-not-aligned": ("block-align", lambda fs: patch_extent(fs, b"big", start=1)),
    "extent-reaches-the-next": ("extent-order", long_extent),
    "extent-of-free-page": ("page-free", lambda fs: set_kind(fs, page_of(fs, b"g"), f.PAGE_FREE)),
    "extent-of-another-kind": ("page-kind", lambda fs: set_kind(fs, page_of(fs, b"g"), f.PAGE_XATTR)),
    "extent-of-free-block": ("block-free", lambda fs: set_block(fs, page_of(fs, b"big") // 512, f.BLOCK_FREE)),
    "extent-of-shared-page": ("double-use", share_page),
    "extent-of-shared-block": ("double-use", share_block),
    "extents-behind-the-last": ("extent-value", lambda fs: patch_extent(fs, b"g", 3, start=9)),
    "extent-value-size": ("extent-value", lambda fs: extent_in_tree(fs, short_extent)),
    # attributes
    "attribute-damaged": ("xattr", lambda fs: patch_xattr(fs, b"user.small", lambda v: v[:-1])),
    "attribute-with-a-value-elsewhere-twice": ("xattr", lambda fs: patch_xattr(fs, b"user.small", external_twice)),
    "attribute-name": ("name-key", lambda fs: patch_xattr(fs, b"user.small", lambda v: v.replace(b"small", b"smull"))),
    "attribute-value-damaged": ("xattr-value", lambda fs: flip(fs, external_page(fs) * f.PAGE + 10)),
    "attribute-page-free": ("page-free", lambda fs: set_kind(fs, external_page(fs), f.PAGE_FREE)),
    # leaks
    "page-without-owner": ("leaked-page", lambda fs: set_kind(fs, free_page(fs), f.PAGE_DATA)),
    "page-of-inodes-without-inodes": ("leaked-page", lambda fs: set_kind(fs, free_page(fs, zero=True), f.PAGE_INODES)),
    "block-without-owner": ("leaked-block", leak_blocks),
}
FAULTS |= faults_iommu.FAULTS
FAULTS |= {f"checksum-of-{what}": (code, flip_at(place)) for what, (code, place) in CHECKSUMS.items()}


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
    "checksum-of-an-orphan": (
        {"inode-checksum", "orphan-list"},
        lambda fs: flip(fs, orphan_files(fs)[0] * 256 + 32),
    ),
    "page-counts-beyond-2-64-under-a-quota": (
        {"inode-pages", "quota"},
        many_pages,
    ),
    "checksum-of-a-quota": ({"inode-checksum", "project"}, lambda fs: flip(fs, quotas(fs) * 256 + 32)),
    "directory-loop-apart": ({"inode-lost", "directory-names"}, lambda fs: directory_loop(fs, apart=True)),
    "extents-overlap": (
        {"extent-order", "double-use"},
        lambda fs: extent_in_tree(fs, overlap),
    ),
    "attribute-in-wrong-pages": (
        {"xattr", "leaked-page"},
        lambda fs: patch_xattr(fs, b"user.large", lambda v: v[:-16] if len(v) > 42 else v[:-8] + bytes(8)),
    ),
    "extent-of-the-far-copy": (
        {"page-kind", "leaked-page"},
        lambda fs: patch_extent(fs, b"g", page=fs.volume.space.far_copy),
    ),
    "slot-of-a-file-free": (
        {"dirent-dangling", "leaked-page", "inode-free"},
        lambda fs: set_slots(fs, fs.resolve(b"sparse"), False),
    ),
}
