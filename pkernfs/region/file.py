"""Regions that other processes can map too: a file (on a disk, tmpfs, hugetlbfs) or a device-DAX character device."""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import FormatError, FsError, RegionBusyError, RegionError
from pkernfs.format import BLOCK, MAX_BLOCKS, MIN_BLOCKS, PAGE, MiB
from pkernfs.mountinfo import mountpoints_of, mounts
from pkernfs.region.base import Region

LOCK_WAIT = 10.0  #: seconds
COPIED = 4 * PAGE  #: bytes that cost no more to copy than to ask the kernel for
MADV_POPULATE_READ = 22  #: madvise(2), from Linux 5.14 on; the mmap module has no name for it
MAP_NORESERVE = 0x4000  #: mmap(2); the mmap module has it from Python 3.13 on


class Holder(NamedTuple):
    """The process that holds a region's lock."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def _filesystem_of(fd: int) -> str:
    """The type of the filesystem that the file is on ("" when it is not found)."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.fstype for mount in mounts() if mount.device == wanted), "")


def lock_holder(path: str) -> Holder | None:
    """Who holds the lock of the region at ``path``; None when nobody does, or nobody that may be seen.

    From the lock lines of /proc/PID/fdinfo and not from /proc/locks, which names the process that took the lock: it may
    have handed it to a child since.  Descriptors are only looked at closer when such a line names the region's inode: a
    stat of any other may wait for a server that hangs.
    """
    status = os.stat(path)
    wanted = re.compile(rf"^lock:.* FLOCK .*:{status.st_ino} 0 EOF$", re.MULTILINE)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fdinfo") if int(pid) != os.getpid() else ():
                with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8") as info:
                    if wanted.search(info.read()) and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), status):
                        return Holder(int(pid), _command(pid))
    return None


def _command(pid: str) -> str:
    """A process's command line, program and script without their folders; one line, 100 letters at most."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = file.read().rstrip(b"\0").decode(errors="replace").split("\0")
    line = " ".join([os.path.basename(word) for word in words[:2]] + words[2:])
    return "".join(letter if letter.isprintable() else " " for letter in line[:100])


def lock(fd: int, path: str, *, shared: bool = False) -> None:
    """Take the lock of the region at ``path``: exclusive, or shared with others who only read.

    umount(8) returns before the server has ended: while the lock is held and the region is not mounted, wait for up to
    LOCK_WAIT seconds.  Raises RegionBusyError, which says who has it.
    """
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            return fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            mounted = mountpoints_of(path)
            if mounted or time.monotonic() >= deadline:
                break
        time.sleep(0.005)
    raise RegionBusyError(
        f"{path}: the region is in use by {lock_holder(path) or 'another process'}"
        + (f", mounted on {mounted[0]}" if mounted else ""),
        hint=f"umount {mounted[0]} first" if mounted else "end it first",
    )


def shared_mappings(fd: int) -> Iterator[tuple[int, int, int]]:
    """(process id, first byte, end) of each shared mapping of the file, of the processes that we may look at."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                addresses, mode, at, where, inode = line.split(maxsplit=5)[:5]
                if inode == str(status.st_ino) and where == device and mode.endswith("s"):
                    low, high = (int(word, 16) for word in addresses.split("-"))
                    yield int(pid), int(at, 16), int(at, 16) + high - low


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
        self.fd = fd if fd >= 0 else os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            if locked and fd < 0:
                lock(self.fd, path, shared=readonly)
            if prepare is not None:
                prepare(self.fd)
            size = self._find_size()
            if size < MIN_BLOCKS * BLOCK or size % BLOCK or size > MAX_BLOCKS * BLOCK:
                raise FormatError(
                    f"{path}: expected a multiple of 2 MiB, at least {MIN_BLOCKS * BLOCK // MiB} MiB, "
                    f"found {size} bytes",
                    hint="mkfs.pkernfs --size makes a region of the right size",
                )
            self._map = self._mmap(size)
        except BaseException:
            os.close(self.fd)
            raise
        #: a byte for each page: not 0 when it was asked for
        self._present = mmap.mmap(-1, size // PAGE, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        super().__init__(memoryview(self._map))

    def _find_size(self) -> int:
        filesystem = _filesystem_of(self.fd)
        self.kind = filesystem if filesystem in ("tmpfs", "hugetlbfs") else "file"
        self.volatile = self.kind == "file"
        self.barriers = self.volatile and not self.readonly
        return os.fstat(self.fd).st_size

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
                    return str(Holder(pid, _command(str(pid))))
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

    def _find_size(self) -> int:
        self.kind = "devdax"
        status = os.fstat(self.fd)
        sysfs = f"/sys/dev/char/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        try:
            with open(f"{sysfs}/size", encoding="ascii") as file:
                size = int(file.read())
        except (OSError, ValueError) as error:
            raise RegionError(
                f"{self.path}: expected a device-DAX device with a size in {sysfs}, found {error}"
            ) from None
        return size - size % BLOCK

    def _mmap(self, size: int) -> mmap.mmap:
        # Device DAX knows shared mappings only: a read-only one cannot be recovered in memory.
        return mmap.mmap(self.fd, size, prot=mmap.PROT_READ if self.readonly else mmap.PROT_READ | mmap.PROT_WRITE)

    def reserve(self, offset: int, length: int) -> None:
        """The memory is there; store zeros."""
        self.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Nothing to give back."""


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
    try:
        mode = os.stat(fd if fd >= 0 else path).st_mode
        if stat.S_ISREG(mode):
            return FileRegion(path, readonly=readonly, locked=locked, prepare=prepare, fd=fd)
        if stat.S_ISCHR(mode):
            return DaxRegion(path, readonly=readonly, locked=locked, prepare=prepare, fd=fd)
    except FileNotFoundError:
        raise RegionError(f"{path}: no such region", hint="mkfs.pkernfs makes one") from None
    except OSError as error:
        raise RegionError(f"{path}: cannot open the region: {error.strerror}") from None
    raise RegionError(f"{path}: expected a file or a device-DAX device, found {stat.filemode(mode)}")


def dax_address(path: str) -> int:
    """The physical address at which a device-DAX device begins, from sysfs; 0 when the kernel hides it."""
    device = os.stat(path).st_rdev
    try:
        with open(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}/resource", encoding="ascii") as file:
            return int(file.read(), 0)
    except (OSError, ValueError):
        return 0
