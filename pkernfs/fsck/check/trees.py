"""Walks of the trees of the inode at work, whose nodes are checked and claimed on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pkernfs.errors import CorruptError
from pkernfs.format import (
    DIRENT,
    DOMAIN,
    EXTENT_VALUE,
    KEY_SLOTS,
    MAPPING,
    PAGE,
    PAGE_NODE,
    ROOT_TABLE_KEY,
    XATTR_HEAD,
    PageNo,
    name_key,
)
from pkernfs.fs.node import Node
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import Structure
from pkernfs.fsck.problems import Code
from pkernfs.iommu.records import LAST_MAPPING

KEY_END = 1 << 64


def is_extent(key: int, value: bytes) -> bool:
    """Whether an item can stand in a tree of extents."""
    return len(value) == EXTENT_VALUE.size and key < ROOT_TABLE_KEY


def is_entry(_: int, value: bytes) -> bool:
    """Whether an item can stand in a directory."""
    return len(value) > DIRENT.size and DIRENT.unpack(value).length == len(value) - DIRENT.size


def is_attribute(key: int, value: bytes) -> bool:
    """Whether an item can stand in a tree of attributes."""
    return len(value) > XATTR_HEAD.size and not is_entry(key, value) and not is_record(key, value)


def is_record(key: int, value: bytes) -> bool:
    """Whether an item can stand in a tree of records of page tables."""
    return len(value) == MAPPING.size if key <= LAST_MAPPING else key >= ROOT_TABLE_KEY and len(value) <= DOMAIN.size


def items(check: Check, structure: Structure, root: PageNo) -> Iterable[tuple[int, bytes]]:
    """The items of a tree; in the order of their keys even where nodes are not, when they may be kept elsewhere."""
    found = _items(check, structure, root)
    return sorted(found) if structure.keeps else found


def _items(check: Check, structure: Structure, root: PageNo) -> Iterator[tuple[int, bytes]]:
    """The items of a tree of the inode at work, whose nodes are checked and claimed on the way.

    A node that names another owner is not claimed.  One that was seen before is not read again, so that loops end.
    """
    findings, owner = check.findings, structure.owner
    todo: list[tuple[PageNo, int | None, int, int]] = [(root, None, 0, KEY_END)] if root else []
    while todo:
        page, level, low, high = todo.pop()
        what = f"tree node {page:#x} of inode {owner}"
        node = _node(check, structure, page, what)
        if node is None:
            structure.broken = findings.incomplete = True
            continue
        if level is not None and node.level != level:
            structure.broken = True
            findings.note(Code.TREE_LEVEL, f"{what}: expected level {level}, found {node.level}", offset=page * PAGE)
            if node.level > level:
                findings.incomplete = True
                continue
        # The first key of an inner node is not looked at by any reader.
        keys = node.keys[1:] if node.level else node.keys
        if keys and not low <= keys[0] <= keys[-1] < high:
            structure.broken = True
            text = f"expected keys from {low:#x} to {high - 1:#x}, found {keys[0]:#x} to {keys[-1]:#x}"
            findings.note(Code.TREE_ORDER, f"{what}: {text}", offset=page * PAGE)
        if not node.level:
            yield from zip(node.keys, node.values, strict=True)
            continue
        bounds = [low, *keys, high]
        children = zip(map(PageNo, node.children), bounds, bounds[1:], strict=False)
        todo += reversed([(child, node.level - 1, first, end) for child, first, end in children])
    if structure.broken and structure.keeps:
        yield from _stray_items(check, structure)


def _node(check: Check, structure: Structure, page: PageNo, what: str) -> Node | None:
    """A node of the inode at work, claimed; None, and a note, when it cannot be had."""
    if not check.memory.in_slab(page, what):
        return None
    try:
        node = Node.decode(check.region.read(page * PAGE, PAGE), page, structure.owner)
    except CorruptError as error:
        check.findings.note_error(Code.TREE_NODE, error)
        structure.damaged.append(page)
        return None
    if not check.memory.claim(page, 1, PAGE_NODE, what):
        return None
    structure.nodes.append(page)
    return node


def _stray_items(check: Check, structure: Structure) -> Iterator[tuple[int, bytes]]:
    """The items of leaves of the inode at work that no node points to any more."""
    for page in check.memory.stray_leaves(structure.owner):
        try:
            node = Node.decode(check.region.read(page * PAGE, PAGE), page, structure.owner)
        except CorruptError:
            structure.damaged.append(page)
            continue
        if all(map(structure.fits, node.keys, node.values)) and check.memory.claim(page, 1, PAGE_NODE, "a leaf"):
            structure.nodes.append(page)
            yield from zip(node.keys, node.values, strict=True)


def hashed(check: Check, structure: Structure, key: int, name: bytes, names: dict[int, set[bytes]], what: str) -> bool:
    """A name stands at a key that its hash allows, once; whether it is the first of its kind.

    ``names``: those with the hash of the one before it.
    """
    first = name_key(check.volume.sb.hash_seed, name)
    if not first <= key < first + KEY_SLOTS:
        structure.broken = True
        check.note(Code.NAME_KEY, f"{what}: expected key {first:#x} or a little more, found key {key:#x}")
    if first not in names:
        names.clear()
    near = names.setdefault(first, set())
    if name in near:
        check.note(Code.NAME_TWICE, f"{what}: expected it once, found it again")
        return False
    near.add(name)
    return True
