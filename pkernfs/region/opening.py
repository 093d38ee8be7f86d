"""Opening a region, whatever its kind, or only locking it."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pkernfs.errors import RegionError, file_type
from pkernfs.region.dax import DaxRegion
from pkernfs.region.file import FileRegion


class LockedRegion(NamedTuple):
    """A region that is open and locked, but not mapped: for a process that only hands the descriptor on."""

    path: str  #: real path
    fd: int
    size: int  #: bytes


@contextlib.contextmanager
def _kind_of(path: str, fd: int = -1) -> Iterator[type[FileRegion]]:
    """The class of the region, for opening it; what the system refuses meanwhile becomes a RegionError."""
    try:
        mode = os.stat(fd if fd >= 0 else path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            raise RegionError(f"{path}: expected a file or a device-DAX device, found {file_type(mode)}")
        yield FileRegion if stat.S_ISREG(mode) else DaxRegion
    except FileNotFoundError:
        raise RegionError(f"{path}: no such region", hint="mkfs.pkernfs makes one") from None
    except OSError as error:
        refused = RegionError(f"{path}: cannot open the region: {error.strerror}")
        refused.errno = error.errno or refused.errno
        raise refused from None


def open_region(
    path: str,
    *,
    readonly: bool = False,
    locked: bool = True,
    prepare: Callable[[int], None] | None = None,
    fd: int = -1,
) -> FileRegion:
    """Open the region at ``path``, whatever its kind; the other arguments are those of FileRegion.

    Raises RegionError (missing, not a file or device, no permission), FormatError (size), RegionBusyError (locked).
    """
    path = os.path.realpath(path)
    with _kind_of(path, fd) as kind:
        return kind(path, readonly=readonly, locked=locked, prepare=prepare, fd=fd)


def lock_region(path: str, *, readonly: bool = False) -> LockedRegion:
    """Open and lock the region at ``path``: open_region's first half, with its errors."""
    path = os.path.realpath(path)
    with _kind_of(path) as kind:
        fd = kind.acquire(path, readonly=readonly)
        try:
            return LockedRegion(path, fd, kind.find_size(fd, path))
        except BaseException:
            os.close(fd)
            raise
