"""Replacing the tables of a domain while devices go on with DMA; and freeing what hardware has forgotten."""

from __future__ import annotations

import errno
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.edit import tables_below
from pkernfs.iommu.formats import LEAVES
from pkernfs.iommu.records import Records
from pkernfs.iommu.requests import commit
from pkernfs.iommu.stale import Invalidation, add, clear, generation, pending
from pkernfs.iommu.translations import Note, Tables, compare, expected


class Replaced(NamedTuple):
    """What a replacement has done."""

    before: int  #: tables
    after: int
    compared: int  #: ranges that both lead to the same memory


def replace(fs: Filesystem, ino: int, leaf: int = 0, *, rebuild: bool = False, request: int = 0) -> Replaced:
    """Build the tables of a domain anew beside the old ones, compare every translation, and lead each device to them
    with one store.  ``leaf``: the largest level of leaves that are made from now on; 0: as before.

    ``rebuild``: the old tables are damaged.  Nothing is compared, and what their bitmaps say is not relied on.

    The old ones stay until hardware has forgotten them (``forgotten``).  Raises FsError: ENOSPC, EINVAL; CorruptError
    when the old tables do not say what the mappings say: nothing is changed then.
    """
    if leaf not in (0, *LEAVES):
        raise FsError(errno.EINVAL, f"expected leaves of level 1, 2 or 3, found {leaf!r}")
    volume = fs.volume
    compared = [0]

    def change(roots: Records, compact: bool) -> int:
        domain = Domain(volume, ino)
        domain.check_named()
        if leaf:
            domain.record = domain.record._replace(leaf=leaf)
        if rebuild:
            volume.tables_checked.add(ino)
            domain.pages.use_new_blocks()
        domain.prepare(roots)
        old = domain.record
        given_up = 0 if rebuild else sum(1 for _ in tables_below(domain.form, domain.pages, old.levels, old.root))
        editor = domain.editor()
        root = editor.build(old.levels, 0, list(expected(domain)))
        before, after = Tables(domain, _refuse(domain)), Tables(domain, _refuse(domain))
        after.root = root
        translations = list(after.pieces())
        waiting = old.stale + given_up
        if rebuild:
            waiting = max(domain.pages.used_count() - editor.made, 0)
        else:
            for found in filter(None, compare(before.pieces(), iter(translations))):
                _refuse(domain)("", found.iova, f"the tables lead to {found.left}, the mappings to {found.right}")
        compared[0] = 0 if rebuild else len(translations)
        domain.record = old._replace(root=root, stale=waiting)
        _switch(domain, roots, rebuild)
        domain.save()
        return given_up << 32 | editor.made

    before, after = divmod(commit(fs, request, change), 1 << 32)
    return Replaced(before, after, compared[0])


def _switch(domain: Domain, roots: Records, rebuild: bool) -> None:
    """Lead the devices of a domain to its tables, within the open transaction; all of each entry is stored if asked."""
    contexts = Contexts(domain.volume, roots)
    hot = domain.is_hot(roots)
    for requester, attachment in list(roots.attachments()):
        if attachment.domain == domain.ino:
            if rebuild:
                contexts.store(domain.record.tables, requester, domain.entry)
            else:
                contexts.lead(domain.record.tables, requester, domain.entry[0])
            add(roots, Invalidation(domain.record.id, requester=requester))
    if hot:
        add(roots, Invalidation(domain.record.id))
    contexts.finish()


def _refuse(domain: Domain) -> Note:
    def note(kind: str, iova: int, text: str) -> None:
        raise domain.pages.bad(f"IOVA {iova:#x}: {text}")

    return note


def stale(fs: Filesystem) -> list[Invalidation]:
    """What hardware may have cached and must forget."""
    return list(pending(Records(fs.volume, ROOT_PGTABLES_INO)))


def forgotten(fs: Filesystem, listed: int = 0, request: int = 0) -> int:
    """All of that has been invalidated: the pages that nothing leads to are free.  How many of those there were.

    ``listed``: the generation of the list that was worked through, 0: not known.  Raises FsError(EAGAIN) when more has
    come since.
    """
    removed = [ino for ino in fs.orphans() if fs.is_guarded(ino)]

    def change(roots: Records, compact: bool) -> int:
        if listed not in (0, generation(roots)):
            raise FsError(errno.EAGAIN, "more has become stale since that was listed: list it again")
        clear(roots)
        freed = 0
        for _, ino in named_domains(fs.volume):
            try:
                domain = Domain(fs.volume, ino)
                if not domain.record.stale:
                    continue
                freed += domain.sweep()
            except CorruptError as error:
                fs.complain(error)  # its pages go on waiting
                continue
            domain.save()
        return freed

    freed = commit(fs, request, change)
    for ino in removed:
        fs.reap(ino)
    return freed
