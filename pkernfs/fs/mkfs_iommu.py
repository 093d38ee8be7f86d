"""What mkfs makes for the IOMMU: ``iommu/`` and an empty ``iommu/root-pgtables``, the RFC's names, in reserved slots.

Here and not in pkernfs/iommu, as a region has them from the first moment on: the superblock is stored after them.
"""

from __future__ import annotations

import stat

from pkernfs.format import FLAG_IOMMU_DIR, FLAG_IOMMU_ROOT_PGTABLES, IOMMU_INO, ROOT_INO, ROOT_PGTABLES_INO
from pkernfs.fs.directory import open_directory
from pkernfs.fs.pages import new_inode
from pkernfs.fs.volume import Volume


def add_iommu(volume: Volume) -> None:
    """Make both, with the times and the owner of the root directory.  Raises FsError(ENOSPC)."""
    root = volume.inode(ROOT_INO)
    now, uid, gid = root.ctime, root.uid, root.gid
    mode = root.mode & ~0o7022  # who may make files in a root directory like /tmp may not make domains
    directory = open_directory(volume, ROOT_INO)
    with volume.transaction() as tx:
        directory.add(tx, b"iommu", IOMMU_INO, stat.S_IFDIR)
        parent = directory.finish(now)
        tx.put_inode(ROOT_INO, parent._replace(nlink=parent.nlink + 1))
        tx.put_inode(IOMMU_INO, new_inode(mode, now, uid, gid, flags=FLAG_IOMMU_DIR, parent=ROOT_INO))
    iommu = open_directory(volume, IOMMU_INO)
    with volume.transaction() as tx:
        iommu.add(tx, b"root-pgtables", ROOT_PGTABLES_INO, stat.S_IFREG)
        tx.put_inode(IOMMU_INO, iommu.finish(now))
        file = new_inode(stat.S_IFREG | 0o600, now, uid, gid, flags=FLAG_IOMMU_ROOT_PGTABLES)
        tx.put_inode(ROOT_PGTABLES_INO, file)
