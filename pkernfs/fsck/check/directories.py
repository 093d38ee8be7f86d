"""Directories, their names, and the inodes that these point to."""

from __future__ import annotations

import stat

from pkernfs.errors import CorruptError, file_type, quoted
from pkernfs.format import (
    DIRENT,
    FIRST_FREE_SLOT,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    IOMMU_INO,
    ORPHANS_INO,
    ROOT_INO,
    Dirent,
    Ino,
    Inode,
)
from pkernfs.fs.directory import Directory, Entry
from pkernfs.fsck.check.quotas import project
from pkernfs.fsck.check.rules import in_its_place, may_be_named, may_stand_in
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.check.trees import hashed, is_entry, items
from pkernfs.fsck.findings import Fields, NamedSlot
from pkernfs.fsck.problems import Code


def names(check: Check) -> None:
    """Everything below the root, and what it holds."""
    check.reached.mark(ORPHANS_INO)
    check.reached.mark(ROOT_INO)
    root = check.inode(ROOT_INO)
    if root and root.parent != ROOT_INO:
        text = f"the root: expected itself as parent, found {root.parent}"
        check.note(Code.DIRECTORY_PARENT, text, ino=ROOT_INO, data=Fields(ROOT_INO, {"parent": ROOT_INO}))
    check.walk(ROOT_INO)


def entries(check: Check, ino: Ino, inode: Inode) -> None:
    """Each can be read, stands where its name's hash says, once, and points to an inode of its type."""
    if not stat.S_ISDIR(inode.mode):
        return
    directory = Directory(check.volume, ino, inode)
    names: dict[int, set[bytes]] = {}
    structure = check.structure("root", is_entry)
    count = 0
    links = 2
    for key, value in items(check, structure, inode.root):
        count += 1
        try:
            entry = directory.decode(key, value)
        except CorruptError as error:
            check.findings.note_error(Code.DIRENT, error)
            structure.dropped.append(f"a name that cannot be, {quoted(value[DIRENT.size :])}")
            continue
        what = f"{quoted(entry.name)} in directory {ino}"
        first = hashed(check, structure, key, entry.name, names, what)
        is_dir, mode = _entry(check, ino, inode, entry, what)
        links += is_dir
        if not mode or mode != entry.mode or not first:
            of_type = "the type of " * bool(mode and first)
            structure.dropped.append(f"{of_type}the name {quoted(entry.name)}")
        if mode and first and structure.keeps:
            structure.keep(key, DIRENT.pack(Dirent(entry.ino, mode, len(entry.name))) + entry.name)
    check.close(structure)
    if not check.findings.tally.sound:
        return
    if count != inode.size:
        text = f"directory {ino}: expected a size of {count} entries, found {inode.size}"
        check.note(Code.DIRECTORY_SIZE, text, data=Fields(ino, {"size": count}))
    if inode.nlink != links and (inode.nlink or count):
        text = f"directory {ino}: expected nlink {links}, found {inode.nlink}"
        check.note(Code.LINK_COUNT, text, data=Fields(ino, {"nlink": links}))


def _entry(check: Check, parent: Ino, directory: Inode, entry: Entry, what: str) -> tuple[bool, int]:
    """One name: the inode that it stands for.  Whether that is a subdirectory; the type it has, 0: name it not."""
    ino = entry.ino
    if not check.memory.in_use(ino) or not may_be_named(ino):
        text = f"{what}: expected an inode in use, found {ino}, which is free"
        check.note(Code.DIRENT_DANGLING, text, data=NamedSlot(ino, entry.mode) if ino >= FIRST_FREE_SLOT else None)
        return stat.S_ISDIR(entry.mode), 0
    if not in_its_place(ino, parent, entry.name):
        check.note(Code.RESERVED_NAME, f"{what}: expected another inode in this place, found {ino}")
        return stat.S_ISDIR(entry.mode), 0
    first = check.reached.mark(ino)
    inode = check.inode(ino)
    if inode is None:
        return stat.S_ISDIR(entry.mode), entry.mode
    misplaced = _is_misplaced(check, parent, ino, inode, what)
    kind = stat.S_IFMT(inode.mode)
    if entry.mode != kind:
        check.note(Code.DIRENT_MODE, f"{what}: expected {file_type(kind)}, found {file_type(entry.mode)}")
    project(check, parent, directory, ino, inode)
    if not stat.S_ISDIR(inode.mode):
        _file_name(check, ino, inode, first=first)
        return False, 0 if misplaced else kind
    if not first:
        check.note(Code.DIRECTORY_NAMES, f"{what}: expected one name of directory {ino}, found another")
        return True, 0
    if inode.parent != parent:
        text = f"{what}: expected parent {parent}, found {inode.parent}"
        check.note(Code.DIRECTORY_PARENT, text, ino=ino, data=Fields(ino, {"parent": parent}))
    if not inode.nlink:
        text = f"directory {ino}: expected nlink 2 or more, found 0"
        check.note(Code.LINK_COUNT, text, ino=ino, data=Fields(ino, {"nlink": 2}))
    check.todo.append(ino)
    return True, 0 if misplaced else kind


def _is_misplaced(check: Check, parent: Ino, ino: Ino, inode: Inode, what: str) -> bool:
    """Whether the name must go: domains stand in iommu/, and nothing else does.  Without records it is no domain."""
    if may_stand_in(parent, ino, inode):
        return False
    must_go = parent == IOMMU_INO or bool(inode.iommu)
    data = None
    if not must_go:
        check.reached.wrong_flags.add(ino)
        data = Fields(ino, {"flags": inode.flags & ~FLAG_IOMMU_DOMAIN_PGTABLES})
    wanted = "a domain" if parent == IOMMU_INO else "no domain"
    check.note(Code.IOMMU_NAME, f"{what}: expected {wanted}, found inode {ino}", data=data)
    return must_go


def _file_name(check: Check, ino: Ino, inode: Inode, *, first: bool) -> None:
    names_left = check.reached.names_left
    left = (inode.nlink if first else names_left.get(ino, 0)) - 1
    if left:
        names_left[ino] = left
    else:
        names_left.pop(ino, None)
    if first:
        check.content(ino, inode)
