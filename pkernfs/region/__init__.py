"""The memory itself: open, check, lock and map a region; read and store in it.

May import: format, layout, errors.  Invariants: nobody but a Region object writes the region, and only through
``store``, ``store_word``, ``zero``, ``reserve`` and ``discard``; a writable Region of a file or device holds the
exclusive lock; a read-only one maps privately, or lays private copies over what is stored to (device DAX), so that
recovery can run in memory and nothing is written.
"""

from pkernfs.region.base import MemoryRegion, Region
from pkernfs.region.dax import DaxRegion, find_address, find_device
from pkernfs.region.file import FileRegion
from pkernfs.region.opening import lock_region, open_region
from pkernfs.region.recording import FLUSH, RecordingRegion, Store
from pkernfs.region.superblock import (
    check_superblock,
    copies_of,
    enable_features,
    far_copy_at,
    find_copies,
    read_superblock,
    recover_superblock,
)
from pkernfs.region.unmapped import check_unmapped

__all__ = [
    "FLUSH",
    "DaxRegion",
    "FileRegion",
    "MemoryRegion",
    "RecordingRegion",
    "Region",
    "Store",
    "check_superblock",
    "check_unmapped",
    "copies_of",
    "enable_features",
    "far_copy_at",
    "find_address",
    "find_copies",
    "find_device",
    "lock_region",
    "open_region",
    "read_superblock",
    "recover_superblock",
]
