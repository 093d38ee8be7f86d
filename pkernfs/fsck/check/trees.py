"""Walks of the trees of the inode at work, whose nodes are checked and claimed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import CorruptError
from pkernfs.format import (
    DIRENT,
    DOMAIN,
    EXTENT_VALUE,
    KEY_SLOTS,
    MAPPING,
    NODE_MAGIC,
    PAGE,
    PAGE_HEADER_LAYOUT,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    ROOT_TABLE_KEY,
    XATTR_HEAD,
    name_key,
)
from pkernfs.fs.node import Node
from pkernfs.iommu.records import LAST_MAPPING

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker
    from pkernfs.fsck.check.ledger import Ledger

KEY_END = 1 << 64


#: whether a key and a value can be an item of a tree: those of one inode are told by it
Fits = Callable[[int, bytes], bool]


class Unsealed(NamedTuple):
    """A node that cannot be used as it is."""

    owner: int
    fits: Fits


class Salvage(NamedTuple):
    """What remains of a structure of an inode: extents, entries, attributes or records."""

    items: list[tuple[int, bytes]]  #: key (may be the wrong one, for names) and value
    nodes: list[int]  #: pages of the tree as it is
    dropped: list[str]  #: what is not among the items


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


def tree(ledger: Ledger, root: int, fits: Fits) -> Iterator[tuple[int, bytes]]:
    """The items of a tree of the inode at work, whose nodes are checked and claimed on the way.

    A node that names another owner is not claimed.  One that was seen before is not read again, so that loops end.
    """
    ledger.tally.nodes, ledger.tally.broken = [], False
    todo: list[tuple[int, int | None, int, int]] = [(root, None, 0, KEY_END)] if root else []
    while todo:
        page, level, low, high = todo.pop()
        what = f"tree node {page:#x} of inode {ledger.tally.owner}"
        node = _node(ledger, page, what, fits)
        if node is None:
            ledger.tally.broken = ledger.incomplete = True
            continue
        if level is not None and node.level != level:
            ledger.tally.broken = True
            text = f"{what}: expected level {level}, found {node.level}"
            ledger.note("tree-level", text, offset=page * PAGE)
            if node.level > level:
                ledger.incomplete = True
                continue
        # The first key of an inner node is not looked at by any reader.
        keys = node.keys[1:] if node.level else node.keys
        if keys and not low <= keys[0] <= keys[-1] < high:
            ledger.tally.broken = True
            ledger.note(
                "tree-order",
                f"{what}: expected keys from {low:#x} to {high - 1:#x}, found {keys[0]:#x} to {keys[-1]:#x}",
                offset=page * PAGE,
            )
        if not node.level:
            yield from zip(node.keys, node.values, strict=True)
            continue
        bounds = [low, *keys, high]
        children = zip(node.children, bounds, bounds[1:], strict=False)
        todo += reversed([(child, node.level - 1, first, end) for child, first, end in children])
    if ledger.tally.broken and ledger.salvage:
        yield from _stray_items(ledger, fits)


def _node(ledger: Ledger, page: int, what: str, fits: Fits) -> Node | None:
    """A node of the inode at work, claimed; None, and a note, when it cannot be had."""
    if not ledger.in_slab(page, what):
        return None
    try:
        node = Node.decode(ledger.region.read(page * PAGE, PAGE), page, ledger.tally.owner)
    except CorruptError as error:
        ledger.note_damage("tree-node", error)
        ledger.unsealed[page] = Unsealed(ledger.tally.owner, fits)
        return None
    if not ledger.claim(page, 1, PAGE_NODE, what):
        return None
    ledger.tally.nodes.append(page)
    return node


def _stray_items(ledger: Ledger, fits: Fits) -> Iterator[tuple[int, bytes]]:
    """The items of leaves of the inode at work that no node leads to any more."""
    if ledger.strays is None:
        ledger.strays = {}
        for block, slab in ledger.slabs.items():
            for index, kind in enumerate(slab.kinds):
                if kind == PAGE_NODE:
                    page = block * PAGES_PER_BLOCK + index
                    header = PAGE_HEADER_LAYOUT.unpack(ledger.region.view, page * PAGE)
                    if header.magic == NODE_MAGIC and not header.level:
                        ledger.strays.setdefault(header.owner, []).append(page)
    for page in ledger.strays.get(ledger.tally.owner, ()):
        block, index = divmod(page, PAGES_PER_BLOCK)
        if ledger.pages[block][index]:
            continue
        try:
            node = Node.decode(ledger.region.read(page * PAGE, PAGE), page, ledger.tally.owner)
        except CorruptError:
            ledger.unsealed[page] = Unsealed(ledger.tally.owner, fits)
            continue
        if all(map(fits, node.keys, node.values)) and ledger.claim(page, 1, PAGE_NODE, "a leaf"):
            ledger.tally.nodes.append(page)
            yield from zip(node.keys, node.values, strict=True)


def items(checker: Checker, root: int, fits: Fits) -> Iterable[tuple[int, bytes]]:
    """The items of a tree; in the order of their keys even where nodes are not, when they are to be salvaged."""
    found = tree(checker.ledger, root, fits)
    return sorted(found) if checker.ledger.salvage else found


def keep(checker: Checker, ino: int, field: str, kept: list[tuple[int, bytes]], dropped: list[str]) -> None:
    """Note what can be kept of a structure that has to change."""
    if checker.ledger.salvage and (dropped or checker.ledger.tally.broken):
        checker.salvaged[ino, field] = Salvage(kept, checker.ledger.tally.nodes, dropped)


def hashed(checker: Checker, key: int, name: bytes, names: dict[int, set[bytes]], what: str) -> bool:
    """A name stands at a key that its hash allows, once; whether it is the first of its kind.

    ``names``: those with the hash of the one before it.
    """
    first = name_key(checker.volume.sb.hash_seed, name)
    if not first <= key < first + KEY_SLOTS:
        checker.note("name-key", f"{what}: expected key {first:#x} or a little more, found {key:#x}")
        checker.ledger.tally.broken = True
    if first not in names:
        names.clear()
    near = names.setdefault(first, set())
    if name in near:
        checker.note("name-twice", f"{what}: expected it once, found it again")
        return False
    near.add(name)
    return True
