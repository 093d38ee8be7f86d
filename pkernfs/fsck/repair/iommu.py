"""Repair of page tables: records that lead to nothing go; what pins and sizes should be are fields."""

from __future__ import annotations

from pkernfs.errors import PkernfsError
from pkernfs.format import DOMAIN, DOMAIN_KEY, PAGE
from pkernfs.fsck.repair.work import Work, batches
from pkernfs.iommu.records import Records


def records(work: Work) -> None:
    """Records that lead to nothing are dropped; the pins are counted anew in the next round."""
    for ino, keys in work.checker.bad_records.items():
        for batch in batches(sorted(set(keys))):
            try:
                with work.volume.transaction() as tx:
                    tree = Records(work.volume, ino)
                    for key in batch:
                        tree.delete(tx, key)
                    tree.finish(tx)
            except (PkernfsError, KeyError):
                break  # the inode is to be mended first
            for key in batch:
                work.note("iommu-record", f"record {key:#x} of inode {ino:#x} was dropped", ino=ino)


def domain_ids(work: Work) -> None:
    """Of domains with one id all but one get another."""
    for ino, number in work.checker.new_ids.items():
        if not number:
            continue
        with work.volume.transaction() as tx:
            tree = Records(work.volume, ino)
            value = tree.get(DOMAIN_KEY)
            if value is None:
                continue
            tree.put(tx, DOMAIN_KEY, DOMAIN.pack(DOMAIN.unpack(value)._replace(id=number)))
            tree.finish(tx)
        work.note("iommu-domain-id", f"domain {ino:#x}: its id is {number} now", ino=ino)


def bitmaps(work: Work) -> None:
    """The page of a bitmap is in use."""
    for ino, page in work.checker.bitmaps:
        work.volume.region.store_word(page * PAGE, work.volume.region.word(page * PAGE) | 1)
        text = f"page {page:#x} of page tables {ino:#x}: marked as in use"
        work.note("iommu-bitmap", text, ino=ino, offset=page * PAGE)
