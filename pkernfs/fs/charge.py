"""Charging quotas: what a transaction takes counts against the directories with a quota that it is taken below."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import INLINE_SIZE, INODE_SIZE, PAGE, QUOTA, ROOT_INO, Ino, Inode, Quota
from pkernfs.fs.cache import Cache
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.transaction import Transaction


def cost(inode: Inode) -> int:
    """Bytes that an inode counts for: its slot and its pages."""
    return INODE_SIZE + inode.pages * PAGE if inode.mode else 0


def quota_of(inode: Inode) -> Quota:
    """The quota of a directory that has one."""
    return QUOTA.unpack(inode.inline)


def has_quota(inode: Inode) -> bool:
    """Whether what stands inline in a directory is a quota that counts, whatever ``project`` says."""
    return bool(quota_of(inode).limit) and not inode.inline[QUOTA.size :].strip(b"\0")


def with_quota(inode: Inode, quota: Quota) -> Inode:
    """The directory with this quota in it."""
    return inode._replace(inline=QUOTA.pack(quota) + bytes(INLINE_SIZE - QUOTA.size))


def without_quota(inode: Inode, enclosing: Ino) -> Inode:
    """A directory whose quota is taken away, in project ``enclosing``."""
    return inode._replace(project=enclosing, inline=bytes(INLINE_SIZE))


def enclosing_project(cache: Cache, ino: Ino, inode: Inode) -> Ino:
    """The project that the directory with a quota ``ino`` itself is in, or 0."""
    return Ino(0) if ino == ROOT_INO else cache.inode_named_by(ino, inode.parent).project


def chain(cache: Cache, tx: Transaction | None, ino: Ino, project: Ino) -> Iterator[tuple[Ino, Inode]]:
    """The directories with a quota against which inode ``ino``, which names ``project``, counts.

    Raises CorruptError.
    """
    seen = set()
    while project:
        inode = (tx and tx.inodes.get(project)) or cache.inode_named_by(ino, project)
        # This very transaction may give or take the quota, or remove the directory.
        before = tx.before.get(project, inode) if tx else inode
        if project in seen or not stat.S_ISDIR(before.mode) or project not in (before.project, inode.project):
            if stat.S_ISDIR(before.mode) and has_quota(before):
                # It is the directory's own record that is wrong.
                ino, project = project, before.project
            raise corrupt_inode(ino, f"inode {project} as its project, which is no directory with a quota around it")
        seen.add(project)
        ino = project
        if inode.project == project:
            yield project, inode
            project = enclosing_project(cache, project, inode)
        else:
            project = inode.project


def charge(tx: Transaction) -> None:
    """Add to the quotas what the transaction takes, and subtract what it gives back.  Raises FsError(EDQUOT).

    What only gives back always succeeds, also beyond the limit.
    """
    cache = tx.cache
    sums: dict[Ino, int] = {}
    for ino, inode in tx.inodes.items():
        before = tx.before[ino]
        if before.project == inode.project:
            moved = [(inode.project, cost(inode) - cost(before))] if inode.project else []
        else:
            moved = [(before.project, -cost(before)), (inode.project, cost(inode))]
        for project, amount in moved:
            try:
                for counted, _ in chain(cache, tx, ino, project) if amount else ():
                    sums[counted] = sums.get(counted, 0) + amount
            except CorruptError as error:
                if amount > 0:
                    raise
                # What is damaged must not keep anything from being removed.
                cache.damage.note(CorruptError(error.what, error.offset, error.found))
    for project, amount in sums.items():
        inode = tx.inodes.get(project) or cache.inode(project)
        if not inode.mode:
            continue  # freed in this very transaction
        quota = quota_of(inode)
        if not quota.limit or not amount:
            continue
        if not -amount <= quota.used <= cache.total_pages * PAGE:
            found = f"{quota.used} bytes used, in a region of {cache.total_pages * PAGE}"
            cache.damage.note(CorruptError(f"the quota of inode {project}", project * INODE_SIZE, found))
        elif amount > 0 and quota.used + amount > quota.limit:
            raise FsError(errno.EDQUOT, f"{quota.used} of {quota.limit} bytes are used, {amount} more wanted")
        if project in cache.damage.inodes:
            continue  # frozen: fsck counts anew
        # A wrong count is damage, which fsck mends: it must not keep anything from being removed.
        used = min(max(quota.used + amount, 0), cache.total_pages * PAGE)
        tx.put_inode(project, with_quota(inode, quota._replace(used=used)))


def check_room(tx: Transaction, ino: Ino, inode: Inode, pages: int) -> None:
    """Raise FsError(EDQUOT) when ``pages`` more of an inode do not fit: before they are allocated."""
    for _, directory in chain(tx.cache, tx, ino, inode.project):
        quota = quota_of(directory)
        if quota.limit and quota.used + pages * PAGE > quota.limit:
            raise FsError(errno.EDQUOT, f"{quota.used} of {quota.limit} bytes are used, {pages * PAGE} more wanted")
