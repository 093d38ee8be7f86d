"""Quotas: which directory each inode counts against, and what is used."""

from __future__ import annotations

import stat

from pkernfs.format import QUOTA, ROOT_INO, Ino, Inode
from pkernfs.fs.charge import cost, has_quota, quota_of, with_quota, without_quota
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import NO_INO, Fields
from pkernfs.fsck.problems import Code


def quota_form(check: Check, ino: Ino, inode: Inode) -> None:
    """A quota, or nothing, stands inline in a directory; the inode is added to what its project uses."""
    used = check.quotas.used
    if inode.project:
        used[Ino(inode.project)] = used.get(Ino(inode.project), 0) + cost(inode)
    if stat.S_ISDIR(inode.mode):
        if inode.project != ino and inode.nlink and has_quota(inode):
            text = f"directory {ino}: expected itself as its project, found {inode.project}"
            check.note(Code.PROJECT, text, data=Fields(ino, {"project": ino}))
            return
        least = QUOTA.size if inode.project == ino else 0
        if inode.inline[least:].strip(b"\0"):
            right = with_quota(inode, quota_of(inode)) if least else without_quota(inode, inode.project)
            text = f"directory {ino}: expected zeros behind a quota, found other bytes"
            check.note(Code.QUOTA, text, data=Fields(ino, {"inline": right.inline}))


def project(check: Check, parent: Ino, directory: Inode, ino: Ino, inode: Inode) -> None:
    """Note an entry that counts for another project than its directory: compared later, when all can be read.

    Of a file with names under several quotas, which only damage makes, one must be where it counts.
    """
    is_dir = stat.S_ISDIR(inode.mode)
    if inode.nlink > 1 and not is_dir and (inode.project or directory.project):
        check.quotas.linked.setdefault(ino, set()).add(parent)
    elif inode.project != directory.project and not (is_dir and inode.project == ino):
        check.quotas.odd[parent, Ino(inode.project)] = ino


def quotas(check: Check) -> None:
    """Every inode counts against the nearest quota that encloses it, and the quotas say what is used."""
    wrong = _wrong_projects(check)
    for ino, found in wrong:
        text = f"inode {ino}: expected the quota that encloses it, found {found or 'none'}"
        check.note(Code.PROJECT, text, ino=ino)
    for ino in check.quotas.used:
        if not _is_quota(check, ino):
            text = f"project {ino}: expected a directory with a quota, found none"
            check.note(Code.PROJECT, text, ino=ino)
            wrong.append((ino, ino))
    if wrong or check.findings.incomplete:
        return
    sums: dict[Ino, int] = {}
    for ino, used in check.quotas.used.items():
        for enclosing in _enclosing_quotas(check, ino):
            sums[enclosing] = sums.get(enclosing, 0) + used
    for ino, total in sums.items():
        inode = check.inode(ino)
        if inode is None:
            continue
        quota = quota_of(inode)
        used = min(total, (1 << 64) - 1)  # a damaged count of pages can be any number
        if quota.limit and quota.used != used:
            text = f"directory {ino}: expected {used} bytes used, found {quota.used}"
            inline = with_quota(inode, quota._replace(used=used)).inline
            check.note(Code.QUOTA, text, ino=ino, data=Fields(ino, {"inline": inline}))


def _wrong_projects(check: Check) -> list[tuple[Ino, int]]:
    """(inode, its project) of those that count against a quota which does not enclose them."""
    wrong: list[tuple[Ino, int]] = []
    root = check.inode(ROOT_INO)
    if root and root.project not in (0, ROOT_INO):
        wrong.append((ROOT_INO, root.project))
    for (parent, found), ino in check.quotas.odd.items():
        if found not in _projects(check, parent):
            wrong.append((ino, found))
    for ino, parents in check.quotas.linked.items():
        linked = check.inode(ino)
        if linked and not any(linked.project in _projects(check, parent) for parent in parents):
            wrong.append((ino, linked.project))
    return wrong


def _is_quota(check: Check, ino: Ino) -> bool:
    inode = check.inode(ino) if check.memory.in_use(ino) else None
    return inode is not None and stat.S_ISDIR(inode.mode) and inode.project == ino


def _projects(check: Check, ino: Ino) -> set[Ino]:
    """What may stand in an entry of directory ``ino``: the nearest quota with a limit, and those without before it."""
    found: set[Ino] = set()
    seen = set()
    while ino not in seen:
        seen.add(ino)
        inode = check.inode(ino) if check.memory.in_use(ino) else None
        if inode is None:
            break
        if inode.project == ino:
            found.add(ino)
            if quota_of(inode).limit:
                return found
        ino = Ino(inode.parent)
    return found | {NO_INO}


def _enclosing_quotas(check: Check, ino: Ino) -> set[Ino]:
    """The directories with a quota from ``ino``, which is one, up to the root."""
    found: set[Ino] = set()
    while ino and ino not in found and _is_quota(check, ino):
        found.add(ino)
        inode = check.inode(ino)
        outer = Ino(inode.parent) if inode and ino != ROOT_INO else NO_INO
        parent = check.inode(outer) if outer and check.memory.in_use(outer) else None
        ino = Ino(parent.project) if parent else NO_INO
    return found
