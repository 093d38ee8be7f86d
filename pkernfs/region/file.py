"""Regions in files that other processes can map too: on a disk, tmpfs or hugetlbfs."""

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, MAX_BLOCKS, MIN_BLOCKS, PAGE
from pkernfs.processes import shared_mappings
from pkernfs.region.base import Region
from pkernfs.region.host import free_for, kind_of_file, what_it_has
from pkernfs.region.lock import lock
from pkernfs.region.remains import Descriptor
from pkernfs.region.superblock import error_of_size

if TYPE_CHECKING:
    from pkernfs.region.overlay import Overlay

COPIED = 4 * PAGE  #: bytes that cost no more to copy than to ask the kernel for
#: madvise(2), from Linux 5.14 on; the mmap module has no names for them
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23
#: ENOMEM: the memory cgroup's limit.  EDQUOT, EFBIG: those of the file's filesystem and of this process.
NO_MEMORY = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG)
MAP_NORESERVE = 0x4000  #: mmap(2); the mmap module has it from Python 3.13 on


class FileRegion(Region):
    """A region in a regular file.

    ``kind`` is "tmpfs", "hugetlbfs" or "file".  Writable: maps shared and takes the exclusive lock.  Read-only: maps
    privately; with ``locked`` it takes the shared lock, without it looks at a region that may be changing.
    ``prepare`` is called with the descriptor once the lock is held and before anything is mapped.
    On a disk it is ``volatile``, and ``barriers`` are on.  ``fd``: a descriptor that is open and
    locked already.

    A page of the mapping may have no memory (a hole, while the host has none left; beyond the end of a file that was
    cut; bad memory): touching it raises SIGBUS, which ends the process.  So each page is asked for before it is touched
    first, where ``whole`` does not say that all that is in use has memory: madvise(MADV_POPULATE_*) gives an error.
    """

    whole = False
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
        self._bytes = Descriptor(self.fd, size)
        #: a byte for each page: not 0 when it was asked for, for reading, and for storing
        self._present = mmap.mmap(-1, size // PAGE, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        # Only on a disk a page can be in memory that has no place on the medium.
        separate = self.kind == "file" and not self.readonly
        self._storable = (
            mmap.mmap(-1, size // PAGE, flags=mmap.MAP_PRIVATE | MAP_NORESERVE) if separate else self._present
        )
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
            raise error_of_size(Descriptor(fd, size), path)
        return size

    @staticmethod
    def _size(fd: int, _path: str) -> int:
        return os.fstat(fd).st_size

    def _find_kind(self) -> None:
        self.kind = kind_of_file(self.fd)
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
        try:
            return mmap.mmap(self.fd, size)
        except OSError as error:
            if error.errno != errno.ENOMEM or self.kind != "hugetlbfs":
                raise
            # The kernel sets huge pages aside for all of a shared mapping, or refuses it: a region that is larger than
            # what the host has (mkfs --sparse) gets them when they are allocated.
            return mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | MAP_NORESERVE)

    # -- memory ---------------------------------------------------------------------------------------------------

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into the region.  Raises FsError, and nothing is stored: ENOSPC, EIO."""
        if not self.whole:
            self.make_storable(offset, len(data))
        self.view[offset : offset + len(data)] = data

    def store_word(self, offset: int, value: int) -> None:
        """Store one word.  Raises FsError: ENOSPC, EIO."""
        if not self.whole:
            self.make_storable(offset, 8)
        self.words[offset >> 3] = value

    def read(self, offset: int, length: int) -> bytes:
        """A copy.  Raises FsError(EIO)."""
        if self.whole:
            return bytes(self.view[offset : offset + length])
        return bytes(self.present(offset, length))

    def word(self, offset: int) -> int:
        """One word.  Raises FsError(EIO)."""
        return self.words[offset >> 3] if self.whole else int.from_bytes(self.read(offset, 8), "little")

    def present(self, offset: int, length: int) -> bytes | memoryview:
        """The kernel gives up copying at a page that is not in the page table of a killed process.

        Raises FsError(EIO).
        """
        view = self.view[offset : offset + length]
        if length <= COPIED and self.whole:
            return bytes(view)
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        if self._present.find(b"\0", first, end) >= 0:
            try:
                self._map.madvise(MADV_POPULATE_READ, first * PAGE, (end - first) * PAGE)
            except OSError as error:
                if error.errno != errno.EINVAL:  # Linux before 5.14
                    return self._read_past_mapping(offset, length)
            self._present[first:end] = b"\1" * (end - first)
        return bytes(view) if length <= COPIED else view

    def _read_past_mapping(self, offset: int, length: int) -> bytes:
        """By read(2): zeros of a hole for which the host has no memory; an error, and no signal, of what is gone."""
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            raise FsError(errno.EIO, f"{self.path}: {length} bytes at {offset:#x}: {error.strerror}") from None
        if len(data) < length:
            raise self._error_of_end(offset + length)
        return data

    def _error_of_end(self, end: int) -> FsError:
        found = os.fstat(self.fd).st_size
        return FsError(errno.EIO, f"{self.path}: expected {max(end, self.size)} bytes, found {found}: it was cut")

    def make_storable(self, offset: int, length: int) -> None:
        """By asking for the pages that were not asked for yet."""
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        if self._storable.find(b"\0", first, end) < 0:
            return
        try:
            self._map.madvise(MADV_POPULATE_WRITE, first * PAGE, (end - first) * PAGE)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise self._error_of_memory(length) from None
            if error.errno != errno.EINVAL:  # Linux before 5.14
                self._find_memory(first * PAGE, (end - first) * PAGE, error)
        self._present[first:end] = self._storable[first:end] = b"\1" * (end - first)

    def _find_memory(self, offset: int, length: int, error: OSError) -> None:
        """Memory for pages that madvise(2) found none for, or why there is none: it says EFAULT for all reasons."""
        bad = FsError(errno.EIO, f"{self.path}: {length} bytes at {offset:#x}: {error.strerror}")
        if error.errno != errno.EFAULT:  # EHWPOISON
            raise bad
        self._allocate(offset, length)
        try:
            self._map.madvise(MADV_POPULATE_WRITE, offset, length)
        except OSError:
            raise bad from None

    def _error_of_memory(self, length: int) -> FsError:
        return FsError(errno.ENOSPC, f"{self.path}: no memory on the host for {length} bytes more")

    def _allocate(self, offset: int, length: int) -> None:
        """Allocate what has no memory yet.  Raises FsError: ENOSPC, EIO; OSError."""
        if not self.readonly and os.fstat(self.fd).st_size < offset + length:
            raise self._error_of_end(offset + length)  # which would come back as zeros
        try:
            if not self.readonly:
                os.posix_fallocate(self.fd, offset, length)
        except OSError as error:
            if error.errno in NO_MEMORY:
                raise self._error_of_memory(length) from None
            raise FsError(errno.EIO, f"{self.path}: allocating {length} bytes: {error.strerror}") from None

    def secure(self, offset: int, length: int) -> None:
        """By fallocate(2), where a hole is found; of no use for reading."""
        if self.readonly:
            return
        # hugetlbfs has no holes to lseek(2).  tmpfs calls a hole what was never touched, too.
        if self.kind == "hugetlbfs" or self._first_hole(offset) < offset + length:
            self._allocate(offset, length)

    def _first_hole(self, offset: int) -> int:
        try:
            return os.lseek(self.fd, offset, os.SEEK_HOLE)
        except OSError:  # ENXIO: beyond the end
            return offset

    def memory(self) -> int:
        """What the file takes on its filesystem."""
        return what_it_has(self.fd, self.size)

    def host_free(self) -> int | None:
        """What its filesystem, and the memory behind that, can still give."""
        return free_for(self.fd, self.kind)

    def peek(self, offset: int, length: int) -> bytes:
        """By read(2).  Raises FsError(EIO)."""
        try:
            return self._bytes.peek(offset, length)
        except OSError as error:
            raise FsError(errno.EIO, f"{self.path}: {length} bytes at {offset:#x}: {error.strerror}") from None

    def next_data(self, offset: int) -> int:
        """By lseek(2)."""
        return self._bytes.next_data(offset)

    def scratch(self) -> Region:
        """A read-only mapping is private."""
        return self if self.readonly else super().scratch()

    def reserve(self, offset: int, length: int) -> None:
        """Punch a hole (zeros at once, whatever the range held), then allocate its memory."""
        if self.readonly or not self._punch(offset, length):
            self.zero(offset, length)
            return
        try:
            self._allocate(offset, length)
        except FsError:
            # What was allocated before the host ran out goes back at once.
            self._punch(offset, length)
            raise

    def _punch(self, offset: int, length: int) -> bool:
        """Punch a hole; False where the file's filesystem cannot."""
        try:
            self._map.madvise(mmap.MADV_REMOVE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise FsError(errno.EIO, f"{self.path}: giving memory back: {error.strerror}") from None
            return False
        nothing = bytes(length // PAGE)
        self._present[offset // PAGE : (offset + length) // PAGE] = nothing
        self._storable[offset // PAGE : (offset + length) // PAGE] = nothing
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
