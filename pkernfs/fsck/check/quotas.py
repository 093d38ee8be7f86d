"""Quotas: which directory each inode counts against, and what is used."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from pkernfs.format import QUOTA, ROOT_INO, Inode
from pkernfs.fs.charge import cost, has_quota, quota_of, with_quota, without_quota

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker


def quota_form(checker: Checker, ino: int, inode: Inode) -> None:
    """A quota, or nothing, stands inline in a directory; the inode is added to what its project uses."""
    if inode.project:
        checker.used[inode.project] = checker.used.get(inode.project, 0) + cost(inode)
    if stat.S_ISDIR(inode.mode):
        if inode.project != ino and inode.nlink and has_quota(inode):
            checker.note("project", f"directory {ino:#x}: expected itself as its project, found {inode.project:#x}")
            checker.correct(ino, project=ino)
            return
        least = QUOTA.size if inode.project == ino else 0
        if inode.inline[least:].strip(b"\0"):
            checker.note("quota", f"directory {ino:#x}: expected zeros behind a quota, found other bytes")
            right = with_quota(inode, quota_of(inode)) if least else without_quota(inode, inode.project)
            checker.correct(ino, inline=right.inline)


def project(checker: Checker, parent: int, above: Inode, ino: int, inode: Inode) -> None:
    """Note an entry that counts for another project than its directory: compared later, when all can be read.

    Of a file with names under several quotas, which only damage makes, one must be where it counts.
    """
    is_dir = stat.S_ISDIR(inode.mode)
    if inode.nlink > 1 and not is_dir and (inode.project or above.project):
        checker.linked.setdefault(ino, set()).add(parent)
    elif inode.project != above.project and not (is_dir and inode.project == ino):
        checker.odd_projects[parent, inode.project] = ino


def quotas(checker: Checker) -> None:
    """Every inode counts against the quota above it, and the quotas say what is used."""
    root = checker.inode(ROOT_INO)
    if root and root.project not in (0, ROOT_INO):
        _note_project(checker, ROOT_INO, root.project)
    for (parent, found), ino in checker.odd_projects.items():
        if found not in _projects(checker, parent):
            _note_project(checker, ino, found)
    for ino, parents in checker.linked.items():
        linked = checker.inode(ino)
        if linked and not any(linked.project in _projects(checker, parent) for parent in parents):
            _note_project(checker, ino, linked.project)
    for ino in checker.used:
        if not _is_quota(checker, ino):
            checker.note("project", f"project {ino:#x}: expected a directory with a quota, found none", ino=ino)
            checker.projects_wrong = True
    if checker.projects_wrong or checker.ledger.incomplete:
        return
    sums: dict[int, int] = {}
    for ino, used in checker.used.items():
        for above in _quotas_above(checker, ino):
            sums[above] = sums.get(above, 0) + used
    for ino, total in sums.items():
        inode = checker.inode(ino)
        if inode is None:
            continue
        quota = quota_of(inode)
        used = min(total, (1 << 64) - 1)  # a damaged count of pages can be any number
        if quota.limit and quota.used != used:
            checker.note("quota", f"directory {ino:#x}: expected {used} bytes used, found {quota.used}", ino=ino)
            checker.correct(ino, inline=with_quota(inode, quota._replace(used=used)).inline)


def _note_project(checker: Checker, ino: int, found: int) -> None:
    checker.note("project", f"inode {ino:#x}: expected the quota that is above it, found {found:#x}", ino=ino)
    checker.projects_wrong = True


def _is_quota(checker: Checker, ino: int) -> bool:
    inode = checker.inode(ino) if checker.in_use(ino) else None
    return inode is not None and stat.S_ISDIR(inode.mode) and inode.project == ino


def _projects(checker: Checker, ino: int) -> set[int]:
    """What may stand in an entry of directory ``ino``: the first quota above with a limit, and those without before."""
    found: set[int] = set()
    seen = set()
    while ino not in seen:
        seen.add(ino)
        inode = checker.inode(ino) if checker.in_use(ino) else None
        if inode is None:
            break
        if inode.project == ino:
            found.add(ino)
            if quota_of(inode).limit:
                return found
        ino = inode.parent
    return found | {0}


def _quotas_above(checker: Checker, ino: int) -> set[int]:
    """The directories with a quota from ``ino``, which is one, up to the root."""
    found: set[int] = set()
    while ino and ino not in found and _is_quota(checker, ino):
        found.add(ino)
        inode = checker.inode(ino)
        above = checker.inode(inode.parent) if inode and ino != ROOT_INO and checker.in_use(inode.parent) else None
        ino = above.project if above else 0
    return found
