"""Reclaiming old tables and content, once it is acknowledged that hardware has invalidated what it had of them."""

from __future__ import annotations

import errno

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.awaiting import awaiting, release
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.invalidations import clear, generation
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import commit, replayed

BATCH = 500  #: records of content that one transaction drops: less than any journal holds


def acknowledge(fs: Filesystem, token: int = 0, key: int = 0) -> int:
    """All that is pending has been invalidated: the pages that nothing points to are free.  How many those were.

    Content that awaited it is released; of the files that have no name the memory is free then.

    ``token``: the generation of the list that was worked through, 0: whatever is listed.  Raises FsError(EAGAIN) when
    more has come since.
    """
    removed = [ino for ino in fs.orphans.inos() if fs.reclaimer.is_guarded(ino)]
    again = replayed(fs, key)
    if again is not None:
        return again
    if token not in (0, generation(Records(fs.volume, ROOT_PGTABLES_INO))):
        raise FsError(errno.EAGAIN, "more has become pending since that was listed: list it again")
    released = list(awaiting(Records(fs.volume, ROOT_PGTABLES_INO)))
    last = max(len(released) - 1, 0) // BATCH * BATCH
    # What is pending goes at the end: after a crash in between it is to be acknowledged again.
    for at in range(0, last, BATCH):
        with fs.volume.transaction() as tx:
            roots = Records(fs.volume, ROOT_PGTABLES_INO)
            release(tx, roots, released[at : at + BATCH])
            roots.finish(tx)

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        release(tx, roots, released[last:])
        clear(tx, roots)
        freed = 0
        for _, ino in named_domains(fs.volume):
            try:
                domain = Domain(fs.volume, ino)
                if not domain.record.awaiting:
                    continue
                freed += domain.reclaim(tx)
            except CorruptError as error:
                fs.volume.damage.complain(error)  # its pages go on waiting
                continue
            domain.save(tx)
        return freed

    freed = commit(fs, key, change)
    for ino in dict.fromkeys((*removed, *(one.ino for one in released))):
        fs.reclaimer.reap(ino)
    return freed
