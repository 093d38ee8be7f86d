"""Repair of what lost its name: it gets one."""

from __future__ import annotations

import errno
import stat

from pkernfs.errors import CorruptError, FsError, quoted
from pkernfs.format import FLAG_IOMMU_DOMAIN_PGTABLES, IOMMU_INO, ROOT_INO, Ino, Inode
from pkernfs.fs.directory import Directory
from pkernfs.fs.pages import new_inode, read_inode
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.rules import PLACES, in_its_place
from pkernfs.fsck.findings import Nameless
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import Work

LOST_FOUND = b"lost+found"


def lost(work: Work) -> None:
    """Inodes without a name get one: the reserved ones theirs, all others "#" and their number.

    Domains in /iommu; others in /lost+found as long as there is room to make and grow it, then in the root directory.
    """
    rooms = ["/lost+found", "/"]
    for code, (ino,) in work.found(Nameless):
        for where in _places(work, ino) or list(rooms):
            try:
                _name_lost(work, code, ino, where)
            except CorruptError:
                pass
            except FsError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if where in rooms:
                    rooms.remove(where)
                continue
            break


def _places(work: Work, ino: Ino) -> list[str]:
    """Where the inode must be named, if not just anywhere."""
    if ino in PLACES:
        return ["its place"]
    try:
        inode = read_inode(work.volume.region, ino)
    except CorruptError:
        return []
    return ["/iommu"] if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES else []


def _name_lost(work: Work, code: Code, ino: Ino, where: str) -> None:
    volume = work.volume
    inode = read_inode(volume.region, ino)
    if ino in PLACES:
        parent, name = PLACES[ino]
    else:
        parent = {"/": ROOT_INO, "/iommu": IOMMU_INO}.get(where) or _lost_found(work)
        name = b"#%d" % ino
    while Directory(volume, parent, volume.inode(parent)).find(name):
        name += b"~"
    if in_its_place(ino, parent, name):  # what has the name goes first
        _add_name(volume, parent, name, ino, inode)
        work.note(code, f"inode {ino}: named {quoted(name)} in {where}", ino=ino)


def _lost_found(work: Work) -> Ino:
    """The inode of /lost+found, made when there is none."""
    volume = work.volume
    root = volume.inode(ROOT_INO)
    name = LOST_FOUND
    while entry := Directory(volume, ROOT_INO, root).find(name):
        if stat.S_ISDIR(entry.mode):
            return entry.ino
        name += b"~"
    now = volume.clock()
    with volume.transaction() as tx:
        ino = Ino(volume.allocator.alloc_inode(tx))
        generation = read_inode(volume.region, ino).generation + 1
        mode = stat.S_IFDIR | 0o700
        made = new_inode(mode, now, root.uid, root.gid, generation=generation, parent=ROOT_INO)
        directory = Directory(volume, ROOT_INO, root)
        directory.add(tx, name, ino, made.mode)
        root = directory.finish(now)
        tx.put_inode(ROOT_INO, root._replace(nlink=root.nlink + 1))
        tx.put_inode(ino, made)
    work.note(Code.INODE_LOST, f"made /{name.decode()}", ino=ino)
    return ino


def _add_name(volume: Volume, parent: Ino, name: bytes, ino: Ino, inode: Inode) -> None:
    """Name an inode that no directory names.  A file's count of names may be wrong then: the next round's work."""
    is_dir = stat.S_ISDIR(inode.mode)
    with volume.transaction() as tx:
        directory = Directory(volume, parent, volume.inode(parent))
        directory.add(tx, name, ino, inode.mode)
        changed = directory.finish(volume.clock())
        tx.put_inode(parent, changed._replace(nlink=changed.nlink + is_dir))
        if is_dir:
            tx.put_inode(ino, inode._replace(parent=parent))
