"""The extended attributes of an inode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkernfs.errors import CorruptError
from pkernfs.format import PAGE, PAGE_XATTR, Inode, checksum
from pkernfs.fs.xattrs import Attribute, Xattrs
from pkernfs.fsck.check.trees import hashed, is_attribute, items, keep

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker


def attributes(checker: Checker, ino: int, inode: Inode) -> None:
    """Each can be read, stands where its name's hash says, and its value has its checksum."""
    if not inode.xattrs:
        return
    xattrs = Xattrs(checker.volume, ino, inode)
    names: dict[int, set[bytes]] = {}
    kept: list[tuple[int, bytes]] = []
    dropped: list[str] = []
    for key, item in items(checker, inode.xattrs, is_attribute):
        try:
            attribute = xattrs._attribute(key, item)
        except CorruptError as error:
            checker.note("xattr", f"{error.what}: {error.found}", offset=error.offset)
            dropped.append("an attribute that cannot be read")
            continue
        what = f"attribute {attribute.name!r} of inode {ino:#x}"
        good = hashed(checker, key, attribute.name, names, what)
        if attribute.head.external and not _external(checker, attribute, what):
            good = False
        if not good:
            dropped.append(f"attribute {attribute.name!r}")
        elif checker.ledger.salvage:
            kept.append((key, item))
    keep(checker, ino, "xattrs", kept, dropped)


def _external(checker: Checker, attribute: Attribute, what: str) -> bool:
    """Whether the pages and the checksum of a value that stands outside the tree are sound."""
    size, runs = attribute.head.size, attribute.runs
    if any(not run.length for run in runs) or sum(run.length for run in runs) != -(-size // PAGE):
        checker.note("xattr", f"{what}: expected the pages of {size} bytes, found {runs}")
        return False
    readable = [checker.ledger.claim(run.page, run.length, PAGE_XATTR, what) for run in runs]
    if not all(readable):
        return False
    value = b"".join(checker.region.read(run.page * PAGE, run.length * PAGE) for run in runs)[:size]
    if checksum(value) != attribute.head.checksum:
        found = f"expected checksum {attribute.head.checksum:#010x}, found {checksum(value):#010x}"
        checker.note("xattr-value", f"{what}: {found}", offset=runs[0].page * PAGE)
        return False
    return True
