"""Renaming: rename(2) in all its forms."""

from __future__ import annotations

import errno
import stat

from pkernfs.errors import FsError, quoted
from pkernfs.format import GUARDED, ROOT_INO, Ino, Inode
from pkernfs.fs.damage import NO_INO, corrupt_inode
from pkernfs.fs.directory import Entry, check_name
from pkernfs.fs.holds import check_not_held
from pkernfs.fs.names import Names, check_project, check_removable
from pkernfs.fs.transaction import Transaction

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class Renames:
    """Names that change, and move to other directories."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.volume = names.volume

    def rename(self, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, flags: int = 0) -> None:
        """Move or replace a name, or exchange two, as renameat2(2) does.  Flags: RENAME_NOREPLACE or RENAME_EXCHANGE.

        Raises FsError: ENOENT, EEXIST, ENOTDIR, EISDIR, ENOTEMPTY, EINVAL (into itself, unknown flags), EPERM (held)
        and EBUSY (see Guard.may_move, may_unlink), ENOSPC, EDQUOT, EXDEV (from one quota to another, as project quotas
        of other filesystems have it).
        """
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise FsError(errno.EINVAL, f"expected no flags, RENAME_NOREPLACE or RENAME_EXCHANGE, found {flags:#x}")
        check_name(new_name)
        source = self.names.directory(parent)
        target = source if new_parent == parent else self.names.directory(new_parent)
        old = self.names.entry(source, name)
        new = target.find(new_name)
        if new is not None:
            target.target(new)
        check_removable(old.ino, name)
        if flags == RENAME_EXCHANGE and new is None:
            raise FsError(errno.ENOENT, quoted(new_name))
        if flags == RENAME_NOREPLACE and new is not None:
            raise FsError(errno.EEXIST, quoted(new_name))
        moved = self.volume.inode(old.ino)
        if stat.S_ISDIR(moved.mode):
            self._check_not_below(old.ino, new_parent)
        if new is None:
            target.check_takes(new_name)
        elif new.ino == old.ino:
            return
        else:
            check_removable(new.ino, new_name)
            check_not_held(new.ino, self.volume.inode(new.ino))
        check_not_held(old.ino, moved)
        if source is not target:
            self.names.guard.may_move(source.inode, target.inode)
        check_project(source.inode, target.inode)
        if new is not None and flags != RENAME_EXCHANGE:
            self._check_replaceable(new, moved)
            replaced = self.volume.inode(new.ino)
            if replaced.flags & GUARDED:
                self.names.guard.may_unlink(new.ino, replaced)
            self.names.quotas.drop(new.ino, parent, new_parent, old.ino)
        now = self.volume.clock()
        with self.volume.transaction() as tx:
            if flags == RENAME_EXCHANGE and new is not None:
                other = self.volume.inode(new.ino)
                if stat.S_ISDIR(other.mode):
                    self._check_not_below(new.ino, parent)
                source.replace(tx, old, new.ino, other.mode)
                target.replace(tx, new, old.ino, moved.mode)
                self._moved(tx, new.ino, other, parent, now)
                links = stat.S_ISDIR(moved.mode) - stat.S_ISDIR(other.mode)
            else:
                links = stat.S_ISDIR(moved.mode) + 0
                if new is not None:
                    self.names.drop_name(tx, new.ino, self.volume.inode(new.ino), now)
                    target.replace(tx, new, old.ino, moved.mode)
                else:
                    target.add(tx, new_name, old.ino, moved.mode)
                source.remove(tx, old)
            # Read again: listing the target as an orphan may have changed the links of this one.
            self._moved(tx, old.ino, self.volume.inode(old.ino), new_parent, now)
            lost = stat.S_ISDIR(new.mode) + 0 if new is not None and flags != RENAME_EXCHANGE else 0
            if source is target:
                inode = source.finish(now)
                tx.put_inode(parent, inode._replace(nlink=inode.nlink - lost))
            else:
                inode = source.finish(now)
                tx.put_inode(parent, inode._replace(nlink=inode.nlink - links))
                inode = target.finish(now)
                tx.put_inode(new_parent, inode._replace(nlink=inode.nlink + links - lost))
        if new is not None and flags != RENAME_EXCHANGE:
            self.names.reclaimer.reap(new.ino)

    def _check_not_below(self, ino: Ino, place: Ino) -> None:
        """Raise FsError(EINVAL) when directory ``place`` is ``ino`` or below it."""
        at, inode = place, self.volume.inode(place)
        seen = set()
        while at != ROOT_INO and at not in seen:
            seen.add(at)
            if at == ino:
                raise FsError(errno.EINVAL, "a directory cannot move below itself")
            at, inode = inode.parent, self.volume.inode_named_by(at, inode.parent)
        if at != ROOT_INO:
            found = "its parents do not end at the root"
            raise corrupt_inode(place, found)

    def _check_replaceable(self, new: Entry, moved: Inode) -> None:
        inode = self.volume.inode(new.ino)
        if stat.S_ISDIR(moved.mode) != stat.S_ISDIR(inode.mode):
            raise FsError(errno.ENOTDIR if stat.S_ISDIR(moved.mode) else errno.EISDIR, quoted(new.name))
        if stat.S_ISDIR(inode.mode) and inode.root:
            raise FsError(errno.ENOTEMPTY, quoted(new.name))

    def _moved(self, tx: Transaction, ino: Ino, inode: Inode, parent: Ino, now: int) -> None:
        is_dir = stat.S_ISDIR(inode.mode)
        tx.put_inode(ino, inode._replace(ctime=now, parent=parent if is_dir else NO_INO))
