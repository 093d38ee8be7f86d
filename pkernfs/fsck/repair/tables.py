"""Repair of page tables, when all else is sound: they say again what the mappings and the attachments say."""

from __future__ import annotations

from pkernfs.errors import PkernfsError, quoted
from pkernfs.format import ROOT_PGTABLES_INO, DomainId
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import Work
from pkernfs.iommu.contexts import Contexts
from pkernfs.iommu.devices import detach_within
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.guard import PageTableGuard
from pkernfs.iommu.invalidations import Invalidation, add
from pkernfs.iommu.records import Records
from pkernfs.iommu.replace import replace

MOST = 1 << 16  #: devices of a segment


def page_tables(work: Work) -> None:
    """Domains that are not right get new tables, and devices, and nobody else, entries that point to them."""
    wrong = {finding.ino for finding in work.findings}
    if not wrong:
        return
    # All else is sound, the quotas too: what new tables take is charged as in any use.
    work.volume.charges = True
    fs = Filesystem(work.volume, PageTableGuard)
    for name, ino in named_domains(fs.volume):
        if ino in wrong:
            try:
                replace(fs, ino, rebuild=True)
            except PkernfsError:
                continue  # what is wrong is found again, and reported as left
            text = f"the tables of domain {quoted(name)} were made anew from its mappings"
            work.note(Code.IOMMU_TABLES, text, ino=ino)
    if ROOT_PGTABLES_INO in wrong:
        try:
            _attach_devices(fs)
        except PkernfsError:
            return
        text = "the entries of devices point to the domains that they are attached to, and all others are blocked"
        work.note(Code.IOMMU_TABLES, text, ino=ROOT_PGTABLES_INO)


def _attach_devices(fs: Filesystem) -> None:
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
                detach_within(tx, contexts, requester, DomainId(attachment.id))
            elif contexts.entry(domain.record.tables, requester) != domain.entry:
                contexts.store(tx, domain.record.tables, requester, domain.entry)
                add(tx, records, Invalidation(DomainId(attachment.id), requester=requester))
            contexts.finish(tx)
            records.finish(tx)
