"""Page tables themselves: whether what devices can reach is what the records say."""

from __future__ import annotations

import os

from pkernfs.format import ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.problems import Code
from pkernfs.iommu.audit import audit
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.guard import PageTableGuard


def page_tables(check: Check) -> None:
    """The audit of the IOMMU finds nothing.  It relies on all else, so it is made only where all else is sound.

    Elsewhere it would report once more what is wrong with records, and what it says of tables could not be trusted.
    """
    if check.findings.all:
        return
    # Not on the volume of the check: what is in the region counts, not what is decoded.
    fs = Filesystem(Volume(check.region), PageTableGuard)
    domains = {os.fsdecode(name): ino for name, ino in named_domains(fs.volume)}
    for found in audit(fs).problems:
        ino = domains.get(found.domain or "", ROOT_PGTABLES_INO)
        check.note(Code.IOMMU_TABLES, f"{found.kind}: {found.text}", ino=ino)
