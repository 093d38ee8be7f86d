"""Regions in files that other processes can map too: on a disk, tmpfs or hugetlbfs."""

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pkernfs.errors import FormatError, FsError
from pkernfs.format import BLOCK, MAX_BLOCKS, MIN_BLOCKS, PAGE, MiB
from pkernfs.mountinfo import mounts
from pkernfs.processes import shared_mappings
from pkernfs.region.base import Region
from pkernfs.region.lock import lock

if TYPE_CHECKING:
    from pkernfs.region.overlay import Overlay

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

    size_hint = "mkfs.pkernfs --size makes a region of the right size"
    _map: "mmap.mmap | Overlay"

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
            view = self._mapped(size)
        except BaseException:
            os.close(self.fd)
            raise
        #: a byte for each page: not 0 when it was asked for
        self._present = mmap.mmap(-1, size // PAGE, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        super().__init__(view)

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
                hint=cls.size_hint,
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

    def _mapped(self, size: int) -> memoryview:
        """Map it; the bytes."""
        self._map = made = self._mmap(size)
        return memoryview(made)

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

    def mapped_by(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """From /proc/PID/maps, which shows the processes that this one may look at: read once for all ranges."""
        found = {
            pid
            for pid, first, end in (shared_mappings(self.fd) if ranges else ())
            if pid != os.getpid() and any(first < at + length and at < end for at, length in ranges)
        }
        return sorted(found)

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
