"""Repair of quotas: what each inode counts against.  What is used is a field, which the next round sets."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from pkernfs.errors import PkernfsError
from pkernfs.format import ORPHANS_INO, ROOT_INO, Ino
from pkernfs.fs.directory import Directory
from pkernfs.fs.volume import Volume
from pkernfs.fsck.findings import NO_INO
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import Work, batches


def projects(work: Work) -> None:
    """Every inode counts against the quota that encloses it; one without a name against none."""
    if all(finding.data for finding in work.findings):  # none, or fields that are wrong for another reason
        return
    volume = work.volume
    for batch in batches(_wanted(volume, work.reached.listed)):
        with volume.transaction() as tx:
            for ino, project in batch:
                inode = volume.inode(ino)
                tx.put_inode(ino, inode._replace(project=project))
                text = f"inode {ino}: counts against {project}, not {inode.project}"
                work.note(Code.PROJECT, text, ino=ino)


def _wanted(volume: Volume, orphans: set[Ino]) -> Iterator[tuple[Ino, Ino]]:
    """(inode, project) of all that name another one.  What is damaged is left to other stages."""
    if volume.inode(ROOT_INO).project not in (0, ROOT_INO):
        yield ROOT_INO, NO_INO
    seen = set()
    linked: dict[Ino, list[Ino]] = {}
    todo = [(ROOT_INO, ROOT_INO if _has_quota(volume, ROOT_INO) else NO_INO)]
    while todo:
        top, project = todo.pop()
        for entry in list(Directory(volume, top, volume.inode(top)).scan()):
            try:
                inode = volume.inode(entry.ino)
            except PkernfsError:
                continue
            own = _has_quota(volume, entry.ino)
            if stat.S_ISDIR(inode.mode) and entry.ino not in seen:
                seen.add(entry.ino)
                todo.append((entry.ino, entry.ino if own else project))
            if inode.nlink > 1 and not stat.S_ISDIR(inode.mode):
                linked.setdefault(entry.ino, []).append(project)
            elif not own and inode.project != project:
                yield entry.ino, project
    for ino, found in linked.items():
        # Under a quota, if any of its names is.
        if volume.inode(ino).project not in (found if not max(found) else set(found) - {NO_INO}):
            yield ino, max(found)
    for ino in orphans - {ORPHANS_INO}:
        project = Ino(volume.inode(ino).project)
        if project and ino not in seen and not _has_quota(volume, project):
            yield ino, NO_INO


def _has_quota(volume: Volume, ino: Ino) -> bool:
    try:
        inode = volume.inode(ino)
    except PkernfsError:
        return False
    return stat.S_ISDIR(inode.mode) and inode.project == ino
