"""Extended attributes: small values in a tree, larger ones (up to 64 KiB) in pages of their own."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError, quoted
from pkernfs.format import (
    EXTENT_VALUE,
    NAME_MAX,
    PAGE,
    PAGE_XATTR,
    XATTR_HEAD,
    XATTR_INLINE,
    XATTR_SIZE_MAX,
    ExtentValue,
    Ino,
    Inode,
    PageNo,
    XattrHead,
    checksum,
)
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.named import NamedTree
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume


class Attribute(NamedTuple):
    """One attribute as it stands in the tree."""

    key: int
    name: bytes
    head: XattrHead
    payload: bytes  #: the value, or its runs of pages

    @property
    def runs(self) -> list[ExtentValue]:
        """The runs of pages of an external value, as they stand there; else none."""
        step = EXTENT_VALUE.size
        return [EXTENT_VALUE.unpack(self.payload, at) for at in range(0, len(self.payload) * self.head.external, step)]


class Xattrs:
    """The extended attributes of inode ``ino``.  ``finish`` gives the changed inode."""

    def __init__(self, volume: Volume, ino: Ino, inode: Inode) -> None:
        self.volume = volume
        self.ino = ino
        self.inode = inode
        self.tree = NamedTree(volume, ino, inode.xattrs)
        self.value_pages = 0  #: added minus given back

    def _bad(self, found: str) -> CorruptError:
        return corrupt_inode(self.ino, found, f"the attributes of inode {self.ino}")

    def decode(self, key: int, item: bytes) -> Attribute:
        """An item of the tree as the attribute that it should be.  Raises CorruptError."""
        if len(item) < XATTR_HEAD.size:
            raise self._bad(f"an item of {len(item)} bytes")
        head = XATTR_HEAD.unpack(item)
        end = XATTR_HEAD.size + head.name_length
        name, payload = item[XATTR_HEAD.size : end], item[end:]
        size_ok = len(payload) % EXTENT_VALUE.size == 0 if head.external else len(payload) == head.size
        name_ok = len(name) == head.name_length and name and b"\0" not in name
        if not name_ok or head.external > 1 or head.size > XATTR_SIZE_MAX or not size_ok:
            raise self._bad(f"an item with a name of {len(name)} bytes, a value of {head.size} bytes in {len(payload)}")
        return Attribute(key, name, head, payload)

    def runs(self, attribute: Attribute) -> list[ExtentValue]:
        """The runs of pages of an external value.  Raises CorruptError when they cannot be."""
        if not attribute.head.external:
            return []
        runs = attribute.runs
        total = self.volume.total_pages
        if any(not 0 < r.length <= 17 or r.page + r.length > total for r in runs) or (
            sum(r.length for r in runs) != -(-attribute.head.size // PAGE)
        ):
            raise self._bad(f"a value of {attribute.head.size} bytes in {sum(r.length for r in runs)} pages")
        for run in runs:
            for page in range(run.page, run.page + run.length):
                self.volume.space.check_page_kind(
                    PageNo(page), PAGE_XATTR, f"an attribute of inode {self.ino}", self.ino
                )
        return runs

    def find(self, name: bytes) -> Attribute | None:
        """The attribute with this name, or None."""
        if not self.tree.root:
            return None
        for key, item in self.tree.items_for(name):
            attribute = self.decode(key, item)
            if attribute.name == name:
                return attribute
        return None

    def all(self) -> Iterator[Attribute]:
        """All attributes."""
        for key, item in self.tree.scan():
            yield self.decode(key, item)

    def value(self, attribute: Attribute) -> bytes:
        """The value.  Raises CorruptError when its checksum does not fit."""
        if not attribute.head.external:
            return attribute.payload
        region = self.volume.region
        raw = b"".join(region.read(run.page * PAGE, run.length * PAGE) for run in self.runs(attribute))
        value = raw[: attribute.head.size]
        if checksum(value) != attribute.head.checksum:
            raise self._bad(f"the value of {quoted(attribute.name)} has checksum {checksum(value):#x}")
        return value

    def set(self, tx: Transaction, name: bytes, value: bytes) -> None:
        """Create or replace.  Raises FsError: ERANGE (name), E2BIG (value), ENOSPC."""
        if not 0 < len(name) <= NAME_MAX:
            raise FsError(errno.ERANGE, f"expected an attribute name of 1 to {NAME_MAX} bytes, found {len(name)}")
        if len(value) > XATTR_SIZE_MAX:
            raise FsError(
                errno.E2BIG, f"expected an attribute value of at most {XATTR_SIZE_MAX} bytes, found {len(value)}"
            )
        old = self.find(name)
        if old:
            self._free_value(tx, old)
            key = old.key
        else:
            key = self.tree.free_key(name)
        if len(value) <= XATTR_INLINE:
            item = XATTR_HEAD.pack(XattrHead(len(name), 0, 0, len(value), 0, 0)) + name + value
        else:
            pages = -(-len(value) // PAGE)
            at = 0
            runs = b""
            for page, count in self.volume.allocator.alloc_pages(tx, pages, PAGE_XATTR):
                part = value[at : at + count * PAGE]
                self.volume.region.store(page * PAGE, part + bytes(-len(part) % 8))
                runs += EXTENT_VALUE.pack(ExtentValue(page, count))
                at += count * PAGE
            item = XATTR_HEAD.pack(XattrHead(len(name), 1, 0, len(value), checksum(value), 0)) + name + runs
            self.value_pages += pages
        self.tree.put(tx, key, item)

    def remove(self, tx: Transaction, attribute: Attribute) -> None:
        """Remove an attribute that was found.  Never allocates."""
        self._free_value(tx, attribute)
        self.tree.delete(tx, attribute.key)

    def _free_value(self, tx: Transaction, attribute: Attribute) -> None:
        for run in self.runs(attribute):
            tx.free_pages(run.page, run.length)
            self.value_pages -= run.length

    def some(self, most: int) -> list[Attribute]:
        """The first ``most`` attributes."""
        return list(islice(self.all(), most))

    def finish(self, now: int) -> Inode:
        """The inode with the changes."""
        return self.inode._replace(
            xattrs=self.tree.root, pages=self.inode.pages + self.tree.pages + self.value_pages, ctime=now
        )
