"""What files are called: lookup, create, link, unlink, rename, and reading directories."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pkernfs.errors import FsError
from pkernfs.format import (
    FIRST_FREE_SLOT,
    FLAG_DIR,
    FLAG_FILE,
    GUARDED,
    INLINE_SIZE,
    LINK_MAX,
    NAME_MAX,
    ROOT_INO,
    SYMLINK_MAX,
    Ino,
    Inode,
    Quota,
)
from pkernfs.fs.charge import enclosing_project, with_quota, without_quota
from pkernfs.fs.directory import Directory, Entry
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.transaction import Transaction


class Caller(NamedTuple):
    """Who asks: what new files belong to."""

    uid: int
    gid: int


class Names(Orphans):
    """The tree of names.  A removed file stays while it is referred to (``lookups``)."""

    # -- looking --------------------------------------------------------------------------------------------------

    def directory(self, ino: int) -> Directory:
        """The directory.  Raises FsError: ENOTDIR, ENOENT when it was removed."""
        inode = self.volume.inode(ino)
        if not stat.S_ISDIR(inode.mode):
            raise FsError(errno.ENOTDIR, f"inode {ino}")
        return Directory(self.volume, ino, inode)

    def lookup(self, parent: int, name: bytes) -> Ino:
        """The inode that ``name`` stands for.  Raises FsError: ENOENT, ENOTDIR, ENAMETOOLONG.

        Here and below a name and its inode that do not agree are a CorruptError, as any damage is.
        """
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG, repr(name))
        if name in (b".", b".."):
            directory = self.directory(parent)
            return Ino(parent if name == b"." else directory.inode.parent)
        return self._entry(self.directory(parent), name).ino

    def _entry(self, directory: Directory, name: bytes) -> Entry:
        entry = directory.find(name)
        if entry is None:
            raise FsError(errno.ENOENT, repr(name))
        directory.target(entry)
        return entry

    def readdir(self, ino: int, first: int = 0) -> Iterator[Entry]:
        """The entries from cookie ``first`` on; "." and ".." are not among them.

        The order is that of the cookies and never changes, so a reader that goes on from a cookie sees every entry
        that was there throughout, once.  The directory must not change while the iterator is in use.  Entries that
        cannot be are left out, and noted as damage.
        """
        directory = self.directory(ino)
        self.accessed(ino, directory.inode)
        return directory.scan(first, self.volume.damage.note)

    def resolve(self, path: bytes) -> Ino:
        """The inode at ``path`` from the root on; symbolic links are not followed.  Raises FsError."""
        ino = ROOT_INO
        for name in path.split(b"/"):
            if name:
                ino = self.lookup(ino, name)
        return ino

    # -- creating -------------------------------------------------------------------------------------------------

    def _new_name(self, parent: int, name: bytes) -> Directory:
        """The directory that is to get ``name``.  Raises FsError: EEXIST, ENAMETOOLONG, EINVAL, ENOENT."""
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG, repr(name))
        if not name or b"/" in name or b"\0" in name:
            raise FsError(errno.EINVAL, repr(name))
        directory = self.directory(parent)
        if not directory.inode.nlink:
            raise FsError(errno.ENOENT, "the directory was removed")
        if name in (b".", b"..") or directory.find(name):
            raise FsError(errno.EEXIST, os.fsdecode(name))
        return directory

    def create(
        self,
        parent: int,
        name: bytes,
        mode: int,
        caller: Caller,
        rdev: int = 0,
        target: bytes = b"",
        init_inode: Callable[[Transaction, Ino], object] | None = None,
    ) -> Ino:
        """A new inode of the type in ``mode``, with one name: file, directory, symbolic link, fifo, socket, device.

        ``init_inode``: what else belongs to it is done within the same transaction.
        Raises FsError: EEXIST, ENOENT, ENOTDIR, ENAMETOOLONG, ENOSPC, EDQUOT, EPERM (in iommu/ all but files).
        """
        volume = self.volume
        now = self.now()
        directory = self._new_name(parent, name)
        above = directory.inode
        is_dir = stat.S_ISDIR(mode)
        flags = FLAG_DIR if is_dir else FLAG_FILE if stat.S_ISREG(mode) else 0
        flags |= self.guard.flags_of_new(above, mode)
        gid = caller.gid
        if above.mode & stat.S_ISGID:
            gid = above.gid
            mode |= stat.S_ISGID if is_dir else 0
        if len(target) > SYMLINK_MAX:
            raise FsError(errno.ENAMETOOLONG, f"a target of {len(target)} bytes")
        with volume.transaction() as tx:
            ino = Ino(volume.allocator.alloc_inode(tx))
            inode = Inode(
                atime=now,
                mtime=now,
                ctime=now,
                mode=mode,
                nlink=2 if is_dir else 1,
                generation=(now >> 10) & 0xFFFFFFFF,
                uid=caller.uid,
                gid=gid,
                rdev=rdev,
                flags=flags,
                btime=now,
                parent=parent if is_dir else 0,
                project=above.project,
            )
            if target:
                inode = self._with_target(tx, ino, inode, target)
            directory.add(tx, name, ino, mode)
            above = directory.finish(now)
            tx.put_inode(parent, above._replace(nlink=above.nlink + 1) if is_dir else above)
            tx.put_inode(ino, inode)
            if init_inode:
                init_inode(tx, ino)
        return ino

    def _with_target(self, tx: Transaction, ino: int, inode: Inode, target: bytes) -> Inode:
        if len(target) <= INLINE_SIZE:
            return inode._replace(size=len(target), inline=target + bytes(INLINE_SIZE - len(target)))
        filemap = FileMap(self.volume, ino, inode)
        filemap.allocate(tx, 0, 1)
        self._store(filemap, 0, target + bytes(-len(target) % 8))
        return filemap.finish()._replace(size=len(target))

    def link(self, ino: int, parent: int, name: bytes) -> None:
        """Another name for a file.

        Raises FsError: EPERM for directories and in iommu/, EMLINK, ENOENT when it has no name left, EXDEV under
        another quota.
        """
        inode = self.volume.inode(ino)
        if stat.S_ISDIR(inode.mode):
            raise FsError(errno.EPERM, "a directory has one name")
        self._check_removable(ino, name)
        if not inode.nlink:
            raise FsError(errno.ENOENT, "the file was removed")
        if inode.nlink >= LINK_MAX:
            raise FsError(errno.EMLINK, f"{LINK_MAX} names")
        now = self.now()
        directory = self._new_name(parent, name)
        self.guard.may_link(inode, directory.inode)
        self._check_project(inode, directory.inode)
        with self.volume.transaction() as tx:
            directory.add(tx, name, ino, inode.mode)
            tx.put_inode(parent, directory.finish(now))
            tx.put_inode(ino, inode._replace(nlink=inode.nlink + 1, ctime=now))

    def _check_project(self, one: Inode, other: Inode) -> None:
        if one.project != other.project:
            raise FsError(errno.EXDEV, "from one quota to another")

    # -- removing -------------------------------------------------------------------------------------------------

    def unlink(
        self, parent: int, name: bytes, in_same_transaction: Callable[[Transaction], object] | None = None
    ) -> None:
        """Remove the name of a file; ``in_same_transaction``: what else happens with it.

        Raises FsError: ENOENT, EISDIR, EPERM, EBUSY (a domain with a device).
        """
        directory = self.directory(parent)
        entry = self._entry(directory, name)
        inode = self.volume.inode(entry.ino)
        if stat.S_ISDIR(inode.mode):
            raise FsError(errno.EISDIR, repr(name))
        self._check_removable(entry.ino, name)
        if inode.flags & GUARDED:
            self.guard.may_unlink(entry.ino, inode)
        now = self.now()
        with self.volume.transaction() as tx:
            directory.remove(tx, entry)
            tx.put_inode(parent, directory.finish(now))
            self._drop_name(tx, entry.ino, inode, now)
            if in_same_transaction:
                in_same_transaction(tx)
        self.reap(entry.ino)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory.  Raises FsError: ENOENT, ENOTDIR, ENOTEMPTY, EPERM, EINVAL for "."."""
        if name in (b".", b".."):
            raise FsError(errno.EINVAL if name == b"." else errno.ENOTEMPTY, repr(name))
        directory = self.directory(parent)
        entry = self._entry(directory, name)
        inode = self.directory(entry.ino).inode
        if inode.root:
            raise FsError(errno.ENOTEMPTY, repr(name))
        self._check_removable(entry.ino, name)
        self.drop_quota(entry.ino, parent)
        inode = self.volume.inode(entry.ino)
        now = self.now()
        with self.volume.transaction() as tx:
            directory.remove(tx, entry)
            above = directory.finish(now)
            tx.put_inode(parent, above._replace(nlink=above.nlink - 1))
            self._drop_name(tx, entry.ino, inode, now)
        self.reap(entry.ino)

    def _check_removable(self, ino: int, name: bytes) -> None:
        if ino < FIRST_FREE_SLOT:
            raise FsError(errno.EPERM, f"{name!r} is part of every pkernfs region")

    def _drop_name(self, tx: Transaction, ino: int, inode: Inode, now: int) -> None:
        """Take one name from an inode: without one it goes, or is an orphan for now."""
        left = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        if not left:
            self.check_unmapped(ino, inode, 0)
        inode = inode._replace(nlink=left, ctime=now)
        tx.put_inode(ino, inode)
        if left:
            return
        if not self.referenced(ino) and self.is_small(ino, inode):
            self.free_part(tx, ino, inode)
        else:
            self.list_orphan(tx, ino)

    def drop_quota(self, ino: int, *others: int) -> None:
        """Take the quota away of a directory that is about to go, if it has one.

        Files without a name that count against it count against the quota around it from now on.
        ``others``: the inodes that will be changed with it, and must not be frozen: nothing is half done.
        """
        volume = self.volume
        inode = volume.inode(ino)
        if inode.project != ino:
            return
        for other in others:
            volume.damage.check_changeable(other)
        enclosing = enclosing_project(volume.cache, ino, inode)
        with volume.transaction(preparing=True) as tx:
            tx.put_inode(ino, with_quota(inode, Quota(0, 0)))
        self.move_orphans(ino, enclosing)
        with volume.transaction(preparing=True) as tx:
            tx.put_inode(ino, without_quota(volume.inode(ino), enclosing))

    def remember(self, ino: int) -> None:
        """Somebody refers to the inode (FUSE: the kernel looked it up)."""
        self.lookups.add(ino)

    def forget(self, ino: int, count: int) -> None:
        """``count`` references are gone; with the last one an orphan is freed."""
        if not self.lookups.drop(ino, count):
            self.reap(ino)
