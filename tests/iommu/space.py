"""A filesystem with a guest's file, for tests of domains in one process."""

from __future__ import annotations

from pkernfs.format import GiB, Ino, KiB, MiB
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.iommu import domain, pci
from pkernfs.region import MemoryRegion
from tests.core.support import ME, SEED, UUID, mkfile, open_fs

__all__ = ["BASE", "DEVICE", "OTHER", "THIRD", "GiB", "KiB", "MiB", "guest", "make", "new"]

BASE = 1 << 40  #: physical address of the region
DEVICE, OTHER, THIRD = (pci.parse(word) for word in ("00:05.0", "00:06.0", "01:00.0"))


def make(size: int = 64 * MiB) -> Filesystem:
    """An empty filesystem."""
    region = MemoryRegion(size)
    mkfs(region, uuid=UUID, hash_seed=SEED, phys_base=BASE)
    return open_fs(region)


def guest(fs: Filesystem, name: bytes = b"guest", size: int = 8 * MiB) -> Ino:
    """A file of whole blocks, in one piece."""
    ino = mkfile(fs, name)
    fs.setattr(ino, SetAttr(size=size))
    return ino


def new(fs: Filesystem, name: bytes = b"dom-0", form: str = "vtd", levels: int = 4) -> Ino:
    """A domain."""
    return domain.create(fs, name, form, levels, ME)
