"""Hostile images made by hand: what is planted in a sound region, and what has to come of it."""

import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from pkernfs import format as f
from pkernfs.format import Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.node import Node
from pkernfs.fs.pages import encode_page
from tests.core.faults import (
    child,
    external_page,
    flip,
    held_directory,
    held_for,
    held_without_record,
    inode_of,
    name_twice,
    orphan_files,
    patch_dirent,
    patch_extent,
    patch_node,
    patch_xattr,
    rename_in_place,
    second_name,
    set_block,
    set_superblock,
    share_page,
    slab_of,
    sparse_tree,
)
from tests.core.support import ROOT, SEED, patch_inode

Plant = Callable[[Filesystem], object]
FILE = {b"g", b"d/f"}  #: one file with two names
FAR = f.Ino((1 << 63) - 1)
#: The last name in the root, in the order of the cookies.
LAST = max((b"d", b"g", b"empty", b"big", b"sparse", b"link", b"iommu"), key=lambda name: f.name_key(SEED, name))

# -- planting ---------------------------------------------------------------------------------------------------------


def add_name(fs: Filesystem, parent: bytes, name: bytes, ino: Ino, kind: int) -> None:
    """A name more, by the filesystem's own means."""
    place = fs.resolve(parent)
    directory = fs.names.directory(place)
    with fs.volume.transaction() as tx:
        directory.add(tx, name, ino, kind)
        tx.put_inode(place, directory.finish(1))


def name_directory(fs: Filesystem, parent: bytes, name: bytes, path: bytes) -> None:
    """A second name of a directory."""
    add_name(fs, parent, name, fs.resolve(path), stat.S_IFDIR)


def commit_journal(fs: Filesystem, records: list[tuple[int, int, int, bytes]], count: int = 0) -> None:
    """A committed transaction of records (offset, length, kind, data); ``count``: what it claims to have more."""
    journal = fs.volume.journal
    body = b"".join(
        f.JOURNAL_RECORD.pack(f.JournalRecord(offset, length, kind)) + data for offset, length, kind, data in records
    )
    sequence = journal.sequence + 1
    header = f.JOURNAL_HEADER.pack(
        f.JournalHeader(2 * sequence + 1, f.JOURNAL_MAGIC, 0, sequence, len(body), len(records) + count)
    )
    crc = f.checksum(body, f.checksum(header[f.JOURNAL_CHECKED_AT :]))
    fs.region.store(journal.body_at, body)
    fs.region.store(journal.header_at, header[:12] + crc.to_bytes(4, "little") + header[16:])


def store(fs: Filesystem, offset: int, length: int = 8, data: bytes = b"hostile!") -> None:
    commit_journal(fs, [(offset, length, f.STORE, data)])


def discard(fs: Filesystem, offset: int, pages: int) -> None:
    commit_journal(fs, [(offset, pages, f.DISCARD, b"")])


def node_header(fs: Filesystem, page: int, keys: int, level: int) -> None:
    """The header of a node says something else."""
    raw = fs.region.read(page * f.PAGE, f.PAGE)
    owner = f.PAGE_HEADER_LAYOUT.unpack(raw).owner
    fs.region.store(page * f.PAGE, encode_page(f.NODE_MAGIC, page * f.PAGE, owner, keys, level, raw[32:]))


def child_is_parent(fs: Filesystem) -> None:
    root = sparse_tree(fs)
    patch_node(fs, root, lambda node: node.children.__setitem__(0, f.PageNo(root)))


def every_child_is_the_first(fs: Filesystem) -> None:
    def change(node: Node) -> None:
        node.children = [node.children[0]] * len(node.children)

    patch_node(fs, sparse_tree(fs), change)


def level_stays(fs: Filesystem) -> None:
    """The child of an inner node says that it is one of the same level."""
    page = child(fs, sparse_tree(fs))
    node_header(fs, page, 3, 1)


def keys_unordered(fs: Filesystem) -> None:
    patch_node(fs, inode_of(fs, b"sparse").root, lambda node: node.keys.__setitem__(slice(2), node.keys[1::-1]))


def below_its_bounds(fs: Filesystem) -> None:
    """A key in the second leaf that belongs in the first."""
    page = child(fs, sparse_tree(fs), 1)
    patch_node(fs, page, lambda node: node.keys.__setitem__(0, 1))


def xattr_run(fs: Filesystem, page: int, length: int) -> None:
    patch_xattr(fs, b"user.large", lambda v: v[:-16] + f.EXTENT_VALUE.pack(f.ExtentValue(f.PageNo(page), length)))


