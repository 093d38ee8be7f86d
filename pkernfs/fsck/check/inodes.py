"""The fields of one inode, and the counts of names."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from pkernfs.format import (
    FIRST_FREE_SLOT,
    FLAG_DIR,
    FLAG_FILE,
    FLAG_IOMMU_DIR,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    FLAG_IOMMU_ROOT_PGTABLES,
    GUARDED,
    INLINE_SIZE,
    IOMMU_INO,
    ORPHANS_INO,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    Inode,
)
from pkernfs.fs.pages import SIZE_LIMITS, has_extents

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker

TYPES = {*SIZE_LIMITS, stat.S_IFDIR}

#: inode -> (type, flags) of the slots that mkfs fills
RESERVED: dict[int, tuple[int, int]] = {
    ROOT_INO: (stat.S_IFDIR, FLAG_DIR),
    ORPHANS_INO: (stat.S_IFREG, FLAG_FILE),
    IOMMU_INO: (stat.S_IFDIR, FLAG_DIR | FLAG_IOMMU_DIR),
    ROOT_PGTABLES_INO: (stat.S_IFREG, FLAG_FILE | FLAG_IOMMU_ROOT_PGTABLES),
}
#: inode -> its one name: directory, name
PLACES: dict[int, tuple[int, bytes]] = {
    IOMMU_INO: (ROOT_INO, b"iommu"),
    ROOT_PGTABLES_INO: (IOMMU_INO, b"root-pgtables"),
}
_INO_AT = {place: ino for ino, place in PLACES.items()}


def type_flags(mode: int) -> int:
    """Those of the flags that say the type."""
    return FLAG_FILE * stat.S_ISREG(mode) | FLAG_DIR * stat.S_ISDIR(mode)


def plausible(ino: int, inode: Inode) -> bool:
    """Whether a slot with a wrong checksum holds an inode all the same: its flags agree with its type.

    All else is compared with what the inode leads to.
    """
    kind = stat.S_IFMT(inode.mode)
    if ino < FIRST_FREE_SLOT:
        return RESERVED.get(ino) == (kind, inode.flags)
    return kind in TYPES and inode.flags & (FLAG_FILE | FLAG_DIR) == type_flags(kind)


def may_be_named(ino: int) -> bool:
    """Whether a name may lead to the inode: not to a reserved slot without use, and not to the list of orphans."""
    return ino >= FIRST_FREE_SLOT or (ino in RESERVED and ino != ORPHANS_INO)


def in_its_place(ino: int, parent: int, name: bytes) -> bool:
    """Whether the name may lead to the inode: those of iommu/ have one, and nothing else has it."""
    place = (parent, name)
    return PLACES.get(ino, place) == place and _INO_AT.get(place, ino) == ino


def may_stand_in(parent: int, ino: int, inode: Inode) -> bool:
    """Whether a directory may name the inode: iommu/ names domains, and no other directory does."""
    is_domain = inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES and stat.S_ISREG(inode.mode)
    return ino < FIRST_FREE_SLOT or (parent == IOMMU_INO) == bool(is_domain)


def mode(checker: Checker, ino: int, inode: Inode) -> None:
    """A type and permissions, and nothing else."""
    if stat.S_IFMT(inode.mode) not in TYPES:
        checker.bad[ino] = "of no type"
    elif inode.mode >> 16:
        checker.correct(ino, mode=inode.mode & 0xFFFF)
    else:
        return
    checker.note("inode-mode", f"inode {ino:#x}: expected a type and permissions, found mode {inode.mode:o}")


def flags(checker: Checker, ino: int, inode: Inode) -> None:
    """The flags say what the type says."""
    wanted = type_flags(inode.mode)
    if ino not in checker.bad and inode.flags & (FLAG_FILE | FLAG_DIR) != wanted:
        checker.note(
            "inode-flags", f"inode {ino:#x}: expected the flags of mode {inode.mode:o}, found {inode.flags:#x}"
        )
        right = inode.flags & ~(FLAG_FILE | FLAG_DIR) | wanted
        checker.correct(ino, flags=RESERVED[ino][1] if ino in RESERVED else right)

    elif ino not in checker.bad and ino >= FIRST_FREE_SLOT and not may_hold_tables(inode):
        checker.note("inode-flags", f"inode {ino:#x}: expected no flags of page tables, found {inode.flags:#x}")
        checker.correct(ino, flags=inode.flags & ~GUARDED, iommu=0)


def may_hold_tables(inode: Inode) -> bool:
    """Whether the flags of an inode that is not reserved say of tables what its type allows."""
    return not inode.flags & (GUARDED if not stat.S_ISREG(inode.mode) else FLAG_IOMMU_ROOT_PGTABLES)


def parent(checker: Checker, ino: int, inode: Inode) -> None:
    """Only directories have a parent; theirs is compared where they are named."""
    if inode.parent and not stat.S_ISDIR(inode.mode):
        checker.note("inode-parent", f"inode {ino:#x}: expected no parent, found {inode.parent:#x}")
        checker.correct(ino, parent=0)


def size(checker: Checker, ino: int, inode: Inode) -> None:
    """A size that the type allows."""
    limit = SIZE_LIMITS.get(stat.S_IFMT(inode.mode), 0)
    if inode.size > limit and not stat.S_ISDIR(inode.mode):
        checker.note("inode-size", f"inode {ino:#x}: expected at most {limit} bytes, found {inode.size}")
        checker.correct(ino, size=limit)


def symlink(checker: Checker, ino: int, inode: Inode) -> None:
    """A short target stands in the inode, and nothing behind it."""
    if not stat.S_ISLNK(inode.mode) or has_extents(inode):
        return
    if inode.root or inode.inline[inode.size :].strip(b"\0"):
        checker.note("symlink", f"inode {ino:#x}: expected a target of {inode.size} bytes, found {inode.inline!r}")
        checker.correct(ino, root=0, inline=inode.inline[: inode.size] + bytes(INLINE_SIZE - inode.size))


def no_pins(checker: Checker, ino: int, inode: Inode) -> None:
    """Only regular files are mapped."""
    if inode.iommu and not stat.S_ISREG(inode.mode):
        checker.note("iommu-pins", f"inode {ino:#x}: expected no pins for mode {inode.mode:o}, found {inode.iommu:#x}")
        checker.correct(ino, iommu=0)


def no_content(checker: Checker, ino: int, inode: Inode) -> None:
    """Devices, FIFOs and sockets have no content."""
    kind = stat.S_IFMT(inode.mode)
    if not SIZE_LIMITS.get(kind) and kind != stat.S_IFDIR and (inode.root or inode.inline.strip(b"\0")):
        checker.note("inode-content", f"inode {ino:#x}: expected no content for mode {inode.mode:o}, found some")
        checker.correct(ino, root=0, inline=bytes(INLINE_SIZE))


def pages(checker: Checker, ino: int, inode: Inode) -> None:
    """The inode counts the pages that it holds."""
    tally = checker.ledger.tally
    if tally.sound and tally.pages != inode.pages:
        checker.note("inode-pages", f"inode {ino:#x}: expected {tally.pages} pages, found a count of {inode.pages}")
        checker.correct(ino, pages=tally.pages)


def link_counts(checker: Checker) -> None:
    """Files have as many names as they say (directories were compared in the walk)."""
    for ino, left in checker.names_left.items():
        if left < 0 or (left and not checker.ledger.incomplete):
            inode = checker.inode(ino)
            links = inode.nlink if inode else 0
            checker.note("link-count", f"inode {ino:#x}: expected nlink {links - left}, found {links}", ino=ino)
            checker.correct(ino, nlink=links - left)
