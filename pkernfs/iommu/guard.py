"""What users may do with page tables, and with files that devices reach: the answers to what fs asks.

Users make, name and remove domains, and give one its first block.  Everything else about page tables is for the API of
the IOMMU alone: hardware reads them.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from pkernfs.errors import FsError, PkernfsError, quoted
from pkernfs.format import (
    ACCESS_NAMES,
    BLOCK,
    DOMAIN,
    DOMAIN_KEY,
    FLAG_IOMMU_DIR,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    GUARDED,
    PAGE,
    RO_COMPAT_AWAITING,
    ROOT_PGTABLES_INO,
    DomainId,
    FilePage,
    Ino,
    Inode,
)
from pkernfs.fs.filemap import FIRST, FileMap
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.guard import Guard
from pkernfs.fs.lookups import Lookups
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu import awaiting
from pkernfs.iommu.invalidations import generation, is_pending, pending
from pkernfs.iommu.pins import pins_of
from pkernfs.iommu.records import Records, drop_mappings, drop_records, has_mappings, is_attached
from pkernfs.region import Region

if TYPE_CHECKING:
    from pkernfs import api


def open_filesystem(region: Region, lookups: Lookups | None = None) -> Filesystem:
    """``Filesystem.open`` with the guard of page tables, which every region needs that may hold some."""
    return Filesystem.open(region, PageTableGuard, lookups)


class PageTableGuard(Guard):
    """What hardware may be using is neither freed nor moved nor written to behind its back."""

    # -- names ----------------------------------------------------------------------------------------------------

    def flags_of_new(self, directory: Inode, mode: int) -> int:
        """In iommu/ a regular file is a domain.  Raises FsError(EPERM) for anything else there."""
        if not directory.flags & FLAG_IOMMU_DIR:
            return 0
        if not stat.S_ISREG(mode):
            raise FsError(errno.EPERM, "expected a regular file, a domain: there is nothing else in iommu/")
        return FLAG_IOMMU_DOMAIN_PGTABLES

    def may_link(self, inode: Inode, directory: Inode) -> None:
        """A domain has one name, and nothing else gets one in iommu/.  Raises FsError(EPERM)."""
        self.may_move(directory, directory)
        if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            raise FsError(errno.EPERM, "a domain has one name")

    def may_move(self, source: Inode, target: Inode) -> None:
        """Raise FsError(EPERM) when one of the directories is iommu/: domains stay there, nothing comes in."""
        if (source.flags | target.flags) & FLAG_IOMMU_DIR:
            raise FsError(errno.EPERM, "domains stay in iommu/, have one name, and are made there")

    def may_unlink(self, ino: Ino, inode: Inode) -> None:
        """Raise FsError(EBUSY) when the inode is a domain and a device is attached to it."""
        if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES and is_attached(self._roots(), ino):
            raise FsError(errno.EBUSY, f"inode {ino}: a device is attached to the domain: detach it first")

    # -- content --------------------------------------------------------------------------------------------------

    def may_open(self, inode: Inode, flags: int) -> None:
        """Raise FsError(EPERM) when page tables are to be opened so that a mapping can write to them.

        So with a file to be made in iommu/.
        """
        if inode.flags & (GUARDED | FLAG_IOMMU_DIR) and flags & os.O_ACCMODE == os.O_RDWR:
            rule = "page tables can be read, or made with O_WRONLY, and are changed by the API only"
            raise FsError(errno.EPERM, rule)

    def may_write(self, ino: Ino) -> None:
        """No: raise FsError(EPERM)."""
        raise FsError(errno.EPERM, f"inode {ino}: page tables are changed by the API only")

    def may_map(self, ino: Ino) -> None:
        """No: raise FsError(EPERM)."""
        raise FsError(errno.EPERM, f"inode {ino}: page tables are not mapped past the mount")

    def may_resize(self, ino: Ino, inode: Inode, size: int) -> None:
        """Raise FsError(EPERM) but for the first block of a domain."""
        first = inode.size == 0 and size == BLOCK and ino != ROOT_PGTABLES_INO
        if size != inode.size and not first:
            expected = f"page tables get {BLOCK} bytes and grow by themselves"
            raise FsError(errno.EPERM, f"inode {ino}: {expected}, found {size} bytes for {inode.size}")

    def resized(self, tx: Transaction, ino: Ino, inode: Inode) -> None:
        """Mark, in the first block of page tables, which is new, the page of the bitmap itself as in use.

        The store is not part of ``tx``: the block is free until that commits.
        """
        page, _ = FileMap(self.volume, ino, inode).find(FIRST)
        self.volume.region.store(page * PAGE, (1).to_bytes(8, "little"))

    def may_cut(self, ino: Ino, inode: Inode, end: FilePage) -> None:
        """Raise FsError(EBUSY) when a mapping names a page of the file from page ``end`` on."""
        for pin in pins_of(self.volume, ino):
            if pin.mapping.start + pin.mapping.length > end:
                domain = f"domain {quoted(pin.name)}" if pin.name else f"the domain of inode {pin.domain}"
                raise FsError(errno.EBUSY, f"inode {ino}: its memory is mapped by {domain} at IOVA {pin.iova:#x}")

    def awaits(self, ino: Ino, first: FilePage) -> bool:
        """Whether hardware may have cached what is in a file from page ``first`` on, though nothing maps it."""
        return awaiting.awaits(self.volume, ino, first)

    def hand_on(self, tx: Transaction, ino: Ino, to: Ino, first: FilePage) -> None:
        """What inode ``to`` has got of a file awaits an invalidation there."""
        awaiting.hand_on(tx, self.volume, ino, to, first)

    def cut(self, tx: Transaction, ino: Ino, first: FilePage) -> None:
        """Nothing of a file awaits an invalidation from page ``first`` on: that is others' by now."""
        awaiting.cut(tx, self.volume, ino, first)

    def describe_pins(self, ino: Ino) -> list[api.Pin]:
        """The mappings that name a file; offsets and lengths in bytes."""
        from pkernfs import api

        return [
            api.Pin(
                domain=pin.name,
                iova=pin.iova,
                offset=pin.mapping.start * PAGE,
                length=pin.mapping.length * PAGE,
                access=ACCESS_NAMES[pin.mapping.access],
            )
            for pin in pins_of(self.volume, ino)
        ]

    def describe_awaiting(self, ino: Ino) -> list[api.Awaiting]:
        """What awaits an invalidation of a file; offsets and lengths in bytes."""
        from pkernfs import api

        return [
            api.Awaiting(id=one.id, offset=one.first * PAGE, length=(one.end - one.first) * PAGE)
            for one in awaiting.of_file(self.volume, ino)
        ]

    def kept_bytes(self) -> int:
        """Memory of removed files and domains, and of what was cut, that awaits an invalidation.  Raises CorruptError.

        Nothing is looked at where nothing is pending.
        """
        return awaiting.kept_bytes(self.volume) if next(pending(self._roots()), None) else 0

    def how_to_release(self) -> str:
        """Which acknowledgement the memory that awaits one is free after."""
        try:
            kept = self.kept_bytes()
            token = generation(self._roots())
        except PkernfsError:
            return ""
        command = f"let hardware do what pkernfs iommu invalidations MOUNT lists, then --ack {token}"
        return f"{kept} bytes await an invalidation: {command}" if kept else ""

    # -- freeing --------------------------------------------------------------------------------------------------

    def may_free(self, ino: Ino, inode: Inode) -> bool:
        """Whether no hardware may still be looking at the tables in a domain, to which no device is attached."""
        if not inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            return True
        record = Records(self.volume, ino).record(DOMAIN, DOMAIN_KEY)
        return record is None or not is_pending(self._roots(), DomainId(record.id))

    def is_pinning(self, ino: Ino) -> bool:
        """Whether the domain has mappings."""
        return has_mappings(self.volume, ino)

    def unpin(self, ino: Ino, most: int) -> list[Ino]:
        """Drop the first ``most`` mappings of a domain; the files that nothing pins any more.

        What hardware may have cached of these goes on being pinned.
        """
        volume = self.volume
        record = Records(volume, ino).record(DOMAIN, DOMAIN_KEY)
        waits = record is not None and is_pending(self._roots(), DomainId(record.id))
        if waits:
            volume.enable(RO_COMPAT_AWAITING)
        with volume.transaction() as tx:
            dropped = drop_mappings(tx, volume, ino, most)
            if record and waits:
                roots = self._roots()
                awaiting.add(tx, roots, DomainId(record.id), dropped)
                roots.finish(tx)
        return [file for file in dict.fromkeys(mapping.ino for mapping in dropped) if not volume.inode(file).iommu]

    def drop_records(self, tx: Transaction, ino: Ino) -> None:
        """Drop the few records of a domain beside its mappings, which are gone."""
        drop_records(tx, self.volume, ino)

    def _roots(self) -> Records:
        return Records(self.volume, ROOT_PGTABLES_INO)
