"""Repair of checksums: an inode or a node that looks right gets a right one, without what cannot be its own.

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
    Ino,
    Inode,
    PageNo,
    name_key,
)
from pkernfs.fs.damage import NO_PAGE
from pkernfs.fs.directory import Directory
from pkernfs.fs.node import Node
from pkernfs.fs.pages import has_extents, raw_inode
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.check.iommu import record
from pkernfs.fsck.check.rules import in_its_place, may_be_named
from pkernfs.fsck.check.trees import is_attribute, is_entry, is_extent, is_record
from pkernfs.fsck.findings import Fits, Plausible, Structure
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.content import inline_extents
from pkernfs.fsck.repair.inodes import is_root_of
from pkernfs.fsck.repair.work import Work, batches


class _Judge:
    """Judges what stands in inodes and nodes by itself, and by what others were seen to use."""

    def __init__(self, work: Work) -> None:
        self.volume = work.volume
        self.region = work.volume.region
        self.memory = work.memory
        self.reached = work.reached
        self.plausible = {data.ino: (code, data.inode) for code, data in work.found(Plausible)}

    def inode(self, ino: Ino, inode: Inode) -> Inode:
        """The inode without extents of memory that cannot be its own."""
        if not has_extents(inode) or (inode.root and is_root_of(self.volume, PageNo(inode.root), ino)):
            return inode
        extents = [EXTENT.unpack(inode.inline, at * EXTENT.size) for at in range(INLINE_EXTENTS)]
        items = [(e.start, EXTENT_VALUE.pack(ExtentValue(e.page, e.length))) for e in extents if e.length]
        kept = [item for item in items if self.is_right_extent(ino, *item)]
        return inode._replace(root=NO_PAGE if kept else inode.root, inline=inline_extents(kept))

    def node(self, page: PageNo, structure: Structure) -> Node | None:
        """The node with the items that are right by themselves; None when it cannot be kept."""
        owner, fits = structure.owner, structure.fits
        node = self._decoded(page, owner)
        if node is None or not self.memory.is_nobodys(page, 1, PAGE_NODE):
            return None
        if node.level:
            children = [self._decoded(PageNo(child), owner) for child in node.children]
            if any(child is None or child.level != node.level - 1 for child in children):
                return None
        else:
            items = zip(node.keys, node.values, strict=True)
            right = [item for item in items if fits(*item) and _IS_RIGHT[fits](self, owner, *item)]
            node.keys, node.values = [key for key, _ in right], [value for _, value in right]
        return node if node.keys and all(a < b for a, b in pairwise(node.keys)) else None

    def _decoded(self, page: PageNo, owner: Ino) -> Node | None:
        if page // PAGES_PER_BLOCK not in self.memory.pages:
            return None
        try:
            return Node.decode(self.region.read(page * PAGE, PAGE), page, owner, verify=False)
        except CorruptError:
            return None

    def is_right_extent(self, _: Ino, key: int, value: bytes) -> bool:
        extent = EXTENT_VALUE.unpack(value)
        in_file = key + extent.length <= MAX_FILE_SIZE // PAGE
        return in_file and self.memory.is_nobodys(PageNo(extent.page), extent.length, PAGE_DATA)

    def is_right_entry(self, owner: Ino, key: int, value: bytes) -> bool:
        """An entry that points to an inode which is not named elsewhere as often as it says."""
        try:
            entry = Directory(self.volume, owner, Inode()).decode(key, value)
        except CorruptError:
            return False
        ino = entry.ino
        usable = self.memory.in_use(ino) and may_be_named(ino) and in_its_place(ino, owner, entry.name)
        if not usable or not self._at_its_key(key, entry.name):
            return False
        inode = raw_inode(self.region, ino)
        if stat.S_ISDIR(inode.mode):
            return inode.parent == owner
        return ino not in self.reached or ino in self.plausible or self.reached.names_left.get(ino, 0) > 0

    def is_right_attribute(self, owner: Ino, key: int, value: bytes) -> bool:
        try:
            attribute = Xattrs(self.volume, owner, Inode()).decode(key, value)
        except CorruptError:
            return False
        runs = attribute.runs
        is_own = all(self.memory.is_nobodys(PageNo(run.page), run.length, PAGE_XATTR) for run in runs)
        return is_own and self._at_its_key(key, attribute.name)

    def is_right_record(self, owner: Ino, key: int, value: bytes) -> bool:
        return record(owner, key, value, self.volume.total_pages) is not None

    def _at_its_key(self, key: int, name: bytes) -> bool:
        first = name_key(self.volume.sb.hash_seed, name)
        return first <= key < first + KEY_SLOTS


#: how a value of a tree is told -> whether an item (owner, key, value) is right by itself
_IS_RIGHT: dict[Fits, Callable[[_Judge, Ino, int, bytes], bool]] = {
    is_extent: _Judge.is_right_extent,
    is_entry: _Judge.is_right_entry,
    is_attribute: _Judge.is_right_attribute,
    is_record: _Judge.is_right_record,
}


def checksums(work: Work) -> None:
    """Inodes and nodes whose checksums are wrong, and that look right, get right checksums."""
    volume, judge = work.volume, _Judge(work)
    for inodes in batches(judge.plausible.items()):
        with volume.transaction() as tx:
            for ino, (code, inode) in inodes:
                if ino < FIRST_FREE_SLOT or volume.space.inode_in_use(ino):
                    tx.put_inode(ino, judge.inode(ino, inode))
                    text = f"inode {ino} had a wrong checksum, and looked right: it has a right one now"
                    work.note(code, text, ino=ino, offset=ino * INODE_SIZE)
    structures = [finding.structure for finding in work.findings if finding.structure]
    damaged = {page: structure for structure in structures for page in structure.damaged}
    for pages in batches(damaged.items()):
        with volume.transaction() as tx:
            for page, structure in pages:
                node = judge.node(page, structure)
                if node:
                    tx.change(node)
                    text = f"tree node {page:#x} of inode {structure.owner} had a wrong checksum"
                    text += f": it has a right one now, with {len(node.keys)} items"
                    work.note(Code.TREE_NODE, text, ino=structure.owner, offset=page * PAGE)
