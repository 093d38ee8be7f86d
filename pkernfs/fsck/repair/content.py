"""Repair of what inodes hold: trees are made anew from what can be kept, and what lost its name gets one."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from typing import Any

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    DIRENT,
    EXTENT,
    EXTENT_VALUE,
    FLAG_DIR,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    INLINE_EXTENTS,
    INLINE_SIZE,
    INODE_SIZE,
    IOMMU_INO,
    KEY_SLOTS,
    ROOT_INO,
    XATTR_HEAD,
    Extent,
    Inode,
    name_key,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.directory import Directory
from pkernfs.fs.node import Node
from pkernfs.fs.pages import read_inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.inodes import PLACES, in_its_place
from pkernfs.fsck.check.trees import Salvage
from pkernfs.fsck.repair.work import BATCH, Work

LOST_FOUND = b"lost+found"


class NewTree(Tree):
    """A tree that is made anew: in the pages that the old one had, as far as they go.

    Those are stored through the journal, so that a crash leaves the old tree or the new one.
    """

    def __init__(self, volume: Volume, owner: int, old: list[int]) -> None:
        super().__init__(volume, owner, 0)
        self.old = old[:BATCH]

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
    """Extents, entries, attributes and records that cannot stay: the tree is made anew without the bad ones."""
    for (ino, field), salvage in work.checker.salvaged.items():
        try:
            inode = read_inode(work.volume.region, ino)
        except CorruptError:
            continue
        what = {"xattrs": "attributes", "root": "extents", "iommu": "records"}[field]
        try:
            with work.volume.transaction():
                if field == "root" and stat.S_ISDIR(inode.mode):
                    what = "entries"
                if field == "root" and not stat.S_ISDIR(inode.mode) and not inode.root:
                    inode = inode._replace(inline=inline_extents(salvage.items))
                else:
                    root = _tree(work.volume, ino, salvage, what)
                    inode = inode._replace(**dict[str, Any]({field: root}))
                    if what == "extents" and not inode.root:
                        inode = inode._replace(inline=bytes(INLINE_SIZE))
                work.volume.put_inode(ino, inode)
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            continue
        text = f"inode {ino:#x}: {what} made anew, {len(salvage.items)} kept"
        if salvage.dropped:
            more = len(salvage.dropped) - 3
            text += "; dropped: " + ", ".join(salvage.dropped[:3]) + f" and {more} more" * (more > 0)
        work.note(what, text, ino=ino, offset=ino * INODE_SIZE)


def inline_extents(items: Iterable[tuple[int, bytes]]) -> bytes:
    """The extents inside the inode.  Cutting one can make more than fit: those at the end go."""
    extents = [Extent(start, *EXTENT_VALUE.unpack(value)) for start, value in items]
    raw = b"".join(map(EXTENT.pack, extents[:INLINE_EXTENTS]))
    return raw + bytes(INLINE_SIZE - len(raw))


def _tree(volume: Volume, ino: int, salvage: Salvage, what: str) -> int:
    """Make the tree anew within a transaction; the page of its root."""
    tree = NewTree(volume, ino, list(reversed(salvage.nodes)))
    items: dict[int, bytes] = {}
    for old, value in salvage.items:
        key = old
        if what in ("entries", "attributes"):
            first = name_key(volume.sb.hash_seed, _name(value, what))
            if not first <= key < first + KEY_SLOTS or key in items:
                key = next((k for k in range(first, first + KEY_SLOTS) if k not in items), old)
        items.setdefault(key, value)
    for key, value in sorted(items.items()):
        tree.put(tree.volume.open_tx, key, value)
    for page in {*salvage.nodes[BATCH:], *tree.old}:
        volume.open_tx.free_pages(page)
    return tree.root


def _name(value: bytes, what: str) -> bytes:
    """The name in an entry or an attribute."""
    if what == "entries":
        return value[DIRENT.size :]
    return value[XATTR_HEAD.size : XATTR_HEAD.size + XATTR_HEAD.unpack(value).name_length]


def lost(work: Work) -> None:
    """Inodes without a name get one: the reserved ones theirs, all others "#" and their number.

    Domains in /iommu; others in /lost+found as long as there is room to make and grow it, then in the root directory.
    """
    rooms = ["/lost+found", "/"]
    for ino in work.checker.lost:
        for where in _places(work, ino) or list(rooms):
            try:
                _name_lost(work, ino, where)
            except CorruptError:
                pass
            except FsError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if where in rooms:
                    rooms.remove(where)
                continue
            break


def _places(work: Work, ino: int) -> list[str]:
    """Where the inode must be named, if not just anywhere."""
    if ino in PLACES:
        return ["its place"]
    inode = work.checker.inode(ino)
    return ["/iommu"] if inode and inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES else []


def _name_lost(work: Work, ino: int, where: str) -> None:
    volume = work.volume
    inode = read_inode(volume.region, ino)
    if ino in PLACES:
        parent, name = PLACES[ino]
    else:
        parent = {"/": ROOT_INO, "/iommu": IOMMU_INO}.get(where) or _lost_found(work)
        name = b"#%d" % ino
    while Directory(volume, parent, volume.inode(parent)).find(name):
        name += b"~"
    if in_its_place(ino, parent, name):  # what has the name goes first
        _add_name(volume, parent, name, ino, inode)
        work.note("inode-lost", f"inode {ino:#x}: named {name.decode(errors='replace')!r} in {where}", ino=ino)


def _lost_found(work: Work) -> int:
    """The inode of /lost+found, made when there is none."""
    volume = work.volume
    root = volume.inode(ROOT_INO)
    name = LOST_FOUND
    while entry := Directory(volume, ROOT_INO, root).find(name):
        if stat.S_ISDIR(entry.mode):
            return entry.ino
        name += b"~"
    now = volume.clock()
    with volume.transaction() as tx:
        ino = volume.allocator.alloc_inode(tx)
        made = Inode(
            atime=now,
            mtime=now,
            ctime=now,
            btime=now,
            mode=stat.S_IFDIR | 0o700,
            generation=(read_inode(volume.region, ino).generation + 1) & 0xFFFFFFFF,
            uid=root.uid,
            gid=root.gid,
            flags=FLAG_DIR,
            nlink=2,
            parent=ROOT_INO,
        )
        directory = Directory(volume, ROOT_INO, root)
        directory.add(tx, name, ino, made.mode)
        root = directory.finish(now)
        volume.put_inode(ROOT_INO, root._replace(nlink=root.nlink + 1))
        volume.put_inode(ino, made)
    work.note("inode-lost", f"made /{name.decode()}", ino=ino)
    return ino


def _add_name(volume: Volume, parent: int, name: bytes, ino: int, inode: Inode) -> None:
    """Name an inode that no directory names.  A file's count of names may be wrong then: the next round's work."""
    is_dir = stat.S_ISDIR(inode.mode)
    with volume.transaction() as tx:
        directory = Directory(volume, parent, volume.inode(parent))
        directory.add(tx, name, ino, inode.mode)
        above = directory.finish(volume.clock())
        volume.put_inode(parent, above._replace(nlink=above.nlink + is_dir))
        if is_dir:
            volume.put_inode(ino, inode._replace(parent=parent))
