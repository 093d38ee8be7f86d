"""The fields of one inode, and the counts of names."""

from __future__ import annotations

import stat

from pkernfs.errors import file_type, mode_text, quoted
from pkernfs.format import FIRST_FREE_SLOT, FLAG_DIR, FLAG_FILE, GUARDED, INLINE_SIZE, Ino, Inode
from pkernfs.fs.damage import NO_PAGE
from pkernfs.fs.pages import SIZE_LIMITS, has_extents
from pkernfs.fsck.check.rules import RESERVED, TYPES, has_type, may_hold_tables, type_flags
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import NO_INO, Fields, Unusable, Values
from pkernfs.fsck.problems import Code


def mode(check: Check, ino: Ino, inode: Inode) -> None:
    """A type and permissions, and nothing else."""
    data: Unusable | Fields
    if stat.S_IFMT(inode.mode) not in TYPES:
        data = Unusable(ino, "of no type")
    elif inode.mode >> 16:
        data = Fields(ino, {"mode": inode.mode & 0xFFFF})
    else:
        return
    text = f"inode {ino}: expected a type and permissions, found {mode_text(inode.mode)}"
    check.note(Code.INODE_MODE, text, data=data)


def flags(check: Check, ino: Ino, inode: Inode) -> None:
    """The flags say what the type says; of an inode that cannot be kept nothing is asked."""
    wanted = type_flags(inode.mode)
    if inode.flags & (FLAG_FILE | FLAG_DIR) != wanted:
        right = RESERVED[ino][1] if ino in RESERVED else inode.flags & ~(FLAG_FILE | FLAG_DIR) | wanted
        values: Values = {"flags": right}
        text = f"expected the flags of {file_type(inode.mode)}"
    elif ino >= FIRST_FREE_SLOT and not may_hold_tables(inode):
        values = {"flags": inode.flags & ~GUARDED, "iommu": 0}
        text = "expected no flags of page tables"
    else:
        return
    if has_type(ino, inode):
        check.reached.wrong_flags.add(ino)
        check.note(Code.INODE_FLAGS, f"inode {ino}: {text}, found {inode.flags:#x}", data=Fields(ino, values))


def parent(check: Check, ino: Ino, inode: Inode) -> None:
    """Only directories have a parent; theirs is compared where they are named."""
    if inode.parent and not stat.S_ISDIR(inode.mode):
        text = f"inode {ino}: expected no parent, found {inode.parent}"
        check.note(Code.INODE_PARENT, text, data=Fields(ino, {"parent": NO_INO}))


def size(check: Check, ino: Ino, inode: Inode) -> None:
    """A size that the type allows."""
    limit = SIZE_LIMITS.get(stat.S_IFMT(inode.mode), 0)
    if inode.size > limit and not stat.S_ISDIR(inode.mode):
        text = f"inode {ino}: expected at most {limit} bytes, found {inode.size}"
        check.note(Code.INODE_SIZE, text, data=Fields(ino, {"size": limit}))


def symlink(check: Check, ino: Ino, inode: Inode) -> None:
    """A short target stands in the inode, and nothing behind it."""
    if not stat.S_ISLNK(inode.mode) or has_extents(inode):
        return
    if inode.root or inode.inline[inode.size :].strip(b"\0"):
        found = quoted(inode.inline.rstrip(b"\0"))
        text = f"inode {ino}: expected a target of {inode.size} bytes, found {found}"
        inline = inode.inline[: inode.size] + bytes(INLINE_SIZE - inode.size)
        check.note(Code.SYMLINK, text, data=Fields(ino, {"root": NO_PAGE, "inline": inline}))


def no_pins(check: Check, ino: Ino, inode: Inode) -> None:
    """Only regular files are mapped."""
    if inode.iommu and not stat.S_ISREG(inode.mode):
        text = f"inode {ino}: expected no pins for {file_type(inode.mode)}, found {inode.iommu}"
        check.note(Code.IOMMU_PINS, text, data=Fields(ino, {"iommu": 0}))


def no_content(check: Check, ino: Ino, inode: Inode) -> None:
    """Devices, FIFOs and sockets have no content."""
    kind = stat.S_IFMT(inode.mode)
    if not SIZE_LIMITS.get(kind) and kind != stat.S_IFDIR and (inode.root or inode.inline.strip(b"\0")):
        text = f"inode {ino}: expected no content for {file_type(inode.mode)}, found some"
        check.note(Code.INODE_CONTENT, text, data=Fields(ino, {"root": NO_PAGE, "inline": bytes(INLINE_SIZE)}))


def pages(check: Check, ino: Ino, inode: Inode) -> None:
    """The inode counts the pages that it holds."""
    tally = check.findings.tally
    if tally.sound and tally.pages != inode.pages:
        text = f"inode {ino}: expected {tally.pages} pages, found a count of {inode.pages}"
        check.note(Code.INODE_PAGES, text, data=Fields(ino, {"pages": tally.pages}))


def link_counts(check: Check) -> None:
    """Files have as many names as they say (directories were compared in the walk)."""
    for ino, left in check.reached.names_left.items():
        if left < 0 or (left and not check.findings.incomplete):
            inode = check.inode(ino)
            links = inode.nlink if inode else 0
            text = f"inode {ino}: expected nlink {links - left}, found {links}"
            check.note(Code.LINK_COUNT, text, ino=ino, data=Fields(ino, {"nlink": links - left}))
