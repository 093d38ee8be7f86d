"""What fsck does about page tables, when all else is sound: makes them say again what the mappings say."""

from __future__ import annotations

import os

from pkernfs.errors import PkernfsError
from pkernfs.format import ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import Problem
from pkernfs.fsck.repair.work import Repair
from pkernfs.iommu.audit import audit
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.devices import detach_within
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.guard import PageTableGuard
from pkernfs.iommu.invalidations import Invalidation, add
from pkernfs.iommu.records import Records
from pkernfs.iommu.replace import replace
from pkernfs.region import Region

CODE = "iommu-tables"
INVARIANTS = {CODE: "what devices can reach is what the mappings say (pkernfs iommu audit)"}
MOST = 1 << 16  #: devices of a segment


def check_tables(region: Region) -> list[Problem]:
    """What the audit finds."""
    fs = Filesystem(Volume(region), PageTableGuard)
    inos = {os.fsdecode(name): ino for name, ino in named_domains(fs.volume)}
    return [
        Problem(CODE, f"{found.kind}: {found.text}", inos.get(found.domain or "", ROOT_PGTABLES_INO))
        for found in audit(fs).problems
    ]


def mend_tables(region: Region) -> list[Repair]:
    """Rebuild the tables of domains that are not right, and point their devices, and no others, to them."""
    fs = Filesystem(Volume(region), PageTableGuard)
    wrong = {problem.ino for problem in check_tables(region)}
    done = []
    for name, ino in named_domains(fs.volume):
        if ino in wrong:
            try:
                replace(fs, ino, rebuild=True)
            except PkernfsError:
                continue  # what is wrong is found again, and reported as left
            text = f"the tables of domain {os.fsdecode(name)!r} were made anew from its mappings"
            done.append(Repair(CODE, text, ino))
    if ROOT_PGTABLES_INO in wrong:
        try:
            _point_devices(fs)
        except PkernfsError:
            return done
        text = "devices are pointed to the domains that they are attached to, and all others are blocked"
        done.append(Repair(CODE, text, ROOT_PGTABLES_INO))
    return done


def _point_devices(fs: Filesystem) -> None:
    volume = fs.volume
    attachments = dict(Records(volume, ROOT_PGTABLES_INO).attachments())
    with volume.transaction() as tx:
        Contexts(volume).block_others(tx, attachments, MOST)
    with volume.transaction() as tx:
        Contexts(volume).mend_bitmap(tx)
    known = {ino for _, ino in named_domains(fs.volume)}
    for requester, attachment in attachments.items():
        with volume.transaction() as tx:
            records = Records(volume, ROOT_PGTABLES_INO)
            contexts = Contexts(volume, records)
            domain = Domain(volume, attachment.domain) if attachment.domain in known else None
            if domain is None:
                detach_within(tx, contexts, requester)
            elif contexts.entry(domain.record.tables, requester) != domain.entry:
                contexts.store(tx, domain.record.tables, requester, domain.entry)
                add(tx, records, Invalidation(attachment.id, requester=requester))
            contexts.finish(tx)
            records.finish(tx)
