"""Regions that other processes can map too: a file (on a disk, tmpfs, hugetlbfs) or a device-DAX character device."""

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import FormatError, FsError, RegionError, file_type
from pkernfs.format import BLOCK, MAX_BLOCKS, MIN_BLOCKS, PAGE, MiB
from pkernfs.mountinfo import mounts
from pkernfs.region.base import Region
from pkernfs.region.lock import Holder, command_of, lock, shared_mappings

COPIED = 4 * PAGE  #: bytes that cost no more to copy than to ask the kernel for
MADV_POPULATE_READ = 22  #: madvise(2), from Linux 5.14 on; the mmap module has no name for it
MAP_NORESERVE = 0x4000  #: mmap(2); the mmap module has it from Python 3.13 on


def _filesystem_of(fd: int) -> str:
    """The type of the filesystem that the file is on ("" when it is not found)."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.fstype for mount in mounts() if mount.device == wanted), "")


class FileRegion(Region):
    """A region in a regular file.

    ``kind`` is "tmpfs", "hugetlbfs" or "file".  Writable: maps shared and takes the exclusive lock.  Read-only: maps
    privately; with ``locked`` it takes the shared lock, without it looks at a region that may be changing.
    ``prepare`` is called with the descriptor once the lock is held and before anything is mapped.
    On a disk it is ``volatile``, and ``barriers`` are on.  ``fd``: a descriptor that is open and
    locked already.
    """

    def __init__(
        self,
        path: str,
        *,
        readonly: bool = False,
        locked: bool = True,
        prepare: Callable[[int], None] | None = None,
        fd: int = -1,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.fd = fd if fd >= 0 else self.acquire(path, readonly=readonly, locked=locked)
        try:
            if prepare is not None:
                prepare(self.fd)
            size = self.find_size(self.fd, path)
            self._find_kind()
            self._map = self._mmap(size)
        except BaseException:
            os.close(self.fd)
            raise
        #: a byte for each page: not 0 when it was asked for
        self._present = mmap.mmap(-1, size // PAGE, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        super().__init__(memoryview(self._map))

    @staticmethod
    def acquire(path: str, *, readonly: bool, locked: bool = True) -> int:
        """A descriptor of the region, locked.  Raises OSError, RegionBusyError."""
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            if locked:
                lock(fd, path, shared=readonly)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @classmethod
    def find_size(cls, fd: int, path: str) -> int:
        """Bytes of the region.  Raises FormatError when there is none of that size, RegionError, OSError."""
        size = cls._size(fd, path)
        if size < MIN_BLOCKS * BLOCK or size % BLOCK or size > MAX_BLOCKS * BLOCK:
            raise FormatError(
                f"{path}: expected a multiple of 2 MiB, at least {MIN_BLOCKS * BLOCK // MiB} MiB, found {size} bytes",
                hint="mkfs.pkernfs --size makes a region of the right size",
            )
        return size

    @staticmethod
    def _size(fd: int, _path: str) -> int:
        return os.fstat(fd).st_size

    def _find_kind(self) -> None:
        filesystem = _filesystem_of(self.fd)
        self.kind = filesystem if filesystem in ("tmpfs", "hugetlbfs") else "file"
        self.volatile = self.kind == "file"
        self.barriers = self.volatile and not self.readonly

    def _mmap(self, size: int) -> mmap.mmap:
        if self.readonly:
            # Private, so that recovery can run in it.  NORESERVE: hugetlbfs would set pages aside for all of it.
            return mmap.mmap(
                self.fd, size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        return mmap.mmap(self.fd, size)

    def present(self, offset: int, length: int) -> bytes | memoryview:
        """The kernel gives up copying at a page that is not in the page table of a killed process."""
        view = self.view[offset : offset + length]
        if length <= COPIED:
            return bytes(view)
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        if self._present.find(b"\0", first, end) >= 0:
            with contextlib.suppress(OSError):
                self._map.madvise(MADV_POPULATE_READ, first * PAGE, (end - first) * PAGE)
            self._present[first:end] = b"\1" * (end - first)
        return view

    def reserve(self, offset: int, length: int) -> None:
        """Punch a hole (zeros at once, whatever the range held), then allocate its memory."""
        if self.readonly or not self._punch(offset, length):
            self.zero(offset, length)
            return
        try:
            os.posix_fallocate(self.fd, offset, length)
        except OSError as error:
            # What was allocated before the host ran out goes back at once.
            self._punch(offset, length)
            # ENOMEM: the memory cgroup's limit.  EDQUOT, EFBIG: those of the file's filesystem and of this process.
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                raise FsError(errno.ENOSPC, f"{self.path}: no memory on the host for {length} bytes more") from None
            raise

    def _punch(self, offset: int, length: int) -> bool:
        """Punch a hole; False where the file's filesystem cannot."""
        try:
            self._map.madvise(mmap.MADV_REMOVE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return False
        self._present[offset // PAGE : (offset + length) // PAGE] = bytes(length // PAGE)
        return True

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole, where that is possible; not in a read-only mapping, which is private."""
        if not self.readonly:
            self._punch(offset, length)

    def mapped_by(self, ranges: Sequence[tuple[int, int]]) -> str:
        """From /proc/PID/maps, which shows the processes that this one may look at: read once for all ranges."""
        if ranges:
            for pid, first, end in shared_mappings(self.fd):
                if pid != os.getpid() and any(first < at + length and at < end for at, length in ranges):
                    return str(Holder(pid, command_of(str(pid))))
        return ""

    def flush(self) -> None:
        """msync: matters on a disk only.

        After one that failed nobody knows what is on the medium (the kernel takes the pages for clean): nothing more
        is written, as with errors=remount-ro of ext4.
        """
        if self.volatile and not self.readonly:
            try:
                self._map.flush()
            except OSError as error:
                self.readonly = True
                raise FsError(
                    errno.EIO, f"{self.path}: the medium failed, reading only from now on: {error.strerror}"
                ) from None

    def close(self) -> None:
        """Unmap and unlock.  Views of the region that are still held keep the mapping, but not the lock."""
        if self.fd < 0:
            return
        self.words.release()
        self.view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self.fd = -1


class DaxRegion(FileRegion):
    """A region on a device-DAX character device: mmap only, its size from sysfs, nothing to punch."""

    @staticmethod
    def _size(fd: int, path: str) -> int:
        status = os.fstat(fd)
        sysfs = f"/sys/dev/char/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        try:
            with open(f"{sysfs}/size", encoding="ascii") as file:
                size = int(file.read())
        except (OSError, ValueError) as error:
            raise RegionError(f"{path}: expected a device-DAX device with a size in {sysfs}, found {error}") from None
        return size - size % BLOCK

    def _find_kind(self) -> None:
        self.kind = "devdax"

    def _mmap(self, size: int) -> mmap.mmap:
        # Device DAX knows shared mappings only: a read-only one cannot be recovered in memory.
        return mmap.mmap(self.fd, size, prot=mmap.PROT_READ if self.readonly else mmap.PROT_READ | mmap.PROT_WRITE)

    def reserve(self, offset: int, length: int) -> None:
        """The memory is there; store zeros."""
        self.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Nothing to give back."""


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
        raise RegionError(f"{path}: cannot open the region: {error.strerror}") from None


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


def dax_address(path: str) -> int:
    """The physical address at which a device-DAX device begins, from sysfs; 0 when the kernel hides it."""
    device = os.stat(path).st_rdev
    try:
        with open(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/resource", encoding="ascii") as file:
            return int(file.read(), 0)
    except (OSError, ValueError):
        return 0
