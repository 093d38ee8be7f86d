"""Quotas of directories: what a directory and all that is below it may use of the region.

They are kept by marking every inode below (``project``), so that all that is taken can be charged where it is taken;
setting and taking away mark a tree anew.  While the limit is 0 nothing is counted, so that a crash in between leaves
marks that mean nothing; setting it again finishes them.  A file that lost its last name before goes on counting where
it did: it is not below anything.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pkernfs.errors import FsError
from pkernfs.format import Ino, Inode, Quota
from pkernfs.fs.charge import chain, cost, enclosing_project, quota_of, with_quota, without_quota
from pkernfs.fs.damage import NO_INO
from pkernfs.fs.directory import open_directory
from pkernfs.fs.orphans import BATCH, Orphans
from pkernfs.fs.volume import Volume


class Use(NamedTuple):
    """A quota: of which directory, and how much of it is used; bytes.  ``ino`` 0: there is none."""

    ino: Ino
    limit: int
    used: int


class Quotas:
    """The quotas of a volume."""

    def __init__(self, volume: Volume, orphans: Orphans) -> None:
        self.volume = volume
        self.orphans = orphans

    def get(self, ino: Ino) -> Use:
        """The quota that counts first for what is made in (or written to) ``ino``."""
        for project, inode in chain(self.volume.cache, None, ino, self.volume.inode(ino).project):
            quota = quota_of(inode)
            if quota.limit:
                return Use(project, quota.limit, quota.used)
        return Use(NO_INO, 0, 0)

    def set(self, ino: Ino, limit: int) -> Use:
        """Limit directory ``ino`` to ``limit`` bytes, of which more may be used already; 0 takes the quota away.

        Raises FsError: ENOTDIR; EXDEV when a file below has a name elsewhere too: it could not count for both.
        """
        volume = self.volume
        inode = open_directory(volume, ino).inode
        had = inode.project == ino
        if had and limit and quota_of(inode).limit:
            # All is marked and counted.
            _store(volume, ino, with_quota(inode, quota_of(inode)._replace(limit=limit)))
            return self.get(ino)
        if not had and not limit:
            return self.get(ino)
        if limit:
            _check_links(volume, ino)
        enclosing = enclosing_project(volume.cache, ino, inode)
        _store(volume, ino, with_quota(inode._replace(project=ino), Quota(0, 0)))
        used = cost(volume.inode(ino)) + _mark(volume, ino, ino if limit else enclosing)
        inode = volume.inode(ino)
        if limit:
            _store(volume, ino, with_quota(inode, Quota(limit, used)))
        else:
            self.drop(ino)
        return self.get(ino)

    def drop(self, ino: Ino, *others: Ino) -> None:
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
        self.orphans.move(ino, enclosing)
        with volume.transaction(preparing=True) as tx:
            tx.put_inode(ino, without_quota(volume.inode(ino), enclosing))


def _store(volume: Volume, ino: Ino, inode: Inode) -> None:
    with volume.transaction() as tx:
        tx.put_inode(ino, inode)


def _below(volume: Volume, top: Ino) -> Iterator[tuple[Ino, Inode]]:
    """Everything below a directory, each directory before what is in it, each file once for each of its names.

    A directory with a limit of its own is given, and what is below it is not.
    """
    todo = [top]
    while todo:
        for entry in open_directory(volume, todo.pop()).scan(0):
            inode = volume.inode(entry.ino)
            yield entry.ino, inode
            if stat.S_ISDIR(inode.mode) and not _counts(entry.ino, inode):
                todo.append(entry.ino)


def _counts(ino: Ino, inode: Inode) -> bool:
    """Whether a directory has a quota that counts."""
    return inode.project == ino and bool(quota_of(inode).limit)


def _check_links(volume: Volume, top: Ino) -> None:
    """Raise FsError(EXDEV) when a file below ``top`` has a name elsewhere too."""
    names: dict[Ino, int] = {}
    for ino, inode in _below(volume, top):
        if not stat.S_ISDIR(inode.mode) and inode.nlink > 1:
            names[ino] = names.get(ino, inode.nlink) - 1
    for ino, left in names.items():
        if left:
            raise FsError(errno.EXDEV, f"inode {ino} has {left} more names elsewhere: find -inum {ino} lists them")


def _mark(volume: Volume, top: Ino, project: Ino) -> int:
    """Let everything below ``top`` count against ``project``; the bytes that it all uses."""
    used = 0
    seen: set[Ino] = set()
    below = _below(volume, top)
    while batch := list(islice(below, BATCH)):
        with volume.transaction() as tx:
            for ino, inode in batch:
                if stat.S_ISDIR(inode.mode) and _counts(ino, inode):
                    used += quota_of(inode).used
                    continue
                if inode.nlink > 1 and not stat.S_ISDIR(inode.mode):
                    if ino in seen:
                        continue
                    seen.add(ino)
                used += cost(inode)
                if inode.project == ino:
                    tx.put_inode(ino, without_quota(inode, project))
                elif inode.project != project:
                    tx.put_inode(ino, inode._replace(project=project))
    return used
