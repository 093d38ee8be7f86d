"""B+trees of 4 KiB nodes: u64 keys, values of up to 1000 bytes.  The one ordered map of the format.

A Tree is a short-lived handle: (volume, owner inode, root page).  After changes the caller stores ``tree.root`` and
``tree.pages`` in its inode, within the same transaction.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from pkernfs.errors import CorruptError
from pkernfs.format import PAGE, PAGE_BODY, PAGE_NODE, Ino, PageNo
from pkernfs.fs.damage import NO_PAGE
from pkernfs.fs.node import INNER_ITEM, INNER_MAX, LEAF_ITEM, Node
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume

KEY_END = 1 << 64


class Tree:
    """A handle on the tree of ``owner`` whose root is page ``root`` (0: empty).

    ``pages`` counts the nodes that changes through this handle added (or, negative, gave back).
    """

    def __init__(self, volume: Volume, owner: Ino, root: PageNo) -> None:
        self.volume = volume
        self.owner = owner
        self.root = root
        self.pages = 0

    # -- reading --------------------------------------------------------------------------------------------------

    def _bad(self, page: PageNo, found: str) -> CorruptError:
        return CorruptError(f"a tree node of inode {self.owner}", page * PAGE, found, ino=self.owner)

    def _node(self, page: PageNo, level: int | None = None) -> Node:
        node = self.volume.nodes.get(page * PAGE)
        if node is None:
            self.volume.cache.trim()
            self.volume.space.check_page_kind(page, PAGE_NODE, f"a tree node of inode {self.owner}", self.owner)
            node = Node.decode(self.volume.region.read(page * PAGE, PAGE), page, self.owner)
            self.volume.nodes[page * PAGE] = node
        if node.owner != self.owner or (level is not None and node.level != level):
            raise self._bad(page, f"owner {node.owner}, level {node.level}, wanted {level}")
        return node

    def _root(self) -> Node:
        node = self._node(self.root)
        node.low, node.end = 0, KEY_END
        return node

    def _child(self, parent: Node, index: int) -> Node:
        """A child of a node that was reached from the root.  Raises CorruptError when its keys are out of bounds.

        So every leaf that a walk comes to is the one that _path finds for its keys, and walks end: no leaf can be
        reached in two ways.
        """
        node = self._node(parent.children[index], parent.level - 1)
        low = node.low = parent.keys[index] if index else parent.low
        end = node.end = parent.keys[index + 1] if index + 1 < len(parent.keys) else parent.end
        keys = node.keys
        first = 1 if node.level else 0  # the first key of an inner node is not looked at
        if len(keys) > first and not low <= keys[first] <= keys[-1] < end:
            raise self._bad(
                node.page, f"keys {keys[first]:#x} to {keys[-1]:#x}, expected some from {low:#x} to {end - 1:#x}"
            )
        return node

    def _path(self, key: int) -> list[tuple[Node, int]]:
        """From the root to the leaf where ``key`` belongs: each inner node with the index of the child taken."""
        path = []
        node = self._root()
        while node.level:
            index = max(bisect_right(node.keys, key) - 1, 0)
            path.append((node, index))
            node = self._child(node, index)
        path.append((node, -1))
        return path

    def _leaf(self, key: int) -> Node:
        """The leaf where ``key`` belongs."""
        node = self._root()
        while node.level:
            node = self._child(node, max(bisect_right(node.keys, key) - 1, 0))
        return node

    def get(self, key: int) -> bytes | None:
        """The value of ``key``, or None."""
        if not self.root:
            return None
        leaf = self._leaf(key)
        index = bisect_left(leaf.keys, key)
        return leaf.values[index] if index < len(leaf.keys) and leaf.keys[index] == key else None

    def scan(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(key, value) in order, from key ``first`` up to and with ``last``.  The tree must not change meanwhile."""
        if not self.root:
            return
        path = self._path(first)
        leaf = path.pop()[0]
        index = bisect_left(leaf.keys, first)
        while True:
            for at in range(index, len(leaf.keys)):
                key = leaf.keys[at]
                if last is not None and key > last:
                    return
                yield key, leaf.values[at]
            while path:
                parent, taken = path.pop()
                if taken + 1 < len(parent.children):
                    path.append((parent, taken + 1))
                    break
            else:
                return
            parent, taken = path[-1]
            node = self._child(parent, taken)
            while node.level:
                path.append((node, 0))
                node = self._child(node, 0)
            leaf, index = node, 0

    def between(self, first: int, last: int) -> list[tuple[int, bytes]]:
        """What ``scan`` yields, for a range that is nearly always within one leaf."""
        if not self.root:
            return []
        leaf = self._leaf(first)
        if last >= leaf.end:
            return list(self.scan(first, last))
        low, high = bisect_left(leaf.keys, first), bisect_right(leaf.keys, last)
        return list(zip(leaf.keys[low:high], leaf.values[low:high], strict=True)) if low < high else []

    def floor(self, key: int) -> tuple[int, bytes] | None:
        """The item with the largest key up to ``key``, or None."""
        if not self.root:
            return None
        path = self._path(key)
        leaf = path.pop()[0]
        index = bisect_right(leaf.keys, key) - 1
        if index >= 0:
            return leaf.keys[index], leaf.values[index]
        while path:
            parent, taken = path.pop()
            if taken:
                node = self._child(parent, taken - 1)
                while node.level:
                    node = self._child(node, len(node.children) - 1)
                return node.keys[-1], node.values[-1]
        return None

    def all_pages(self) -> Iterator[PageNo]:
        """The page numbers of all nodes, the root first."""
        if not self.root:
            return
        todo = [self._root()]
        while todo:
            node = todo.pop()
            yield node.page
            todo += [self._child(node, index) for index in range(len(node.children))]

    # -- changing -------------------------------------------------------------------------------------------------

    def new_node(self, tx: Transaction, level: int) -> Node:
        """A node in a page of its own."""
        page = self.volume.allocator.alloc_page(tx, PAGE_NODE)
        node = Node(page, self.owner, level, fresh=True)
        self.volume.nodes[node.offset] = node
        tx.change(node)
        self.pages += 1
        return node

    def _drop(self, tx: Transaction, node: Node) -> None:
        self.volume.nodes.pop(node.offset, None)
        tx.pages.pop(node.offset, None)
        tx.free_pages(node.page)
        self.pages -= 1

    def put(self, tx: Transaction, key: int, value: bytes) -> None:
        """Insert, or replace the value of ``key``.  Raises FsError(ENOSPC)."""
        if not self.root:
            leaf = self.new_node(tx, 0)
            self.root = leaf.page
            path = [(leaf, -1)]
        else:
            path = self._path(key)
        leaf = path.pop()[0]
        tx.change(leaf)
        keys = leaf.keys
        index = bisect_left(keys, key)
        if index < len(keys) and keys[index] == key:
            leaf.used += len(value) - len(leaf.values[index])
            leaf.values[index] = value
        else:
            keys.insert(index, key)
            leaf.values.insert(index, value)
            leaf.used += LEAF_ITEM + len(value)
        if leaf.used > PAGE_BODY:
            self._split_leaf(tx, leaf, index, path)

    def _split_leaf(self, tx: Transaction, leaf: Node, index: int, path: list[tuple[Node, int]]) -> None:
        # An item appended at the end goes to a node of its own, so that ascending keys fill their nodes.
        cut = index
        if index != len(leaf.keys) - 1:
            cut, half = 0, 0
            while half < leaf.used // 2:
                half += LEAF_ITEM + len(leaf.values[cut])
                cut += 1
        right = self.new_node(tx, 0)
        right.keys, right.values = leaf.keys[cut:], leaf.values[cut:]
        del leaf.keys[cut:], leaf.values[cut:]
        right.used = len(right.keys) * LEAF_ITEM + sum(map(len, right.values))
        leaf.used -= right.used
        self._add_child(tx, leaf, right, path)

    def _add_child(self, tx: Transaction, left: Node, right: Node, path: list[tuple[Node, int]]) -> None:
        if not path:
            root = self.new_node(tx, left.level + 1)
            root.keys = array("Q", [left.keys[0], right.keys[0]])
            root.children = [left.page, right.page]
            self.root = root.page
            return
        parent, taken = path.pop()
        tx.change(parent)
        if not taken:
            # The first key is not looked at and may have become too large; next to a second one it must not.
            parent.keys[0] = min(parent.keys[0], left.keys[0])
        parent.keys.insert(taken + 1, right.keys[0])
        parent.children.insert(taken + 1, right.page)
        if len(parent.keys) > INNER_MAX:
            cut = len(parent.keys) // 2 if taken + 2 < len(parent.keys) else len(parent.keys) - 1
            sibling = self.new_node(tx, parent.level)
            sibling.keys, sibling.children = parent.keys[cut:], parent.children[cut:]
            del parent.keys[cut:], parent.children[cut:]
            self._add_child(tx, parent, sibling, path)

    def delete(self, tx: Transaction, key: int) -> None:
        """Remove ``key``, which must be there (KeyError).  Never allocates."""
        path = self._path(key) if self.root else []
        leaf = path.pop()[0] if path else None
        index = bisect_left(leaf.keys, key) if leaf else 0
        if leaf is None or index == len(leaf.keys) or leaf.keys[index] != key:
            raise KeyError(key)
        tx.change(leaf)
        leaf.used -= LEAF_ITEM + len(leaf.values[index])
        del leaf.keys[index], leaf.values[index]
        self._shrink(tx, leaf, path)

    def _shrink(self, tx: Transaction, node: Node, path: list[tuple[Node, int]]) -> None:
        """Drop an empty node, merge a nearly empty one with a neighbour, take away roots with one child."""
        if not path:
            if not node.keys:
                self._drop(tx, node)
                self.root = NO_PAGE
            while self.root and node.level and len(node.children) == 1:
                self._drop(tx, node)
                node = self._node(node.children[0], node.level - 1)
                self.root = node.page
            return
        parent, taken = path.pop()
        if not node.keys:
            tx.change(parent)
            del parent.keys[taken], parent.children[taken]
            self._drop(tx, node)
        else:
            for left_at in (taken - 1, taken):
                if 0 <= left_at < len(parent.children) - 1 and self._merge(tx, parent, left_at, node):
                    break
            else:
                return
        self._shrink(tx, parent, path)

    def _merge(self, tx: Transaction, parent: Node, left_at: int, shrunk: Node) -> bool:
        """Merge the children ``left_at`` and ``left_at + 1``, of which ``shrunk`` is one, when they hold little.

        That is when ``shrunk`` is less than a quarter full and both fit in three quarters of a node.
        """
        size = len(shrunk.keys) * INNER_ITEM if shrunk.level else shrunk.used
        if size > PAGE_BODY // 4:
            return False
        left = self._child(parent, left_at)
        right = self._child(parent, left_at + 1)
        both = (len(left.keys) + len(right.keys)) * INNER_ITEM if left.level else left.used + right.used
        if both > PAGE_BODY * 3 // 4:  # nearly full at once, it would soon be split again
            return False
        tx.change(parent)
        tx.change(left)
        left.keys += right.keys
        left.values += right.values
        left.children += right.children
        left.used += right.used
        if left.level:
            # The first key of an inner node may be larger than its least: what separates the two is the parent's key.
            left.keys[len(left.keys) - len(right.keys)] = parent.keys[left_at + 1]
        del parent.keys[left_at + 1], parent.children[left_at + 1]
        self._drop(tx, right)
        return True
