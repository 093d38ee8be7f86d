"""The filesystem as the server, the tools and the tests use it: attributes, statistics, the end."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    FLAG_DIRECT,
    GUARDED,
    INODE_SIZE,
    INODES_PER_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    ROOT_INO,
    Extent,
    Ino,
    Inode,
)
from pkernfs.fs.content import clamp_time, killed_mode
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.guard import Guard, pins
from pkernfs.fs.lookups import Lookups
from pkernfs.fs.orphans import STEP
from pkernfs.fs.rename import Renames
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Xattrs
from pkernfs.region import Region

XATTR_LIST_MAX = 65536


class Statfs(NamedTuple):
    """Figures of statvfs(3); ``blocks`` and ``free`` in pages of 4 KiB."""

    blocks: int
    free: int
    files: int
    free_files: int


class SetAttr(NamedTuple):
    """What setattr is to change; None: leave it.  Times in ns since the epoch."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None
    ctime: int | None = None  #: None: now


class Filesystem(Renames):
    """All operations on one region.  Inode numbers in, FsError out; every call is complete when it returns."""

    @classmethod
    def open(cls, region: Region, guard: Callable[[Volume], Guard], lookups: Lookups | None = None) -> Filesystem:
        """Open the filesystem in ``region``: replay the journal and, when it may write, free the orphans.

        ``guard``: asked before what hardware may be using is touched.  ``lookups``: of a mount that goes on after the
        end of its server.  Raises FormatError, CorruptError (also when the root directory is damaged).
        """
        fs = cls(Volume(region), guard, lookups)
        root = fs.volume.inode_named_by(ROOT_INO, ROOT_INO)
        if not stat.S_ISDIR(root.mode) or root.parent != ROOT_INO:
            found = f"expected a directory, its own parent, found mode {root.mode:o}, parent {root.parent:#x}"
            raise CorruptError("the root directory", ROOT_INO * INODE_SIZE, found, ino=ROOT_INO)
        if not region.readonly:
            fs.finish_orphans()
        return fs

    def close(self) -> None:
        """Free what was kept for open files only, note the orderly end, release the region."""
        if not self.region.readonly:
            self.ended = True
            self.in_background = False
            self.finish_orphans()
            self.volume.mark_unmounted()
        self.region.close()

    # -- attributes -----------------------------------------------------------------------------------------------

    def getattr(self, ino: int) -> Inode:
        """The inode.  Raises FsError(ESTALE)."""
        return self.volume.inode(ino)

    def setattr(self, ino: int, change: SetAttr, *, privileged: bool = True) -> Inode:
        """Change attributes and size together; the inode as it is then.

        ``privileged``: the caller keeps set-user-ID bits when it truncates (CAP_FSETID).  A change of owner clears
        them for everybody.  Raises FsError: EFBIG, ENOSPC, EISDIR, EINVAL, EBUSY (memory to be freed is a guest's, or
        mapped by a domain), EPERM (page tables, see guard).
        """
        inode = self.volume.inode(ino)
        now = self.now()
        changed: dict[str, Any] = {"ctime": now if change.ctime is None else clamp_time(change.ctime)}
        mode = inode.mode
        if change.mode is not None:
            mode = stat.S_IFMT(mode) | stat.S_IMODE(change.mode)
        if change.uid is not None or change.gid is not None:
            changed["uid"] = inode.uid if change.uid is None else change.uid
            changed["gid"] = inode.gid if change.gid is None else change.gid
            if change.mode is None:
                mode = killed_mode(mode)
        if change.size is not None and not privileged:
            mode = killed_mode(mode)
        changed["mode"] = mode
        if change.size is not None:
            changed["mtime"] = now
        if change.atime is not None:
            changed["atime"] = clamp_time(change.atime)
        if change.mtime is not None:
            changed["mtime"] = clamp_time(change.mtime)
        if change.size is not None and not stat.S_ISREG(mode):
            raise FsError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"inode {ino}")
        guarded = inode.flags & GUARDED
        if change.size is not None and guarded:
            self.guard.may_resize(Ino(ino), inode, change.size)
        if change.size is not None and change.size < inode.size:
            end = -(-change.size // PAGE)
            self.check_unmapped(ino, inode, end)
            if pins(inode):
                self.guard.may_cut(Ino(ino), inode, end)
        elif change.size is not None and inode.orphan_next and change.size > inode.size:
            self.finish_cut(ino)
            inode = self.volume.inode(ino)

        def apply(tx: Transaction, compact: bool) -> bool:
            new = inode if change.size is None else self.resized(tx, ino, inode, change.size, compact=compact)
            if guarded and new.size > inode.size:
                self.guard.resized(tx, Ino(ino), new)
            new = new._replace(**changed)
            tx.put_inode(ino, new)
            return change.size is None or change.size > inode.size or self._cut(tx, ino, new, compact)

        if not self.volume.compacting(apply):
            self.begin_freeing(ino)
        return self.volume.inode(ino)

    def _cut(self, tx: Transaction, ino: int, inode: Inode, compact: bool) -> bool:
        """Free what lies beyond the end when it is little; else list the inode for it.

        True: all is freed.
        """
        filemap = FileMap(self.volume, ino, inode, compact=compact)
        end = -(-inode.size // PAGE)
        if len(list(islice(filemap.extents(end), STEP + 1))) <= STEP:
            filemap.truncate(tx, end, STEP)
            tx.put_inode(ino, filemap.finish())
            return True
        self.list_orphan(tx, ino)
        return False

    def set_direct(self, ino: int, direct: bool) -> Inode:
        """Note that the file's memory is mapped directly from the region (or no longer): its blocks stay in place.

        Raises FsError: EINVAL, EPERM for page tables.
        """
        self.file_map(ino)
        inode = self.volume.inode(ino)
        if inode.flags & GUARDED:
            self.guard.may_map(Ino(ino))
        flags = inode.flags | FLAG_DIRECT if direct else inode.flags & ~FLAG_DIRECT
        if flags != inode.flags:
            inode = inode._replace(flags=flags)
            with self.volume.transaction() as tx:
                tx.put_inode(ino, inode)
        return inode

    def check_open(self, ino: int, flags: int) -> None:
        """Raise FsError(EPERM) when the inode, or a file to be made in this directory, may not be opened like that."""
        self.guard.may_open(self.volume.inode(ino), flags)

    def extents(self, ino: int) -> list[Extent]:
        """The extents of a regular file, in pages.  Raises FsError(EINVAL)."""
        return list(self.file_map(ino).extents())

    # -- extended attributes --------------------------------------------------------------------------------------

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value.  Raises FsError(ENODATA)."""
        inode = self.volume.inode(ino)
        attribute = Xattrs(self.volume, ino, inode).find(name) if inode.xattrs else None
        if attribute is None:
            raise FsError(errno.ENODATA, repr(name))
        return Xattrs(self.volume, ino, inode).value(attribute)

    def listxattr(self, ino: int) -> list[bytes]:
        """The names of all attributes."""
        return [attribute.name for attribute in Xattrs(self.volume, ino, self.volume.inode(ino)).all()]

    def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        """Create or replace.  Raises FsError: ERANGE, E2BIG, ENOSPC (also when the names would not fit in a list)."""
        xattrs = Xattrs(self.volume, ino, self.volume.inode(ino))
        if sum(len(a.name) + 1 for a in xattrs.all() if a.name != name) + len(name) + 1 > XATTR_LIST_MAX:
            raise FsError(errno.ENOSPC, "the names of the attributes would take more than 64 KiB")
        with self.volume.transaction() as tx:
            xattrs.set(tx, name, value)
            tx.put_inode(ino, xattrs.finish(self.now()))

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove.  Raises FsError(ENODATA)."""
        xattrs = Xattrs(self.volume, ino, self.volume.inode(ino))
        attribute = xattrs.find(name)
        if attribute is None:
            raise FsError(errno.ENODATA, repr(name))
        with self.volume.transaction() as tx:
            xattrs.remove(tx, attribute)
            tx.put_inode(ino, xattrs.finish(self.now()))

    # -- the whole ------------------------------------------------------------------------------------------------

    def statfs(self) -> Statfs:
        """Space in pages of 4 KiB, and inodes: as many more as the free pages can hold."""
        space = self.volume.space
        free = space.free_pages()
        used = space.inodes_in_use()
        free_files = free * INODES_PER_PAGE
        blocks = (space.blocks - space.first_block) * PAGES_PER_BLOCK
        return Statfs(blocks, free, used + free_files, free_files)

    def physical(self, offset: int) -> int:
        """The physical address of a region offset, bytes."""
        return self.volume.sb.phys_base + offset
