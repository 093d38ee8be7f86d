"""Repair of checksums: an inode or a node that looks right is sealed again, without what cannot be its own.

What it says of memory and names is compared with all that was reached in the check: others keep what they have.  What
remains wrong in the fields, and below, the next round sees.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from itertools import pairwise

from pkernfs.errors import CorruptError
from pkernfs.format import (
    EXTENT,
    EXTENT_VALUE,
    FIRST_FREE_SLOT,
    INLINE_EXTENTS,
    INODE_SIZE,
    KEY_SLOTS,
    MAX_FILE_SIZE,
    PAGE,
    PAGE_DATA,
    PAGE_NODE,
    PAGE_XATTR,
    PAGES_PER_BLOCK,
    ExtentValue,
    Inode,
    name_key,
)
from pkernfs.fs.directory import Directory
from pkernfs.fs.node import Node
from pkernfs.fs.pages import has_extents, raw_inode
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.check import Checker
from pkernfs.fsck.check.inodes import in_its_place, may_be_named
from pkernfs.fsck.check.iommu import record
from pkernfs.fsck.check.trees import Fits, is_attribute, is_entry, is_extent, is_record
from pkernfs.fsck.repair.content import inline_extents
from pkernfs.fsck.repair.inodes import is_root_of
from pkernfs.fsck.repair.work import Work, batches


def seals(work: Work) -> None:
    """Inodes and nodes whose checksums are wrong, and that look right, get right checksums."""
    volume, checker = work.volume, work.checker
    for inodes in batches(checker.unsealed.items()):
        with volume.transaction():
            for ino, inode in inodes:
                if ino < FIRST_FREE_SLOT or volume.space.inode_in_use(ino):
                    volume.put_inode(ino, _sealable(work, ino, inode))
                    text = f"inode {ino:#x} had a wrong checksum, and looked right: sealed again"
                    work.note("inode-checksum", text, ino=ino, offset=ino * INODE_SIZE)
    for pages in batches(checker.ledger.unsealed):
        with volume.transaction():
            for page in pages:
                owner = checker.ledger.unsealed[page].owner
                node = _node(checker, page)
                if node:
                    volume.change(node)
                    text = f"tree node {page:#x} of inode {owner:#x} had a wrong checksum: sealed again"
                    work.note("tree-node", f"{text} with {len(node.keys)} items", ino=owner, offset=page * PAGE)


def _sealable(work: Work, ino: int, inode: Inode) -> Inode:
    """The inode without extents of memory that cannot be its own."""
    if not has_extents(inode) or (inode.root and is_root_of(work.volume, inode.root, ino)):
        return inode
    extents = [EXTENT.unpack(inode.inline, at * EXTENT.size) for at in range(INLINE_EXTENTS)]
    items = [(e.start, EXTENT_VALUE.pack(ExtentValue(e.page, e.length))) for e in extents if e.length]
    kept = [item for item in items if _is_right_extent(work.checker, ino, *item)]
    return inode._replace(root=0 if kept else inode.root, inline=inline_extents(kept))


def _node(checker: Checker, page: int) -> Node | None:
    """The node with the items that are right by themselves; None when it cannot be kept."""
    ledger = checker.ledger
    owner, fits = ledger.unsealed[page]
    node = _decoded(checker, page, owner)
    if node is None or not ledger.is_nobodys(page, 1, PAGE_NODE):
        return None
    if node.level:
        children = [_decoded(checker, child, owner) for child in node.children]
        if any(child is None or child.level != node.level - 1 for child in children):
            return None
    else:
        right = RIGHT[fits]
        items = list(zip(node.keys, node.values, strict=True))
        items = [item for item in items if fits(*item) and right(checker, owner, *item)]
        node.keys, node.values = [key for key, _ in items], [value for _, value in items]
    return node if node.keys and all(a < b for a, b in pairwise(node.keys)) else None


def _decoded(checker: Checker, page: int, owner: int) -> Node | None:
    if page // PAGES_PER_BLOCK not in checker.ledger.pages:
        return None
    try:
        return Node.decode(checker.region.read(page * PAGE, PAGE), page, owner, sealed=False)
    except CorruptError:
        return None


def _is_right_extent(checker: Checker, _: int, key: int, value: bytes) -> bool:
    extent = EXTENT_VALUE.unpack(value)
    in_file = key + extent.length <= MAX_FILE_SIZE // PAGE
    return in_file and checker.ledger.is_nobodys(extent.page, extent.length, PAGE_DATA)


def _is_right_entry(checker: Checker, owner: int, key: int, value: bytes) -> bool:
    """An entry that leads to an inode which is not named elsewhere as often as it says."""
    try:
        entry = Directory(checker.volume, owner, Inode())._entry(key, value)
    except CorruptError:
        return False
    ino = entry.ino
    usable = checker.in_use(ino) and may_be_named(ino) and in_its_place(ino, owner, entry.name)
    if not usable or not _at_its_key(checker, key, entry.name):
        return False
    inode = raw_inode(checker.region, ino)
    if stat.S_ISDIR(inode.mode):
        return inode.parent == owner
    return not checker.reached(ino) or ino in checker.unsealed or checker.names_left.get(ino, 0) > 0


def _is_right_attribute(checker: Checker, owner: int, key: int, value: bytes) -> bool:
    try:
        attribute = Xattrs(checker.volume, owner, Inode())._attribute(key, value)
    except CorruptError:
        return False
    memory = all(checker.ledger.is_nobodys(run.page, run.length, PAGE_XATTR) for run in attribute.runs)
    return memory and _at_its_key(checker, key, attribute.name)


def _is_right_record(checker: Checker, owner: int, key: int, value: bytes) -> bool:
    return record(owner, key, value, checker.volume.total_pages) is not None


def _at_its_key(checker: Checker, key: int, name: bytes) -> bool:
    first = name_key(checker.volume.sb.hash_seed, name)
    return first <= key < first + KEY_SLOTS


#: how a value of a tree is told -> whether an item (owner, key, value) is right by itself
RIGHT: dict[Fits, Callable[[Checker, int, int, bytes], bool]] = {
    is_extent: _is_right_extent,
    is_entry: _is_right_entry,
    is_attribute: _is_right_attribute,
    is_record: _is_right_record,
}
