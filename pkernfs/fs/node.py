"""A node of a B+tree: one page, decoded."""

from __future__ import annotations

import struct
from array import array
from collections.abc import MutableSequence
from functools import cache

from pkernfs.errors import CorruptError
from pkernfs.format import NODE_MAGIC, PAGE, PAGE_BODY, PAGE_HEADER_LAYOUT, Ino, PageNo
from pkernfs.fs.pages import check_page, encode_page

MAX_LEVEL = 12
LEAF_ITEM = 10  #: bytes of a key and a value's length
INNER_ITEM = 16  #: bytes of a key and a child
INNER_MAX = PAGE_BODY // INNER_ITEM
BODY_AT = PAGE_HEADER_LAYOUT.size


@cache
def _lengths(n: int) -> struct.Struct:
    return struct.Struct(f"<{n}H")


class Node:
    """One node.  A leaf (level 0) has ``values``, an inner node ``children`` (page numbers), each beside ``keys``."""

    __slots__ = ("children", "end", "fresh", "keys", "level", "low", "offset", "owner", "used", "values")

    def __init__(self, page: PageNo, owner: Ino, level: int, *, fresh: bool) -> None:
        self.offset = page * PAGE
        self.owner = owner
        self.level = level
        self.fresh = fresh
        self.keys: MutableSequence[int] = array("Q")
        self.values: list[bytes] = []
        self.children: list[PageNo] = []
        self.used = 0  #: bytes of the body that a leaf's items take
        self.low = self.end = 0  #: bounds [low, end) of its keys, as it was last reached from the root

    @property
    def page(self) -> PageNo:
        """Page number."""
        return PageNo(self.offset // PAGE)

    def encode(self) -> bytes:
        """The page as it goes to the region."""
        n = len(self.keys)
        keys = array("Q", self.keys).tobytes()
        if self.level:
            body = [array("Q", self.children).tobytes()]
        else:
            body = [_lengths(n).pack(*map(len, self.values)), *self.values]
        return encode_page(NODE_MAGIC, self.offset, self.owner, n, self.level, keys, *body)

    @classmethod
    def decode(cls, raw: bytes, page: PageNo, owner: Ino, *, verify: bool = True) -> Node:
        """Check and decode; without ``verify`` whatever the checksum and the order of keys.  Raises CorruptError."""
        what = f"a tree node of inode {owner}"
        header = check_page(raw, NODE_MAGIC, page * PAGE, owner, what, ino=owner, verify=verify)
        node = cls(page, owner, header.level, fresh=False)
        n = header.keys
        if not n or header.level > MAX_LEVEL or n * (INNER_ITEM if header.level else LEAF_ITEM) > PAGE_BODY:
            raise CorruptError(what, page * PAGE, f"{n} keys at level {header.level}", ino=owner)
        node.keys = array("Q", raw[BODY_AT : BODY_AT + 8 * n])
        if verify and any(a >= b for a, b in zip(node.keys, node.keys[1:], strict=False)):
            raise CorruptError(what, page * PAGE, "keys out of order", ino=owner)
        at = BODY_AT + 8 * n
        if header.level:
            node.children = list(struct.unpack_from(f"<{n}Q", raw, at))
            return node
        lengths = _lengths(n).unpack_from(raw, at)
        at += 2 * n
        node.used = n * LEAF_ITEM + sum(lengths)
        if node.used > PAGE_BODY:
            raise CorruptError(what, page * PAGE, "values beyond its end", ino=owner)
        for length in lengths:
            node.values.append(raw[at : at + length])
            at += length
        return node