def xattr_head(fs: Filesystem, **fields: int) -> None:
    def change(value: bytes) -> bytes:
        return f.XATTR_HEAD.pack(f.XATTR_HEAD.unpack(value)._replace(**fields)) + value[16:]

    patch_xattr(fs, b"user.small", change)


def orphan_with_names(fs: Filesystem) -> None:
    """/g is on the list of orphans, rightly linked."""
    ino = fs.resolve(b"g")
    patch_inode(fs, ino, orphan_next=f.ORPHANS_INO, orphan_prev=f.ORPHANS_INO)
    patch_inode(fs, f.ORPHANS_INO, orphan_next=ino, orphan_prev=ino)


def orphan_directory(fs: Filesystem) -> None:
    """/d, with all that is below it, is on the list and has no links: freeing it would lose that."""
    ino = fs.resolve(b"d")
    patch_inode(fs, ino, orphan_next=f.ORPHANS_INO, orphan_prev=f.ORPHANS_INO, nlink=0)
    patch_inode(fs, f.ORPHANS_INO, orphan_next=ino, orphan_prev=ino)


def orphan_loop(fs: Filesystem) -> None:
    one, two = orphan_files(fs)
    patch_inode(fs, one, orphan_next=two)


class Case(NamedTuple):
    """A way to damage a region.

    ``damaged``: the paths of which some operation fails with EUCLEAN.  ``refused``: a word of the one line that the
    mount is refused with.  ``held``: the paths of which changes fail with EPERM.
    """

    plant: Plant
    damaged: set[bytes] = set()  # noqa: RUF012  # a NamedTuple's default, which nobody changes
    refused: str = ""
    held: set[bytes] = set()  # noqa: RUF012


def of_file(**fields: Any) -> Plant:
    return lambda fs: patch_inode(fs, fs.resolve(b"g"), **fields)


