"""What a mount finds: devices that the one before had attached."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pkernfs.errors import PkernfsError
from pkernfs.format import ATTACHMENT, ATTACHMENT_KEY, DEFERRED, PERSISTENT
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.devices import cut_off
from pkernfs.iommu.replace import forgotten

log = logging.getLogger("pkernfs")

BATCH = 100  #: devices that one transaction cuts off


def inherit(fs: Filesystem, *, cold: bool = False) -> list[str]:
    """Cut off devices that are not persistent (``cold``: all), before anything else is served; which, as lspci says.

    The entries of persistent ones stay as they are; their owners are to claim them.  What is damaged is logged.
    """
    try:
        return _inherit(fs, cold)
    except PkernfsError as error:
        fs.complain(error)
        return []


def _inherit(fs: Filesystem, cold: bool) -> list[str]:
    contexts = Contexts(fs.volume)
    attachments = dict(contexts.records.attachments())
    kept = {requester: one for requester, one in attachments.items() if one.flags & PERSISTENT and not cold}
    strays = {(number, requester) for number, requester, _ in contexts.present() if requester not in kept}
    zapped = sorted((attachments.keys() - kept.keys()) | {requester for _, requester in strays})
    for at in range(0, len(zapped), BATCH):
        batch = zapped[at : at + BATCH]
        with _changing(fs) as contexts:
            for requester in batch:
                if requester in attachments:
                    cut_off(contexts, requester)
            for number, requester in strays:
                if requester in batch and requester not in attachments:
                    contexts.block(number, requester)
    claimed = {requester: one for requester, one in kept.items() if not one.flags & DEFERRED}
    if claimed:
        with _changing(fs) as contexts:
            for requester, one in claimed.items():
                deferred = ATTACHMENT.pack(one._replace(flags=PERSISTENT | DEFERRED))
                contexts.records.put(ATTACHMENT_KEY + requester, deferred)
    if cold:
        # The machine has come up anew: its IOMMUs remember nothing.
        forgotten(fs)
    if zapped:
        names = ", ".join(map(pci.text, zapped))
        log.info("devices that were cut off, as they were not declared persistent: %s", names)
    return [pci.text(requester) for requester in zapped]


@contextmanager
def _changing(fs: Filesystem) -> Iterator[Contexts]:
    with fs.volume.transaction():
        contexts = Contexts(fs.volume)
        yield contexts
        contexts.finish()
        contexts.records.finish()
