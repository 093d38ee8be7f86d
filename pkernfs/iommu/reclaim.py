"""Reclaiming what tables were in, once it is acknowledged that hardware has invalidated what it had cached of them."""

from __future__ import annotations

import errno

from pkernfs.errors import CorruptError, FsError
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.invalidations import clear, generation
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import commit


def acknowledge(fs: Filesystem, token: int = 0, key: int = 0) -> int:
    """All that is pending has been invalidated: the pages that nothing points to are free.  How many those were.

    ``token``: the generation of the list that was worked through, 0: whatever is listed.  Raises FsError(EAGAIN) when
    more has come since.
    """
    removed = [ino for ino in fs.orphans.inos() if fs.reclaimer.is_guarded(ino)]

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        if token not in (0, generation(roots)):
            raise FsError(errno.EAGAIN, "more has become pending since that was listed: list it again")
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
    for ino in removed:
        fs.reclaimer.reap(ino)
    return freed
