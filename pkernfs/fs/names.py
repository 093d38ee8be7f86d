"""What files are called: lookup, create, link, unlink, and reading directories."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pkernfs.errors import FsError, quoted
from pkernfs.format import (
    FIRST_FREE_SLOT,
    GUARDED,
    INLINE_SIZE,
    LINK_MAX,
    NAME_MAX,
    ROOT_INO,
    SYMLINK_MAX,
    Ino,
    Inode,
)
from pkernfs.fs.chunks import allocate
from pkernfs.fs.content import Content
from pkernfs.fs.directory import Directory, Entry, check_name, open_directory
from pkernfs.fs.filemap import FIRST, FileMap, end_of
from pkernfs.fs.guard import Guard
from pkernfs.fs.holds import check_not_held
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.pages import new_inode
from pkernfs.fs.quota import Quotas
from pkernfs.fs.reclaim import Reclaimer
from pkernfs.fs.times import Times
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume


class Caller(NamedTuple):
    """Who asks: what new files belong to."""

    uid: int
    gid: int


def check_removable(ino: Ino, name: bytes) -> None:
    """Raise FsError(EPERM) when the name is one that no user may take away."""
    if ino < FIRST_FREE_SLOT:
        raise FsError(errno.EPERM, f"{quoted(name)} is part of every pkernfs region")


def check_project(one: Inode, other: Inode) -> None:
    """Raise FsError(EXDEV) when something would get from one quota to another."""
    if one.project != other.project:
        raise FsError(errno.EXDEV, "from one quota to another")


class Names:
    """The tree of names.  A removed file stays while it is referred to (see Reclaimer)."""

    def __init__(
        self,
        volume: Volume,
        times: Times,
        content: Content,
        orphans: Orphans,
        reclaimer: Reclaimer,
        quotas: Quotas,
        guard: Guard,
    ) -> None:
        self.volume = volume
        self.times = times
        self.content = content
        self.orphans = orphans
        self.reclaimer = reclaimer
        self.quotas = quotas
        self.guard = guard

    # -- looking --------------------------------------------------------------------------------------------------

    def directory(self, ino: Ino) -> Directory:
        """The directory.  Raises FsError: ESTALE, ENOTDIR."""
        return open_directory(self.volume, ino)

    def lookup(self, parent: Ino, name: bytes) -> Ino:
        """The inode that ``name`` stands for.  Raises FsError: ENOENT, ENOTDIR, ENAMETOOLONG.

        Here and below a name and its inode that do not agree are a CorruptError, as any damage is.
        """
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG, quoted(name))
        if name in (b".", b".."):
            directory = open_directory(self.volume, parent)
            return Ino(parent if name == b"." else directory.inode.parent)
        return self.entry(open_directory(self.volume, parent), name).ino

    def entry(self, directory: Directory, name: bytes) -> Entry:
        """The entry with this name.  Raises FsError(ENOENT)."""
        entry = directory.find(name)
        if entry is None:
            raise FsError(errno.ENOENT, quoted(name))
        directory.target(entry)
        return entry

    def readdir(self, ino: Ino, first: int = 0) -> Iterator[Entry]:
        """The entries from cookie ``first`` on; "." and ".." are not among them.

        The order is that of the cookies and never changes, so a reader that goes on from a cookie sees every entry
        that was there throughout, once.  The directory must not change while the iterator is in use.  Entries that
        cannot be are left out, and noted as damage.
        """
        directory = open_directory(self.volume, ino)
        self.times.accessed(ino, directory.inode)
        return directory.scan(first, self.volume.damage.note)

    def resolve(self, path: bytes) -> Ino:
        """The inode at ``path`` from the root on; symbolic links are not followed.  Raises FsError."""
        ino = ROOT_INO
        for name in path.split(b"/"):
            if name:
                ino = self.lookup(ino, name)
        return ino

    # -- creating -------------------------------------------------------------------------------------------------

    def _new_name(self, parent: Ino, name: bytes) -> Directory:
        """The directory that is to get ``name``.  Raises FsError: EEXIST, ENAMETOOLONG, EINVAL, ENOENT, ENOTDIR."""
        check_name(name)
        directory = open_directory(self.volume, parent)
        directory.check_takes(name)
        if directory.find(name):
            raise FsError(errno.EEXIST, quoted(name))
        return directory

    def create(
        self,
        parent: Ino,
        name: bytes,
        mode: int,
        caller: Caller,
        rdev: int = 0,
        target: bytes = b"",
        init_inode: Callable[[Transaction, Ino], object] | None = None,
    ) -> Ino:
        """A new inode of the type in ``mode``, with one name: file, directory, symbolic link, fifo, socket, device.

        ``init_inode``: what else belongs to it is done within the same transaction.
        Raises FsError: EEXIST, ENOENT, ENOTDIR, ENAMETOOLONG, ENOSPC, EDQUOT, EPERM (see Guard.flags_of_new).
        """
        volume = self.volume
        now = self.volume.clock()
        directory = self._new_name(parent, name)
        inode = directory.inode
        is_dir = stat.S_ISDIR(mode)
        flags = self.guard.flags_of_new(inode, mode)
        gid = caller.gid
        if inode.mode & stat.S_ISGID:
            gid = inode.gid
            mode |= stat.S_ISGID if is_dir else 0
        if len(target) > SYMLINK_MAX:
            raise FsError(errno.ENAMETOOLONG, f"a target of {len(target)} bytes")
        with volume.transaction() as tx:
            ino = volume.allocator.alloc_inode(tx)
            made = new_inode(
                mode,
                now,
                caller.uid,
                gid,
                rdev=rdev,
                flags=flags,
                generation=now >> 10,
                parent=parent,
                project=inode.project,
            )
            if target:
                made = self._with_target(tx, ino, made, target)
            directory.add(tx, name, ino, mode)
            inode = directory.finish(now)
            tx.put_inode(parent, inode._replace(nlink=inode.nlink + 1) if is_dir else inode)
            tx.put_inode(ino, made)
            if init_inode:
                init_inode(tx, ino)
        return ino

    def _with_target(self, tx: Transaction, ino: Ino, inode: Inode, target: bytes) -> Inode:
        if len(target) <= INLINE_SIZE:
            return inode._replace(size=len(target), inline=target + bytes(INLINE_SIZE - len(target)))
        filemap = FileMap(self.volume, ino, inode)
        allocate(tx, filemap, FIRST, end_of(len(target)))
        self.content.store(filemap, 0, target + bytes(-len(target) % 8))
        return filemap.finish()._replace(size=len(target))

    def link(self, ino: Ino, parent: Ino, name: bytes) -> None:
        """Another name for a file.

        Raises FsError: EPERM for directories (see also Guard.may_link), EMLINK, ENOENT when it has no name left, EXDEV
        under another quota.
        """
        inode = self.volume.inode(ino)
        if stat.S_ISDIR(inode.mode):
            raise FsError(errno.EPERM, "a directory has one name")
        check_removable(ino, name)
        check_not_held(ino, inode)
        if not inode.nlink:
            raise FsError(errno.ENOENT, "the file was removed")
        if inode.nlink >= LINK_MAX:
            raise FsError(errno.EMLINK, f"the file has {inode.nlink} names, the most there may be")
        now = self.volume.clock()
        directory = self._new_name(parent, name)
        self.guard.may_link(inode, directory.inode)
        check_project(inode, directory.inode)
        with self.volume.transaction() as tx:
            directory.add(tx, name, ino, inode.mode)
            tx.put_inode(parent, directory.finish(now))
            tx.put_inode(ino, inode._replace(nlink=inode.nlink + 1, ctime=now))

    # -- removing -------------------------------------------------------------------------------------------------

    def unlink(
        self, parent: Ino, name: bytes, in_same_transaction: Callable[[Transaction], object] | None = None
    ) -> None:
        """Remove the name of a file; ``in_same_transaction``: what else happens with it.

        Raises FsError: ENOENT, EISDIR, EPERM, EBUSY (see Guard.may_unlink).
        """
        directory = open_directory(self.volume, parent)
        entry = self.entry(directory, name)
        inode = self.volume.inode(entry.ino)
        if stat.S_ISDIR(inode.mode):
            raise FsError(errno.EISDIR, quoted(name))
        check_removable(entry.ino, name)
        check_not_held(entry.ino, inode)
        if inode.flags & GUARDED:
            self.guard.may_unlink(entry.ino, inode)
        now = self.volume.clock()
        with self.volume.transaction() as tx:
            directory.remove(tx, entry)
            tx.put_inode(parent, directory.finish(now))
            self.drop_name(tx, entry.ino, inode, now)
            if in_same_transaction:
                in_same_transaction(tx)
        self.reclaimer.reap(entry.ino)

    def rmdir(self, parent: Ino, name: bytes) -> None:
        """Remove an empty directory.  Raises FsError: ENOENT, ENOTDIR, ENOTEMPTY, EPERM, EINVAL for "."."""
        if name in (b".", b".."):
            raise FsError(errno.EINVAL if name == b"." else errno.ENOTEMPTY, quoted(name))
        directory = open_directory(self.volume, parent)
        entry = self.entry(directory, name)
        inode = open_directory(self.volume, entry.ino).inode
        if inode.root:
            raise FsError(errno.ENOTEMPTY, quoted(name))
        check_removable(entry.ino, name)
        self.quotas.drop(entry.ino, parent)
        inode = self.volume.inode(entry.ino)
        now = self.volume.clock()
        with self.volume.transaction() as tx:
            directory.remove(tx, entry)
            changed = directory.finish(now)
            tx.put_inode(parent, changed._replace(nlink=changed.nlink - 1))
            self.drop_name(tx, entry.ino, inode, now)
        self.reclaimer.reap(entry.ino)

    def drop_name(self, tx: Transaction, ino: Ino, inode: Inode, now: int) -> None:
        """Take one name from an inode: without one it goes, or is an orphan for now."""
        left = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        if not left:
            self.content.check_unmapped(ino, inode, FIRST)
        inode = inode._replace(nlink=left, ctime=now)
        tx.put_inode(ino, inode)
        if left:
            return
        if not self.reclaimer.referenced(ino) and self.reclaimer.is_small(ino, inode):
            self.reclaimer.free_part(tx, ino, inode)
        else:
            self.orphans.add(tx, ino)
