"""The extended attributes of an inode."""

from __future__ import annotations

from pkernfs.errors import CorruptError, quoted
from pkernfs.format import PAGE, PAGE_XATTR, Ino, Inode, PageNo, checksum
from pkernfs.fs.xattrs import Attribute, Xattrs
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.check.trees import hashed, is_attribute, items
from pkernfs.fsck.problems import Code


def attributes(check: Check, ino: Ino, inode: Inode) -> None:
    """Each can be read, stands where its name's hash says, and its value has its checksum."""
    if not inode.xattrs:
        return
    xattrs = Xattrs(check.volume, ino, inode)
    names: dict[int, set[bytes]] = {}
    structure = check.structure("xattrs", is_attribute)
    for key, item in items(check, structure, inode.xattrs):
        try:
            attribute = xattrs.decode(key, item)
        except CorruptError as error:
            check.findings.note_error(Code.XATTR, error)
            structure.dropped.append("an attribute that cannot be read")
            continue
        what = f"attribute {quoted(attribute.name)} of inode {ino}"
        good = hashed(check, structure, key, attribute.name, names, what)
        if attribute.head.external and not _external(check, attribute, what):
            good = False
        if good:
            structure.keep(key, item)
        else:
            structure.dropped.append(f"attribute {quoted(attribute.name)}")
    check.close(structure)


def _external(check: Check, attribute: Attribute, what: str) -> bool:
    """Whether the pages and the checksum of a value that stands outside the tree are sound."""
    size, runs = attribute.head.size, attribute.runs
    if any(not run.length for run in runs) or sum(run.length for run in runs) != -(-size // PAGE):
        found = ", ".join(f"{run.page:#x}+{run.length}" for run in runs)
        check.note(Code.XATTR, f"{what}: expected the pages of {size} bytes, found {found or 'none'}")
        return False
    readable = [check.memory.claim(PageNo(run.page), run.length, PAGE_XATTR, what) for run in runs]
    if not all(readable):
        return False
    value = b"".join(check.region.read(run.page * PAGE, run.length * PAGE) for run in runs)[:size]
    if checksum(value) != attribute.head.checksum:
        found = f"expected checksum {attribute.head.checksum:#010x}, found {checksum(value):#010x}"
        check.note(Code.XATTR_VALUE, f"{what}: {found}", offset=runs[0].page * PAGE)
        return False
    return True