CASES: dict[str, Case] = {
    # directories
    "directory-names-the-one-above": Case(lambda fs: name_directory(fs, b"d/e", b"up", b"d"), {b"d/e", b"d/e/up"}),
    "directory-names-itself": Case(lambda fs: name_directory(fs, b"d/e", b"self", b"d/e"), {b"d/e", b"d/e/self"}),
    "directory-names-the-root": Case(lambda fs: add_name(fs, b"d", b"root", ROOT, stat.S_IFDIR), {b"d", b"d/root"}),
    "directory-is-its-own-parent": Case(
        lambda fs: patch_inode(fs, fs.resolve(b"empty"), parent=fs.resolve(b"empty")), {b"empty"}
    ),
    "directory-reached-twice": Case(lambda fs: name_directory(fs, b"d", b"again", b"empty"), {b"d", b"d/again"}),
    "directory-reached-twice-from-one": Case(lambda fs: second_name(fs, b"empty", b"again")),
    "directory-with-a-parent-of-nothing": Case(
        lambda fs: patch_inode(fs, fs.resolve(b"empty"), parent=1 << 63), {b"empty"}
    ),
    "directory-with-a-size-near-2-63": Case(lambda fs: patch_inode(fs, fs.resolve(b"d/e"), size=FAR), {b"d/e"}),
    "name-of-the-list-of-orphans": Case(
        lambda fs: add_name(fs, b"d", b"orphans", f.ORPHANS_INO, stat.S_IFREG), {b"d", b"d/orphans"}
    ),
    "name-of-a-free-slot": Case(lambda fs: add_name(fs, b"d", b"free", f.Ino(9), stat.S_IFREG), {b"d", b"d/free"}),
    "name-far-outside": Case(lambda fs: add_name(fs, b"d", b"far", FAR, stat.S_IFREG), {b"d", b"d/far"}),
    "name-of-another-type": Case(lambda fs: patch_dirent(fs, b"big", mode=stat.S_IFDIR), {b"big"}),
    "name-twice": Case(name_twice),
    **{
        f"name-{what}": Case(lambda fs, name=name: rename_in_place(fs, b"link", name), {b"", b"link"})  # type: ignore[misc]
        for what, name in (("with-slash", b"a/bc"), ("with-nul", b"a\0bc"), ("dot", b"."), ("dot-dot", b".."))
    },
    "name-with-a-key-near-2-64": Case(
        lambda fs: patch_node(fs, inode_of(fs, b"").root, lambda n: n.keys.__setitem__(-1, (1 << 64) - 1)),
        {b"", LAST},
    ),
    "name-empty": Case(lambda fs: rename_in_place(fs, b"link", b""), {b"", b"link"}),
    "name-longer-than-its-entry": Case(lambda fs: patch_dirent(fs, b"link", length=255), {b"", b"link"}),
    "name-of-4-GiB": Case(lambda fs: patch_dirent(fs, b"link", length=(1 << 32) - 1), {b"", b"link"}),
    # sizes and counts
    **{
        f"file-of-{size:#x}": Case(of_file(size=size), FILE)
        for size in (f.MAX_FILE_SIZE + 1, 1 << 62, FAR, FAR + 1, FAR + 2, (1 << 64) - 1)
    },
    "file-as-large-as-can-be": Case(of_file(size=f.MAX_FILE_SIZE)),
    "file-with-2-63-pages": Case(of_file(pages=FAR), FILE),
    "file-of-no-type": Case(of_file(mode=0o170644), FILE),
    "link-count-at-its-end": Case(of_file(nlink=(1 << 32) - 1)),
    "symlink-beyond-its-page": Case(lambda fs: patch_inode(fs, fs.resolve(b"link"), size=5000), {b"link"}),
    "symlink-of-2-62": Case(lambda fs: patch_inode(fs, fs.resolve(b"link"), size=1 << 62), {b"link"}),
    # extents
    "extent-over-the-superblock": Case(lambda fs: patch_extent(fs, b"g", page=0), FILE),
    "extent-over-the-block-table": Case(lambda fs: patch_extent(fs, b"g", page=1), FILE),
    "extent-over-the-journal": Case(
        lambda fs: patch_extent(fs, b"g", page=fs.volume.journal.header_at // f.PAGE), FILE
    ),
    "extent-over-inodes": Case(lambda fs: patch_extent(fs, b"g", page=fs.resolve(b"g") // 16), FILE),
    "extent-over-a-slab-header": Case(lambda fs: patch_extent(fs, b"g", page=slab_of(fs) * 512), FILE),
    "extent-over-a-directory": Case(lambda fs: patch_extent(fs, b"g", page=inode_of(fs, b"").root), FILE),
    "extent-over-an-attribute": Case(lambda fs: patch_extent(fs, b"g", page=external_page(fs)), FILE),
    "extent-over-free-blocks": Case(
        lambda fs: patch_extent(fs, b"big", page=fs.volume.space.table.find(0) * 512), {b"big"}
    ),
    "extent-over-a-part-of-a-block": Case(lambda fs: patch_extent(fs, b"g", page=extent_of_big(fs) + 1), FILE),
    "extent-beyond-the-end": Case(lambda fs: patch_extent(fs, b"big", page=fs.volume.total_pages - 1), {b"big"}),
    "extent-of-2-63-pages": Case(lambda fs: patch_extent(fs, b"big", length=1 << 63), {b"big"}),
    "extent-that-wraps": Case(lambda fs: patch_extent(fs, b"big", page=(1 << 64) - 512), {b"big"}),
    "extent-behind-the-largest-file": Case(lambda fs: patch_extent(fs, b"g", start=f.MAX_FILE_SIZE // f.PAGE), FILE),
    "extents-of-two-files-overlap": Case(share_page),
    # trees
    "child-is-its-parent": Case(child_is_parent, {b"sparse"}),
    "every-child-is-the-first": Case(every_child_is_the_first, {b"sparse"}),
    "tree-60000-deep": Case(lambda fs: node_header(fs, inode_of(fs, b"sparse").root, 80, 60_000), {b"sparse"}),
    "level-stays": Case(level_stays, {b"sparse"}),
    "keys-unordered": Case(keys_unordered, {b"sparse"}),
    "key-below-its-bounds": Case(below_its_bounds, {b"sparse"}),
    "node-of-65535-keys": Case(lambda fs: node_header(fs, inode_of(fs, b"sparse").root, 65535, 0), {b"sparse"}),
    "node-without-keys": Case(lambda fs: node_header(fs, inode_of(fs, b"sparse").root, 0, 0), {b"sparse"}),
    "node-of-another-inode": Case(
        lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=inode_of(fs, b"").root), {b"sparse"}
    ),
    "node-in-the-metadata": Case(lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=1), {b"sparse"}),
    "node-far-outside": Case(lambda fs: patch_inode(fs, fs.resolve(b"sparse"), root=FAR), {b"sparse"}),
    # attributes
    "attribute-value-outside": Case(lambda fs: xattr_run(fs, 1 << 62, 3), {b"d"}),
    "attribute-value-in-the-metadata": Case(lambda fs: xattr_run(fs, 1, 3), {b"d"}),
    "attribute-value-of-2-63-pages": Case(lambda fs: xattr_run(fs, external_page(fs), FAR), {b"d"}),
    "attribute-of-4-GiB": Case(lambda fs: xattr_head(fs, size=(1 << 32) - 1), {b"d"}),
    "attribute-name-longer-than-its-item": Case(lambda fs: xattr_head(fs, name_length=255), {b"d"}),
    "attribute-without-name": Case(lambda fs: xattr_head(fs, name_length=0), {b"d"}),
    # held files
    "held-directory": Case(held_directory, held={*FILE, b"empty"}),
    "held-for-no-reason": Case(lambda fs: held_for(fs, bytes(8)), held=FILE),
    "held-since-ever-for-terminal-codes": Case(lambda fs: held_for(fs, b"\xff" * 7 + b"\x7f" + b"\x1b[2J"), held=FILE),
    "held-without-a-record": Case(held_without_record, held={*FILE, b"big"}),
    "held-symlink": Case(lambda fs: patch_inode(fs, fs.resolve(b"link"), flags=f.FLAG_HELD), held={b"link"}),
    # orphans
    "orphans-in-a-loop": Case(orphan_loop),
    "orphans-lead-nowhere": Case(lambda fs: patch_inode(fs, f.ORPHANS_INO, orphan_next=FAR)),
    "orphan-with-names": Case(orphan_with_names),
    "orphan-is-a-directory-in-use": Case(orphan_directory, {b"d"}),
    # what keeps the whole from being mounted
    "root-is-damaged": Case(lambda fs: flip(fs, 256 + 50), refused="inode 1"),
    "root-is-a-file": Case(lambda fs: patch_inode(fs, ROOT, mode=stat.S_IFREG), refused="root"),
    "root-is-free": Case(lambda fs: patch_inode(fs, ROOT, mode=0), refused="inode 1"),
    "root-has-a-parent": Case(lambda fs: patch_inode(fs, ROOT, parent=fs.resolve(b"d")), refused="root"),
    "block-of-an-unknown-kind": Case(lambda fs: set_block(fs, 9, 77), refused="block table"),
    "superblock-of-2-63-blocks": Case(lambda fs: set_superblock(fs, 0, blocks=1 << 63), refused="blocks"),
    "superblock-of-metadata-only": Case(lambda fs: set_superblock(fs, 0, first_block=10), refused="first_block"),
    "superblock-with-a-physical-address-that-wraps": Case(
        lambda fs: set_superblock(fs, 0, phys_base=(1 << 64) - f.BLOCK), refused="physical"
    ),
    "journal-sequence-at-its-end": Case(
        lambda fs: fs.region.store_word(fs.volume.journal.header_at, (1 << 64) - 2), refused="journal"
    ),
    "journal-longer-than-it-is": Case(lambda fs: store(fs, 1 << 23, 1 << 31), refused="journal"),
    "journal-of-too-many-records": Case(lambda fs: commit_journal(fs, [], FAR), refused="journal"),
    "journal-stores-outside": Case(lambda fs: store(fs, fs.region.size), refused="journal record"),
    "journal-stores-far-outside": Case(lambda fs: store(fs, (1 << 64) - 8), refused="journal record"),
    "journal-stores-over-the-superblock": Case(lambda fs: store(fs, 0), refused="journal record"),
    "journal-stores-over-the-far-copy": Case(
        lambda fs: store(fs, fs.volume.space.far_copy * f.PAGE), refused="journal record"
    ),
    "journal-discards-the-far-copy": Case(
        lambda fs: discard(fs, fs.volume.space.far_copy * f.PAGE, 1), refused="journal record"
    ),
    "journal-stores-over-the-copy": Case(lambda fs: store(fs, fs.volume.sb.journal_offset), refused="journal record"),
    "journal-stores-in-the-journal": Case(lambda fs: store(fs, fs.volume.journal.body_at), refused="journal record"),
    "journal-stores-between-words": Case(lambda fs: store(fs, (1 << 23) + 1), refused="journal record"),
    "journal-discards-the-metadata": Case(lambda fs: discard(fs, 0, 512), refused="journal record"),
    "journal-discards-too-much": Case(lambda fs: discard(fs, 1 << 23, (1 << 32) - 1), refused="journal record"),
    "journal-discards-parts-of-pages": Case(lambda fs: discard(fs, (1 << 23) + 8, 1), refused="journal record"),
    "journal-of-an-unknown-kind": Case(lambda fs: commit_journal(fs, [(1 << 23, 8, 7, bytes(8))]), refused="record"),
}


def extent_of_big(fs: Filesystem) -> int:
    return f.EXTENT.unpack(inode_of(fs, b"big").inline).page
