"""Replacing the tables of a domain while devices go on with DMA."""

from __future__ import annotations

import errno
from typing import NamedTuple

from pkernfs.errors import FsError
from pkernfs.format import Ino, Iova
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.domain import Domain, tables_checked
from pkernfs.iommu.edit import tables_below
from pkernfs.iommu.formats import IOVA_START, LEAVES
from pkernfs.iommu.invalidations import Invalidation, add
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import commit
from pkernfs.iommu.translations import Note, Tables, compare, expected


class Replaced(NamedTuple):
    """What a replacement has done."""

    before: int  #: tables
    after: int
    compared: int  #: ranges that both translate to the same memory


def replace(fs: Filesystem, ino: Ino, leaf: int = 0, *, rebuild: bool = False, key: int = 0) -> Replaced:
    """Build the tables of a domain anew beside the old ones, and point each device to them with one store.

    Every translation is compared before.  ``leaf``: the largest level of leaves that are made from now on; 0: as it
    was.

    ``rebuild``: the old tables are damaged.  Nothing is compared, and what their bitmaps say is not relied on.

    The old ones stay until it is acknowledged that hardware has invalidated them (``reclaim``).  Raises FsError:
    ENOSPC, EINVAL; CorruptError when the old tables do not say what the mappings say: nothing is changed then.
    """
    if leaf not in (0, *LEAVES):
        raise FsError(errno.EINVAL, f"expected leaves of level 1, 2 or 3, found {leaf}")
    volume = fs.volume
    compared = [0]

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        domain = Domain(volume, ino)
        domain.check_named()
        if leaf:
            domain.record = domain.record._replace(leaf=leaf)
        if rebuild:
            tables_checked(volume).add(ino)
            domain.pages.use_new_blocks()
        domain.prepare(tx, roots)
        old = domain.record
        given_up = 0 if rebuild else sum(1 for _ in tables_below(domain.form, domain.pages, old.levels, domain.root))
        editor = domain.editor(tx)
        root = editor.build(old.levels, IOVA_START, list(expected(domain)))
        before, after = Tables(domain, _refuse(domain)), Tables(domain, _refuse(domain))
        after.root = root
        translations = list(after.pieces())
        awaiting = old.awaiting + given_up
        if rebuild:
            awaiting = max(domain.pages.used_count() - editor.made, 0)
        else:
            for found in filter(None, compare(before.pieces(), iter(translations))):
                _refuse(domain)("", found.iova, f"the tables say {found.left}, the mappings {found.right}")
        compared[0] = 0 if rebuild else len(translations)
        domain.record = old._replace(root=root, awaiting=awaiting)
        _switch(tx, domain, roots, rebuild)
        domain.save(tx)
        return given_up << 32 | editor.made  # both in the one number that the reply cache keeps of a verb

    before, after = divmod(commit(fs, key, change), 1 << 32)
    return Replaced(before, after, compared[0])


def _switch(tx: Transaction, domain: Domain, roots: Records, rebuild: bool) -> None:
    """Point the devices of a domain to its tables.  ``rebuild``: whole entries."""
    contexts = Contexts(domain.volume, roots)
    may_access = domain.hw_may_access(roots)
    for requester, attachment in list(roots.attachments()):
        if attachment.domain == domain.ino:
            if rebuild:
                contexts.store(tx, domain.record.tables, requester, domain.entry)
            else:
                contexts.point(tx, domain.record.tables, requester, domain.entry[0])
            add(tx, roots, Invalidation(domain.id, requester=requester))
    if may_access:
        add(tx, roots, Invalidation(domain.id))
    contexts.finish(tx)


def _refuse(domain: Domain) -> Note:
    def note(_kind: str, iova: Iova | None, text: str) -> None:
        raise domain.pages.bad(f"IOVA {iova:#x}: {text}")

    return note
