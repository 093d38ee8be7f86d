"""A region on a device-DAX character device: reserved memory that is mapped, and can neither be read nor written."""

import errno
import os
from typing import NamedTuple

from pkernfs.errors import FsError, RegionError
from pkernfs.format import BLOCK, PAGE
from pkernfs.region.file import FileRegion


class Device(NamedTuple):
    """What sysfs tells of a device, see Documentation/ABI/testing/sysfs-bus-dax."""

    size: int  #: bytes
    align: int  #: bytes: mappings of it begin and end at multiples of this
    address: int  #: physical, of its first byte; 0 when the kernel hides it

    @property
    def piece(self) -> int:
        """What can be mapped and is whole blocks is a multiple of this."""
        return max(self.align, BLOCK)

    @property
    def usable(self) -> int:
        """Bytes of it that a region can have."""
        return self.size - self.size % self.piece


def find_device(device: int, path: str) -> Device:
    """The device-DAX device with the number ``device``.  Raises RegionError for any other, and without sysfs."""
    sysfs = f"/sys/dev/char/{os.major(device)}:{os.minor(device)}"
    try:
        subsystem = os.path.basename(os.readlink(f"{sysfs}/subsystem"))
        if subsystem != "dax":
            raise RegionError(f"{path}: expected a device-DAX device, found one of the subsystem {subsystem}")
        size = _number(f"{sysfs}/size")
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else "no number"
        raise RegionError(f"{path}: expected a device-DAX device with a size in {sysfs}, found {found}") from None
    align = _number(f"{sysfs}/align", BLOCK)
    if align < PAGE or align & (align - 1):
        raise RegionError(f"{path}: expected an alignment that is a power of two in {sysfs}/align, found {align}")
    return Device(size, align, _number(f"{sysfs}/resource", 0))


def _number(path: str, default: int | None = None) -> int:
    """The number in a file of sysfs, decimal or 0x...; ``default``, if there is one, where there is none to be had."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return int(file.read(), 0)
    except (OSError, ValueError):
        if default is None:
            raise
        return default


def find_address(path: str) -> int:
    """The physical address at which the device at ``path`` begins; 0 when the kernel hides it.  Raises RegionError."""
    return find_device(os.stat(path).st_rdev, path).address


class DaxRegion(FileRegion):
    """A region on a device: its size from sysfs, nothing to punch, no private mapping.

    Read-only: copies of the pieces that recovery stores to lie over the device's mapping, see overlay.py.
    """

    whole = True

    @staticmethod
    def device(fd: int, path: str) -> Device:
        """What is known of it.  Raises RegionError."""
        return find_device(os.fstat(fd).st_rdev, path)

    @classmethod
    def _size(cls, fd: int, path: str) -> int:
        return cls.device(fd, path).usable

    def _find_kind(self) -> None:
        self.kind = "devdax"

    def _mapped(self, size: int) -> memoryview:
        if not self.readonly:
            return super()._mapped(size)
        from pkernfs.region.overlay import Overlay  # ctypes costs some ms, which a command may not need

        self._map = self._overlay = Overlay(self.fd, size, self.device(self.fd, self.path).piece)
        return self._overlay.view

    def _cover(self, offset: int, length: int) -> None:
        if self.readonly:
            try:
                self._overlay.cover(offset, length)
            except OSError as error:
                text = f"{self.path}: no private copy of {length} bytes at {offset:#x}: {error.strerror}"
                raise FsError(error.errno or errno.ENOMEM, text) from None

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """As any region's; read-only into a copy."""
        self._cover(offset, len(data))
        super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        """As any region's; read-only into a copy."""
        self._cover(offset, 8)
        super().store_word(offset, value)

    def reserve(self, offset: int, length: int) -> None:
        """The memory is there; store zeros."""
        self.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Nothing to give back."""

    def secure(self, offset: int, length: int) -> None:
        """The memory is there."""

    def memory(self) -> int:
        """All of it."""
        return self.size

    def host_free(self) -> int | None:
        """It has all."""
        return None

    def peek(self, offset: int, length: int) -> bytes:
        """Through the mapping: a device has no read(2)."""
        return self.read(offset, length)
