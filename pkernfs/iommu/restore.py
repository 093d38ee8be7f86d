"""What a mount does first: devices that the mount before had attached go on, await their owners, or are blocked."""

from __future__ import annotations

import errno
import logging

from pkernfs.errors import FsError
from pkernfs.format import ATTACHMENT, ATTACHMENT_KEY, DEFERRED, PERSISTENT, ROOT_PGTABLES_INO, DomainId, Requester
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.devices import drop_attachment
from pkernfs.iommu.reclaim import acknowledge
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import replies

log = logging.getLogger("pkernfs")

BATCH = 100  #: devices that one transaction blocks or detaches: what it changes fits in the smallest journal


def restore(fs: Filesystem, *, cold: bool = False) -> list[str]:
    """Detach devices that are not persistent (``cold``: all), before anything else is served; which, as lspci says.

    The entries of persistent ones stay as they are; their owners are to claim them.  Raises CorruptError when it cannot
    be told what is attached: devices may be reaching memory that nobody keeps for them.
    """
    volume = fs.volume
    attachments = dict(Records(volume, ROOT_PGTABLES_INO).attachments())
    kept = {requester: one for requester, one in attachments.items() if one.flags & PERSISTENT and not cold}
    # First the entries alone: that takes no memory, so it always works.
    blocked: list[Requester] = []
    while True:
        with volume.transaction() as tx:
            batch = Contexts(volume).block_others(tx, kept, BATCH)
        blocked += batch
        if len(batch) < BATCH:
            break
    gone = sorted(attachments.keys() - kept.keys())
    for at in range(0, len(gone), BATCH):
        _drop_attachments(fs, {requester: DomainId(attachments[requester].id) for requester in gone[at : at + BATCH]})
    answered = replies(Records(volume, ROOT_PGTABLES_INO)).any()
    claimed = {requester: one for requester, one in kept.items() if not one.flags & DEFERRED}
    if claimed or answered:
        with volume.transaction() as tx:
            records = Records(volume, ROOT_PGTABLES_INO)
            replies(records).drop(tx)
            for requester, one in claimed.items():
                deferred = ATTACHMENT.pack(one._replace(flags=PERSISTENT | DEFERRED))
                records.put(tx, ATTACHMENT_KEY + requester, deferred)
            records.finish(tx)
    if cold:
        # The machine has come up anew: its IOMMUs have nothing cached.
        acknowledge(fs)
    detached = [pci.text(requester) for requester in sorted({*gone, *blocked})]
    if detached:
        log.info("blocked devices that were not declared persistent: %s", ", ".join(detached))
    return detached


def _drop_attachments(fs: Filesystem, ids: dict[Requester, DomainId]) -> None:
    """Drop the attachments of devices that are blocked, and note what is to be invalidated.  ``ids``: by requester."""
    for noting in (True, False):
        try:
            with fs.volume.transaction() as tx:
                records = Records(fs.volume, ROOT_PGTABLES_INO)
                for requester, domain_id in ids.items():
                    if noting:
                        drop_attachment(tx, records, requester, domain_id)
                    else:
                        records.delete(tx, ATTACHMENT_KEY + requester)
                records.finish(tx)
        except FsError as error:
            if error.errno != errno.ENOSPC or not noting:
                raise
            log.error("no room to note what IOMMUs are to invalidate: invalidate all of their caches")
        else:
            return
