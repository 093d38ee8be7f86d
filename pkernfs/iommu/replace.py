"""Replacing the tables of a domain while devices go on with DMA; and freeing what hardware has forgotten."""

from __future__ import annotations

import errno
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import INODE_SIZE, ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.records import Records
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.edit import tables_below
from pkernfs.iommu.formats import LEAVES
from pkernfs.iommu.hwpt import Hwpt, commit, domains
from pkernfs.iommu.stale import Invalidation, add, clear, pending
from pkernfs.iommu.translations import Note, Tables, compare, expected


class Replaced(NamedTuple):
    """What a replacement has done."""

    before: int  #: tables
    after: int
    compared: int  #: ranges that both lead to the same memory


def replace(fs: Filesystem, ino: int, leaf: int = 0, request: int = 0) -> Replaced:
    """Build the tables of a domain anew beside the old ones, compare every translation, and lead each device to them
    with one store.  ``leaf``: the largest level of leaves that are made from now on; 0: as before.

    The old ones stay until hardware has forgotten them (``forgotten``).  Raises FsError: ENOSPC, EINVAL; CorruptError
    when the old tables do not say what the mappings say: nothing is changed then.
    """
    if leaf not in (0, *LEAVES):
        raise FsError(errno.EINVAL, f"expected leaves of level 1, 2 or 3, found {leaf!r}")
    volume = fs.volume
    figures = [0, 0, 0]

    def change(roots: Records, compact: bool) -> int:
        hwpt = Hwpt(volume, ino)
        if leaf:
            hwpt.record = hwpt.record._replace(leaf=leaf)
        hwpt.prepare(roots)
        old = hwpt.record
        given_up = list(tables_below(hwpt.form, hwpt.pages, old.levels, old.root))
        editor = hwpt.editor()
        root = editor.build(old.levels, 0, list(expected(hwpt)))
        before, after = Tables(hwpt, _refuse(hwpt)), Tables(hwpt, _refuse(hwpt))
        after.root = root
        compared = list(after.pieces())
        for found in compare(before.pieces(), iter(compared)):
            _refuse(hwpt)("", found.iova, f"the tables lead to {found.left}, the mappings to {found.right}")
        figures[:] = len(given_up), editor.made, len(compared)
        hwpt.record = old._replace(root=root, stale=old.stale + len(given_up))
        contexts = Contexts(volume, roots)
        hot = hwpt.is_hot(roots)
        for requester, attachment in list(roots.attachments()):
            if attachment.domain == ino:
                contexts.lead(old.tables, requester, hwpt.entry[0])
                add(roots, Invalidation(old.id, requester=requester))
        if hot:
            add(roots, Invalidation(old.id))
        contexts.finish()
        hwpt.save()
        return len(given_up)

    before = commit(fs, request, change)
    return Replaced(before, figures[1], figures[2])


def _refuse(hwpt: Hwpt) -> Note:
    def note(kind: str, iova: int, text: str) -> None:
        raise CorruptError(f"domain {hwpt.ino}", hwpt.ino * INODE_SIZE, f"IOVA {iova:#x}: {text}", ino=hwpt.ino)

    return note


def stale(fs: Filesystem) -> list[Invalidation]:
    """What hardware may have cached and must forget."""
    return list(pending(Records(fs.volume, ROOT_PGTABLES_INO)))


def forgotten(fs: Filesystem, request: int = 0) -> int:
    """All of that has been invalidated: the pages that nothing leads to are free.  How many of those there were."""

    def change(roots: Records, compact: bool) -> int:
        clear(roots)
        freed = 0
        for _, ino in domains(fs):
            hwpt = Hwpt(fs.volume, ino)
            if hwpt.record.stale:
                freed += hwpt.sweep()
                hwpt.save()
        return freed

    return commit(fs, request, change)
