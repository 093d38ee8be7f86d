"""The attributes of inodes, ordinary and extended, and the size as one of them."""

from __future__ import annotations

import errno
import stat
from itertools import islice
from typing import NamedTuple, TypedDict

from pkernfs.errors import FsError, quoted
from pkernfs.format import FLAG_REGION_MAPPED, GUARDED, Ino, Inode
from pkernfs.fs.chunks import cut_at, truncate
from pkernfs.fs.content import Content, killed_mode
from pkernfs.fs.filemap import FileMap, end_of
from pkernfs.fs.guard import Guard, pins
from pkernfs.fs.holds import Holds, check_not_held
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.reclaim import STEP, Reclaimer
from pkernfs.fs.times import clamp_time
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Xattrs

XATTR_LIST_MAX = 65536


class SetAttr(NamedTuple):
    """What setattr is to change; None: leave it.  Times in ns since the epoch."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None
    ctime: int | None = None  #: None: now


class Attributes:
    """What is known about files beside names and content."""

    def __init__(
        self, volume: Volume, content: Content, orphans: Orphans, reclaimer: Reclaimer, guard: Guard, holds: Holds
    ) -> None:
        self.volume = volume
        self.content = content
        self.orphans = orphans
        self.reclaimer = reclaimer
        self.guard = guard
        self.holds = holds

    def setattr(self, ino: Ino, change: SetAttr, *, privileged: bool = True) -> Inode:
        """Change attributes and size together; the inode as it is then.

        ``privileged``: the caller keeps set-user-ID bits when it truncates (CAP_FSETID).  A change of owner clears
        them for everybody.  Raises FsError: EFBIG, ENOSPC, EISDIR, EINVAL, EBUSY (memory to be freed is a guest's, or
        pinned), EPERM (held; see Guard.may_resize).
        """
        inode = self.volume.inode(ino)
        check_not_held(ino, inode)
        now = self.volume.clock()
        changed = _changes(inode, change, now, privileged)
        if change.size is not None and not stat.S_ISREG(inode.mode):
            number = errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL
            raise FsError(number, f"inode {ino} is not a regular file")
        guarded = inode.flags & GUARDED
        if change.size is not None and guarded:
            self.guard.may_resize(ino, inode, change.size)
        if change.size is not None and change.size < inode.size:
            end = end_of(change.size)
            self.content.check_unmapped(ino, inode, end)
            if pins(inode):
                self.guard.may_cut(ino, inode, end)
        elif change.size is not None and inode.orphan_next and change.size > inode.size:
            self.reclaimer.finish_cut(ino)
            inode = self.volume.inode(ino)

        def apply(tx: Transaction, compact: bool) -> bool:
            new = inode if change.size is None else self.content.resized(tx, ino, inode, change.size, compact=compact)
            if guarded and new.size > inode.size:
                self.guard.resized(tx, ino, new)
            new = new._replace(**changed)
            tx.put_inode(ino, new)
            return change.size is None or change.size > inode.size or self._cut(tx, ino, new, compact)

        if not self.volume.compacting(apply):
            self.reclaimer.begin_freeing(ino)
        return self.volume.inode(ino)

    def _cut(self, tx: Transaction, ino: Ino, inode: Inode, compact: bool) -> bool:
        """Free what lies beyond the end when it is little, and need not be put aside; else list the inode for it.

        True: all is freed.
        """
        filemap = FileMap(self.volume, ino, inode, compact=compact)
        end = end_of(inode.size)
        aside = pins(inode) and self.guard.awaits(ino, cut_at(filemap, end))
        if not aside and len(list(islice(filemap.extents(end), STEP + 1))) <= STEP:
            truncate(tx, filemap, end, STEP)
            tx.put_inode(ino, filemap.finish())
            return True
        self.orphans.add(tx, ino)
        return False

    def set_region_mapped(self, ino: Ino, mapped: bool) -> Inode:
        """Note that a process maps the file's memory from the region (or no longer does): its blocks stay in place.

        Raises FsError: EINVAL, EPERM for page tables.
        """
        self.content.file_map(ino)
        inode = self.volume.inode(ino)
        if inode.flags & GUARDED:
            self.guard.may_map(ino)
        flags = inode.flags | FLAG_REGION_MAPPED if mapped else inode.flags & ~FLAG_REGION_MAPPED
        if flags != inode.flags:
            inode = inode._replace(flags=flags)
            with self.volume.transaction() as tx:
                tx.put_inode(ino, inode)
        return inode

    def check_open(self, ino: Ino, flags: int) -> None:
        """Raise FsError(EPERM) when the inode, or a file to be made in this directory, may not be opened like that."""
        inode = self.volume.inode(ino)
        self.holds.check_open(ino, inode, flags)
        self.guard.may_open(inode, flags)

    # -- extended attributes --------------------------------------------------------------------------------------

    def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """The value.  Raises FsError(ENODATA)."""
        inode = self.volume.inode(ino)
        attribute = Xattrs(self.volume, ino, inode).find(name) if inode.xattrs else None
        if attribute is None:
            raise FsError(errno.ENODATA, quoted(name))
        return Xattrs(self.volume, ino, inode).value(attribute)

    def listxattr(self, ino: Ino) -> list[bytes]:
        """The names of all attributes."""
        return [attribute.name for attribute in Xattrs(self.volume, ino, self.volume.inode(ino)).all()]

    def setxattr(self, ino: Ino, name: bytes, value: bytes) -> None:
        """Create or replace.

        Raises FsError: ERANGE, E2BIG, ENOSPC (also when the names would not fit in a list), EPERM (held).
        """
        inode = self.volume.inode(ino)
        check_not_held(ino, inode)
        xattrs = Xattrs(self.volume, ino, inode)
        if sum(len(a.name) + 1 for a in xattrs.all() if a.name != name) + len(name) + 1 > XATTR_LIST_MAX:
            raise FsError(errno.ENOSPC, "the names of the attributes would take more than 64 KiB")
        with self.volume.transaction() as tx:
            xattrs.set(tx, name, value)
            tx.put_inode(ino, xattrs.finish(self.volume.clock()))

    def removexattr(self, ino: Ino, name: bytes) -> None:
        """Remove.  Raises FsError: ENODATA, EPERM (held)."""
        inode = self.volume.inode(ino)
        check_not_held(ino, inode)
        xattrs = Xattrs(self.volume, ino, inode)
        attribute = xattrs.find(name)
        if attribute is None:
            raise FsError(errno.ENODATA, quoted(name))
        with self.volume.transaction() as tx:
            xattrs.remove(tx, attribute)
            tx.put_inode(ino, xattrs.finish(self.volume.clock()))


class _Changes(TypedDict, total=False):
    mode: int
    uid: int
    gid: int
    atime: int
    mtime: int
    ctime: int


def _changes(inode: Inode, change: SetAttr, now: int, privileged: bool) -> _Changes:
    """The fields, but for the size, that are to change."""
    changed: _Changes = {"ctime": now if change.ctime is None else clamp_time(change.ctime)}
    mode = inode.mode
    if change.mode is not None:
        mode = stat.S_IFMT(mode) | stat.S_IMODE(change.mode)
    if change.uid is not None or change.gid is not None:
        changed["uid"] = inode.uid if change.uid is None else change.uid
        changed["gid"] = inode.gid if change.gid is None else change.gid
        if change.mode is None:
            mode = killed_mode(mode)
    if change.size is not None:
        changed["mtime"] = now
        if not privileged:
            mode = killed_mode(mode)
    changed["mode"] = mode
    if change.atime is not None:
        changed["atime"] = clamp_time(change.atime)
    if change.mtime is not None:
        changed["mtime"] = clamp_time(change.mtime)
    return changed
