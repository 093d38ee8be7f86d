"""Directories, their names, and the inodes that these lead to."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from pkernfs.errors import CorruptError
from pkernfs.format import (
    DIRENT,
    FIRST_FREE_SLOT,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    IOMMU_INO,
    ORPHANS_INO,
    ROOT_INO,
    Dirent,
    Inode,
)
from pkernfs.fs.directory import Directory, Entry
from pkernfs.fsck.check.inodes import in_its_place, may_be_named, may_stand_in
from pkernfs.fsck.check.quotas import project
from pkernfs.fsck.check.trees import hashed, is_entry, items, keep

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker


def names(checker: Checker) -> None:
    """Everything below the root, and what it holds."""
    checker.mark(ORPHANS_INO)
    checker.mark(ROOT_INO)
    root = checker.inode(ROOT_INO)
    if root and root.parent != ROOT_INO:
        checker.note("directory-parent", f"the root: expected itself as parent, found {root.parent}", ino=ROOT_INO)
        checker.correct(ROOT_INO, parent=ROOT_INO)
    checker.walk(ROOT_INO)


def entries(checker: Checker, ino: int, inode: Inode) -> None:
    """Each can be read, stands where its name's hash says, once, and leads to an inode of its type."""
    if not stat.S_ISDIR(inode.mode):
        return
    directory = Directory(checker.volume, ino, inode)
    names: dict[int, set[bytes]] = {}
    kept: list[tuple[int, bytes]] = []
    dropped: list[str] = []
    count = 0
    links = 2
    for key, value in items(checker, inode.root, is_entry):
        count += 1
        try:
            entry = directory._entry(key, value)
        except CorruptError as error:
            checker.ledger.note_damage("dirent", error)
            dropped.append(f"a name that cannot be, {value[DIRENT.size :]!r}")
            continue
        first = hashed(checker, key, entry.name, names, f"{entry.name!r} in directory {ino:#x}")
        is_dir, mode = _entry(checker, ino, inode, entry)
        links += is_dir
        if not mode or mode != entry.mode or not first:
            dropped.append(f"{'the type of ' * bool(mode and first)}the name {entry.name!r}")
        if mode and first and checker.ledger.salvage:
            kept.append((key, DIRENT.pack(Dirent(entry.ino, mode, len(entry.name))) + entry.name))
    keep(checker, ino, "root", kept, dropped)
    if not checker.ledger.tally.sound:
        return
    if count != inode.size:
        checker.note("directory-size", f"directory {ino:#x}: expected a size of {count} entries, found {inode.size}")
        checker.correct(ino, size=count)
    if inode.nlink != links and (inode.nlink or count):
        checker.note("link-count", f"directory {ino:#x}: expected nlink {links}, found {inode.nlink}")
        checker.correct(ino, nlink=links)


def _entry(checker: Checker, parent: int, above: Inode, entry: Entry) -> tuple[bool, int]:
    """One name: the inode that it stands for.  Whether that is a subdirectory; the type it has, 0: name it not."""
    ino = entry.ino
    what = f"{entry.name!r} in directory {parent:#x}"
    if not checker.in_use(ino) or not may_be_named(ino):
        checker.note("dirent-dangling", f"{what}: expected an inode in use, found {ino:#x}, which is free")
        if ino >= FIRST_FREE_SLOT:
            checker.wrong_slots.setdefault(ino, entry.mode)
        return stat.S_ISDIR(entry.mode), 0
    if not in_its_place(ino, parent, entry.name):
        checker.note("reserved-name", f"{what}: expected another inode in this place, found {ino:#x}")
        return stat.S_ISDIR(entry.mode), 0
    first = checker.mark(ino)
    inode = checker.inode(ino)
    if inode is None:
        return stat.S_ISDIR(entry.mode), entry.mode
    misplaced = _is_misplaced(checker, parent, ino, inode, what)
    if entry.mode != stat.S_IFMT(inode.mode):
        checker.note("dirent-mode", f"{what}: expected mode {stat.S_IFMT(inode.mode):o}, found {entry.mode:o}")
    kind = stat.S_IFMT(inode.mode)
    project(checker, parent, above, ino, inode)
    if not stat.S_ISDIR(inode.mode):
        _file_name(checker, ino, inode, first=first)
        return False, 0 if misplaced else kind
    if not first:
        checker.note("directory-names", f"{what}: expected one name of directory {ino:#x}, found another")
        return True, 0
    if inode.parent != parent:
        checker.note("directory-parent", f"{what}: expected parent {parent:#x}, found {inode.parent:#x}", ino=ino)
        checker.correct(ino, parent=parent)
    if not inode.nlink:
        checker.note("link-count", f"directory {ino:#x}: expected nlink 2 or more, found 0", ino=ino)
        checker.correct(ino, nlink=2)
    checker.todo.append(ino)
    return True, 0 if misplaced else kind


def _is_misplaced(checker: Checker, parent: int, ino: int, inode: Inode, what: str) -> bool:
    """Whether the name must go: domains stand in iommu/, and nothing else does.  Without records it is no domain."""
    if may_stand_in(parent, ino, inode):
        return False
    wanted = "a domain" if parent == IOMMU_INO else "no domain"
    checker.note("iommu-name", f"{what}: expected {wanted}, found inode {ino:#x}")
    if parent == IOMMU_INO or inode.iommu:
        return True
    checker.correct(ino, flags=inode.flags & ~FLAG_IOMMU_DOMAIN_PGTABLES)
    return False


def _file_name(checker: Checker, ino: int, inode: Inode, *, first: bool) -> None:
    left = (inode.nlink if first else checker.names_left.get(ino, 0)) - 1
    if left:
        checker.names_left[ino] = left
    else:
        checker.names_left.pop(ino, None)
    if first:
        checker.content(ino, inode)
