"""The B+tree against a sorted dict; nodes that are not what they should be."""

import errno
import random
from bisect import bisect_right
from contextlib import suppress

import pytest

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK,
    KEY_SLOTS,
    NODE_MAGIC,
    PAGE,
    PAGE_BODY,
    PAGE_FREE,
    PAGE_HEADER_LAYOUT,
    PAGE_NODE,
    BlockNo,
    Ino,
    PageNo,
)
from pkernfs.fs.btree import Tree
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.named import free_key
from pkernfs.fs.node import INNER_MAX, MAX_LEVEL, Node
from pkernfs.fs.pages import encode_page
from tests.core.support import fails, full, new_fs

OWNER = Ino(77)


class Twin:
    """A tree and a dict with the same items."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.tree = Tree(fs.volume, OWNER, PageNo(0))
        self.items: dict[int, bytes] = {}

    def put(self, key: int, value: bytes) -> None:
        with self.fs.volume.transaction() as tx:
            self.tree.put(tx, key, value)
        self.items[key] = value

    def delete(self, key: int) -> None:
        with self.fs.volume.transaction() as tx:
            self.tree.delete(tx, key)
        del self.items[key]

    def check(self, rng: random.Random) -> None:
        """Every way to read gives the same."""
        self.fs.volume.nodes.clear()
        keys = sorted(self.items)
        assert list(self.tree.scan()) == [(key, self.items[key]) for key in keys]
        for _ in range(5):
            beside = [rng.choice(keys) + rng.choice([-1, 0, 1])] if keys else []
            key = rng.choice([0, (1 << 64) - 1, rng.randrange(1 << 64), *beside])
            key = max(0, min(key, (1 << 64) - 1))
            assert self.tree.get(key) == self.items.get(key)
            at = bisect_right(keys, key)
            floor = self.tree.floor(key)
            assert floor == ((keys[at - 1], self.items[keys[at - 1]]) if at else None)
            last = key + rng.randrange(1 << 60)
            assert [k for k, _ in self.tree.scan(key, last)] == [k for k in keys if key <= k <= last]
        pages = list(self.tree.all_pages())
        assert len(pages) == len(set(pages)) == self.tree.pages
        check_nodes(self.tree)


def check_nodes(tree: Tree) -> None:
    """Bounds, levels, fill."""
    todo: list[tuple[int, int, int]] = [(tree.root, 0, 1 << 64)] if tree.root else []
    while todo:
        page, low, high = todo.pop()
        node = Node.decode(tree.volume.region.read(page * PAGE, PAGE), PageNo(page), OWNER)
        keys = node.keys[1:] if node.level else node.keys
        assert all(low <= key < high for key in keys)
        if node.level:
            bounds = [low, *keys, high]
            todo += list(zip(node.children, bounds, bounds[1:], strict=False))


@pytest.fixture
def twin() -> Twin:
    return Twin(new_fs(64))


SIZES = {"empty": (0, 0), "small": (0, 40), "any": (0, 800), "large": (700, 800)}
SEQUENCES = ["random", "ascending", "descending", "dense"]


def keys_in_order(order: str, count: int, rng: random.Random) -> list[int]:
    if order == "dense":
        return rng.sample(range(count * 2), count)
    keys = sorted(rng.sample(range(1 << 62), count)) if order != "random" else rng.sample(range(1 << 62), count)
    return keys[::-1] if order == "descending" else keys


@pytest.mark.parametrize("order", SEQUENCES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_against_a_dict(twin: Twin, sizes: tuple[int, int], order: str) -> None:
    rng = random.Random(f"{sizes}{order}")
    count = 2000 if sizes[1] < 100 else 600
    for n, key in enumerate(keys_in_order(order, count, rng)):
        twin.put(key, rng.randbytes(rng.randint(*sizes)))
        if n % 100 == 0:
            twin.check(rng)
    twin.check(rng)
    for key in rng.sample(sorted(twin.items), count // 3):
        twin.put(key, rng.randbytes(rng.randint(*sizes)))
    twin.check(rng)
    gone = sorted(twin.items)
    if order == "random":
        rng.shuffle(gone)
    elif order == "descending":
        gone.reverse()
    for n, key in enumerate(gone):
        twin.delete(key)
        if n % 100 == 0:
            twin.check(rng)
    assert (twin.tree.root, twin.tree.pages) == (0, 0)
    assert list(twin.tree.scan()) == []
    assert twin.tree.get(1) is None
    assert twin.tree.floor(1) is None


@pytest.mark.parametrize("seed", range(4))
def test_random_puts_and_deletes(twin: Twin, seed: int) -> None:
    rng = random.Random(seed)
    for n in range(4000):
        # Grows and shrinks in turn.
        if rng.random() < (0.7 if n // 1000 % 2 == 0 else 0.3) or not twin.items:
            twin.put(rng.randrange(1 << rng.choice([8, 12, 63])), rng.randbytes(rng.choice([0, 16, 100, 800])))
        else:
            twin.delete(rng.choice(list(twin.items)))
        if n % 200 == 0:
            twin.check(rng)
    twin.check(rng)


def test_ascending_keys_fill_their_nodes(twin: Twin) -> None:
    for key in range(4000):
        twin.put(key, b"0123456789abcdef")
    per_leaf = PAGE_BODY // 26
    assert twin.tree.pages <= 4000 // per_leaf + 3


def test_deep_trees(twin: Twin) -> None:
    """Three levels: more leaves than an inner node has room for."""
    rng = random.Random(1)
    keys = rng.sample(range(1 << 60), 5 * INNER_MAX)
    with twin.fs.volume.transaction() as tx:
        for key in keys:
            twin.tree.put(tx, key, b"x" * 1000)
            twin.items[key] = b"x" * 1000
    assert Node.decode(twin.fs.region.read(twin.tree.root * PAGE, PAGE), twin.tree.root, OWNER).level == 2
    twin.check(rng)
    with twin.fs.volume.transaction() as tx:
        for key in keys[: 4 * INNER_MAX]:
            twin.tree.delete(tx, key)
            del twin.items[key]
    twin.check(rng)
    with twin.fs.volume.transaction() as tx:
        for key in keys[4 * INNER_MAX :]:
            twin.tree.delete(tx, key)
    assert (twin.tree.root, twin.tree.pages) == (0, 0)


def test_a_missing_key(twin: Twin) -> None:
    for tree_has in (False, True):
        if tree_has:
            twin.put(5, b"")
        with pytest.raises(KeyError), twin.fs.volume.transaction() as tx:
            twin.tree.delete(tx, 6)


def test_slots_for_equal_hashes(twin: Twin) -> None:
    for n in range(KEY_SLOTS):
        assert free_key(twin.tree, 640) == 640 + n
        twin.put(640 + n, b"")
    with fails(errno.ENOSPC):
        free_key(twin.tree, 640)
    twin.delete(650)
    assert free_key(twin.tree, 640) == 650


def test_deleting_needs_no_space(twin: Twin) -> None:
    rng = random.Random(5)
    for _ in range(500):
        twin.put(rng.randrange(1 << 60), rng.randbytes(rng.choice([10, 800])))
    full(twin.fs)
    with suppress(IndexError):
        while True:
            twin.delete(rng.choice(list(twin.items)))
    assert twin.tree.root == 0


def test_an_aborted_change_leaves_the_tree(twin: Twin) -> None:
    rng = random.Random(6)
    for _ in range(300):
        twin.put(rng.randrange(1 << 60), b"x" * 100)
    root, pages = twin.tree.root, twin.tree.pages
    for n in range(20):
        with pytest.raises(ZeroDivisionError), twin.fs.volume.transaction() as tx:  # noqa: PT012  # the transaction ends as a whole
            for _ in range(n * 20):
                twin.tree.put(tx, rng.randrange(1 << 60), b"y" * 100)
            for key in rng.sample(list(twin.items), n * 10):
                with suppress(KeyError):
                    twin.tree.delete(tx, key)
            raise ZeroDivisionError
        twin.tree = Tree(twin.fs.volume, OWNER, root)
        twin.tree.pages = pages
        twin.check(rng)


# -- hostile nodes ----------------------------------------------------------------------------------------------------


def leaf_body(keys: list[int], lengths: list[int], values: bytes = b"") -> bytes:
    return b"".join(k.to_bytes(8, "little") for k in keys) + b"".join(n.to_bytes(2, "little") for n in lengths) + values


HOSTILE = {
    "no-keys": (0, 0, b""),
    "too-many-keys": (407, 0, b""),
    "too-many-children": (255, 1, bytes(range(255)) * 8),
    "too-deep": (1, MAX_LEVEL + 1, bytes(16)),
    "keys-out-of-order": (2, 0, leaf_body([5, 4], [0, 0])),
    "equal-keys": (2, 0, leaf_body([5, 5], [0, 0])),
    "values-beyond-the-end": (1, 0, leaf_body([5], [5000])),
    "values-beyond-the-end-in-sum": (2, 0, leaf_body([5, 6], [2100, 2100])),
}


@pytest.mark.parametrize(("count", "level", "body"), HOSTILE.values(), ids=HOSTILE)
def test_nodes_that_cannot_be(count: int, level: int, body: bytes) -> None:
    raw = encode_page(NODE_MAGIC, 9 * PAGE, OWNER, count, level, body[:PAGE_BODY])
    with pytest.raises(CorruptError, match=f"a tree node of inode {OWNER} at region offset 0x9000 is damaged"):
        Node.decode(raw, PageNo(9), OWNER)


@pytest.mark.parametrize("field", ["magic", "checksum", "offset", "owner"])
def test_headers_that_do_not_fit(field: str) -> None:
    raw = bytearray(encode_page(NODE_MAGIC, 9 * PAGE, OWNER, 1, 0, leaf_body([5], [0])))
    assert list(Node.decode(bytes(raw), PageNo(9), OWNER).keys) == [5]
    raw[PAGE_HEADER_LAYOUT.offsets[field]] ^= 1
    with pytest.raises(CorruptError):
        Node.decode(bytes(raw), PageNo(9), OWNER)


def test_a_node_is_what_it_was_encoded_from() -> None:
    for level in (0, 1, 12):
        node = Node(PageNo(9), OWNER, level, fresh=True)
        node.keys = list(range(100))
        node.values = [] if level else [bytes([n]) * (n % 30) for n in range(100)]
        node.children = list(map(PageNo, range(1000, 1100))) if level else []
        again = Node.decode(node.encode(), PageNo(9), OWNER)
        assert (list(again.keys), again.values, again.children, again.level) == (
            node.keys,
            node.values,
            node.children,
            level,
        )


def plant(twin: Twin, children: list[int], level: int = 1) -> None:
    """Make the root an inner node with these children."""
    if not twin.tree.root:
        twin.put(1, b"")
    node = Node(twin.tree.root, OWNER, level, fresh=True)
    node.keys = [10 * n for n in range(len(children))]
    node.children = list(map(PageNo, children))
    twin.fs.region.store(node.offset, node.encode())
    twin.fs.volume.nodes.clear()


@pytest.mark.parametrize("child", [0, 1, 5, BLOCK // PAGE * 31, 1 << 40, (1 << 64) - 1])
def test_children_that_are_no_pages(twin: Twin, child: Ino) -> None:
    plant(twin, [child, child])
    for operation in (
        lambda _: twin.tree.get(5),
        lambda _: list(twin.tree.scan()),
        lambda _: twin.tree.floor(15),
        lambda tx: twin.tree.put(tx, 5, b""),
        lambda tx: twin.tree.delete(tx, 5),
    ):
        with pytest.raises(CorruptError), twin.fs.volume.transaction() as tx:
            operation(tx)


def test_a_loop_ends(twin: Twin) -> None:
    plant(twin, [1])
    plant(twin, [twin.tree.root] * 2)
    for operation in (lambda: twin.tree.get(5), lambda: list(twin.tree.scan()), lambda: list(twin.tree.all_pages())):
        with pytest.raises(CorruptError):
            operation()


def test_a_page_of_another_kind(twin: Twin) -> None:
    twin.put(1, b"")
    block, index = divmod(twin.tree.root, BLOCK // PAGE)
    slab = twin.fs.volume.space.slab(BlockNo(block))
    assert slab.kinds[index] == PAGE_NODE
    slab.kinds[index] = PAGE_FREE
    twin.fs.volume.nodes.clear()
    with pytest.raises(CorruptError, match="expected a page of kind tree node, found free"):
        twin.tree.get(1)


def test_the_node_of_another_inode(twin: Twin) -> None:
    twin.put(1, b"")
    for clear in (True, False):
        if clear:
            twin.fs.volume.nodes.clear()
        with pytest.raises(CorruptError):
            Tree(twin.fs.volume, Ino(OWNER + 1), twin.tree.root).get(1)
        assert Tree(twin.fs.volume, OWNER, twin.tree.root).get(1) == b""
