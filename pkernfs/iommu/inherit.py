"""What a mount finds: devices that the one before had attached."""

from __future__ import annotations

import logging

from pkernfs.errors import PkernfsError
from pkernfs.format import ATTACHMENT, ATTACHMENT_KEY, DEFERRED, PERSISTENT
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.devices import cut_off
from pkernfs.iommu.hwpt import Hwpt, domains
from pkernfs.iommu.stale import clear

log = logging.getLogger("pkernfs")


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
    known = {requester for requester, one in kept.items() if one.flags & DEFERRED}
    strays = [(number, requester) for number, requester, _ in contexts.present() if requester not in kept]
    if attachments.keys() == known and not strays and not cold:
        return []
    zapped = sorted((attachments.keys() - kept.keys()) | {requester for _, requester in strays})
    with fs.volume.transaction():
        contexts = Contexts(fs.volume)
        for requester in attachments.keys() - kept.keys():
            cut_off(contexts, requester)
        for number, requester in strays:
            if requester not in attachments:
                contexts.block(number, requester)
        for requester, one in kept.items():
            contexts.records.put(ATTACHMENT_KEY + requester, ATTACHMENT.pack(one._replace(flags=PERSISTENT | DEFERRED)))
        if cold:
            # The machine has come up anew: its IOMMUs remember nothing.
            clear(contexts.records)
            for _, ino in domains(fs):
                hwpt = Hwpt(fs.volume, ino)
                if hwpt.record.stale:
                    hwpt.sweep()
                    hwpt.save()
        contexts.finish()
        contexts.records.finish()
    if zapped:
        names = ", ".join(map(pci.text, zapped))
        log.info("devices that were cut off, as they were not declared persistent: %s", names)
    return [pci.text(requester) for requester in zapped]
