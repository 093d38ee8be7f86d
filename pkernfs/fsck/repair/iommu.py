"""Repair of the records of page tables: those that name what is not there go; pins and sizes are fields."""

from __future__ import annotations

from pkernfs.errors import PkernfsError
from pkernfs.format import DOMAIN, DOMAIN_KEY, PAGE, ROOT_PGTABLES_INO, DomainId, Ino
from pkernfs.fsck.findings import BadRecord, FeatureOff, FreeBitmap, NewId, NotPending
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import Work, batches
from pkernfs.iommu.invalidations import Invalidation, add
from pkernfs.iommu.records import Records


def records(work: Work) -> None:
    """Records that name what is not there are dropped, and what is missing is added.

    The pins are counted anew in the next round.
    """
    bad: dict[Ino, dict[int, Code]] = {}
    for code, data in work.found(BadRecord):
        bad.setdefault(data.ino, {})[data.key] = code
    for ino, keys in bad.items():
        for batch in batches(sorted(keys)):
            try:
                with work.volume.transaction() as tx:
                    tree = Records(work.volume, ino)
                    for key in batch:
                        tree.delete(tx, key)
                    tree.finish(tx)
            except (PkernfsError, KeyError):
                break  # the inode is to be mended first
            for key in batch:
                work.note(keys[key], f"record {key:#x} of inode {ino} was dropped", ino=ino)
    for code, (number,) in work.found(NotPending):
        with work.volume.transaction() as tx:
            tree = Records(work.volume, ROOT_PGTABLES_INO)
            add(tx, tree, Invalidation(DomainId(number)))
            tree.finish(tx)
        work.note(code, f"an invalidation of all of domain id {number} is pending now", ino=ROOT_PGTABLES_INO)
    for code, (ro_compat,) in work.found(FeatureOff):
        work.volume.enable(ro_compat)
        work.note(code, f"feature {ro_compat:#x} (ro_compat) is on now")


def domain_ids(work: Work) -> None:
    """Of domains with one id all but one get another."""
    for code, (ino, number) in work.found(NewId):
        if not number:
            continue
        with work.volume.transaction() as tx:
            tree = Records(work.volume, ino)
            value = tree.get(DOMAIN_KEY)
            if value is None:
                continue
            tree.put(tx, DOMAIN_KEY, DOMAIN.pack(DOMAIN.unpack(value)._replace(id=number)))
            tree.finish(tx)
        work.note(code, f"domain {ino}: its id is {number} now", ino=ino)


def bitmaps(work: Work) -> None:
    """The page of a bitmap is in use."""
    region = work.volume.region
    for code, (ino, page) in work.found(FreeBitmap):
        region.store_word(page * PAGE, region.word(page * PAGE) | 1)
        text = f"page {page:#x} of page tables {ino}: marked as in use"
        work.note(code, text, ino=ino, offset=page * PAGE)
