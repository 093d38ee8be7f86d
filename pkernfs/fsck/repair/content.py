"""Repair of what inodes hold: trees and lists of extents are made anew from what can be kept."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable, Sequence

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    DIRENT,
    EXTENT,
    EXTENT_VALUE,
    INLINE_EXTENTS,
    INLINE_SIZE,
    INODE_SIZE,
    KEY_SLOTS,
    XATTR_HEAD,
    Extent,
    FilePage,
    Ino,
    Inode,
    PageNo,
    name_key,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.damage import NO_PAGE
from pkernfs.fs.node import Node
from pkernfs.fs.pages import read_inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fsck.findings import Structure, Values
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import BATCH, Work


class NewTree(Tree):
    """A tree that is made anew: in the pages that the old one had, as far as they go.

    Those are stored through the journal, so that a crash leaves the old tree or the new one.
    """

    def __init__(self, volume: Volume, owner: Ino, old: Sequence[PageNo]) -> None:
        super().__init__(volume, owner, NO_PAGE)
        self.old = list(old[:BATCH])

    def new_node(self, tx: Transaction, level: int) -> Node:
        """In a page of the old tree, while there are any."""
        if not self.old:
            return super().new_node(tx, level)
        node = Node(self.old.pop(), self.owner, level, fresh=False)
        self.volume.nodes[node.offset] = node
        tx.change(node)
        self.pages += 1
        return node


def contents(work: Work) -> None:
    """Extents, entries, attributes and records that cannot stay: the structure is made anew without the bad ones."""
    bad: dict[Structure, Code] = {}
    for finding in work.findings:
        if finding.structure and finding.structure.must_change:
            bad.setdefault(finding.structure, finding.code)
    for structure, code in bad.items():
        ino = structure.owner
        try:
            inode = read_inode(work.volume.region, ino)
        except CorruptError:
            continue
        what = {"xattrs": "attributes", "root": "extents", "iommu": "records"}[structure.field]
        if structure.field == "root" and stat.S_ISDIR(inode.mode):
            what = "entries"
        try:
            with work.volume.transaction() as tx:
                tx.put_inode(ino, _made_anew(work.volume, tx, inode, structure, what))
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            continue
        text = f"inode {ino}: {what} made anew, {len(structure.kept)} kept"
        if structure.dropped:
            more = len(structure.dropped) - 3
            text += "; dropped: " + ", ".join(structure.dropped[:3]) + f" and {more} more" * (more > 0)
        work.note(code, text, ino=ino, offset=ino * INODE_SIZE)


def _made_anew(volume: Volume, tx: Transaction, inode: Inode, structure: Structure, what: str) -> Inode:
    """The inode with the structure made anew."""
    if what == "extents" and not inode.root:
        return inode._replace(inline=inline_extents(structure.kept))
    values: Values = {}
    values[structure.field] = _tree(volume, tx, structure, what)
    inode = inode._replace(**values)
    return inode._replace(inline=bytes(INLINE_SIZE)) if what == "extents" and not inode.root else inode


def inline_extents(items: Iterable[tuple[int, bytes]]) -> bytes:
    """The extents inside the inode.  Cutting one can make more than fit: those at the end go."""
    extents = [Extent(FilePage(start), *EXTENT_VALUE.unpack(value)) for start, value in items]
    raw = b"".join(map(EXTENT.pack, extents[:INLINE_EXTENTS]))
    return raw + bytes(INLINE_SIZE - len(raw))


def _tree(volume: Volume, tx: Transaction, structure: Structure, what: str) -> PageNo:
    """Make the tree anew within a transaction; the page of its root."""
    tree = NewTree(volume, structure.owner, list(reversed(structure.nodes)))
    items: dict[int, bytes] = {}
    for old, value in structure.kept:
        key = old
        if what in ("entries", "attributes"):
            first = name_key(volume.sb.hash_seed, _name(value, what))
            if not first <= key < first + KEY_SLOTS or key in items:
                key = next((k for k in range(first, first + KEY_SLOTS) if k not in items), old)
        items.setdefault(key, value)
    for key, value in sorted(items.items()):
        tree.put(tx, key, value)
    for page in {*structure.nodes[BATCH:], *tree.old}:
        tx.free_pages(page)
    return tree.root


def _name(value: bytes, what: str) -> bytes:
    """The name in an entry or an attribute."""
    if what == "entries":
        return value[DIRENT.size :]
    return value[XATTR_HEAD.size : XATTR_HEAD.size + XATTR_HEAD.unpack(value).name_length]
