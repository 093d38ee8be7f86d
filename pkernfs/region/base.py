"""The interface of a region, and its twin in ordinary memory."""

import mmap
from collections.abc import Sequence
from types import TracebackType
from typing import Self

ZERO_CHUNK = bytes(1 << 20)


class Region:
    """``size`` bytes of memory that outlives its users.

    ``view`` gives the bytes for reading; whoever changes them calls a method, so that a twin can see every store.
    Offsets and lengths are in bytes.  ``zero``, ``reserve`` and ``discard`` work on whole pages.
    """

    path: str = ""
    kind: str = "memory"
    #: True where the medium may lose or reorder what was not flushed (a file on a disk, when its machine dies).
    volatile: bool = False
    #: True: ``barrier`` flushes.  What a process or a kexec leaves behind needs no barrier.
    barriers: bool = False
    readonly: bool = False
    #: True: all that is in use has memory, as far as is known, so that a store needs no question first.
    whole: bool = True
    #: True: it never says so, for there may be bad memory in it.
    careful: bool = False

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.words = view.cast("Q")
        self.size = len(view)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes."""
        return bytes(self.view[offset : offset + length])

    def present(self, offset: int, length: int) -> bytes | memoryview:
        """A range that can be read to its end without a signal, and by the kernel though this process is killed."""
        return self.view[offset : offset + length]

    def peek(self, offset: int, length: int) -> bytes:
        """A copy as ``read`` makes it, of what is in the memory itself, that takes no memory for what has none."""
        return bytes(self.view[offset : offset + length])

    def next_data(self, offset: int) -> int:
        """The first offset from ``offset`` on that may hold anything but zeros; ``size``: there is none."""
        return min(offset, self.size)

    def scratch(self) -> "Region":
        """The same bytes for somebody who stores in them, which must not reach the region: for a read-only one."""
        return MemoryRegion(image=self.view)

    def word(self, offset: int) -> int:
        """The aligned 8-byte word at ``offset``."""
        return self.words[offset >> 3]

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into the region: atomic in each aligned word of 8 bytes, in no order that may be relied on."""
        self.view[offset : offset + len(data)] = data

    def store_word(self, offset: int, value: int) -> None:
        """One store of an aligned 8-byte word.

        Through the cast view and not with struct.pack_into, which zeroes its target first and so lets a concurrent
        reader (an IOMMU, for one) see a zero that nobody wrote.
        """
        self.words[offset >> 3] = value

    def zero(self, offset: int, length: int) -> None:
        """Store zeros."""
        for at in range(offset, offset + length, len(ZERO_CHUNK)):
            self.store(at, ZERO_CHUNK[: min(len(ZERO_CHUNK), offset + length - at)])

    def reserve(self, offset: int, length: int) -> None:
        """Make sure that the range is zero and has memory behind it, so that no store into it can fail later.

        Raises FsError(ENOSPC) when the host has no memory left for it.
        """
        self.zero(offset, length)

    def make_storable(self, offset: int, length: int) -> None:
        """Make sure, before anything is stored, that a store into the range does not fail: see ``whole``.

        Raises FsError: ENOSPC, EIO.
        """

    def secure(self, offset: int, length: int) -> None:
        """Make sure that the range has memory behind it, whatever it holds.

        Raises FsError: ENOSPC when the host has none left, EIO when a part of the range cannot be used.
        """

    def discard(self, offset: int, length: int) -> None:
        """Give the memory of a range that nobody uses back to the host, where that is possible."""

    def memory(self) -> int:
        """How much of the region has memory, bytes."""
        return self.size

    def host_free(self) -> int | None:
        """How much more memory the host can give it, bytes; None: it has all that it needs."""
        return None

    def mapped_by(self, ranges: Sequence[tuple[int, int]]) -> list[int]:  # noqa: ARG002  # of memory: by nobody
        """The other processes that map a part of the ranges (offset, length), shared; those that may be seen.

        Raises NoProcError.
        """
        return []

    def flush(self) -> None:
        """Return when all stores so far are on the medium.  Raises FsError(EIO)."""

    def barrier(self) -> None:
        """No store behind this is on the medium before all stores ahead of it are, where ``barriers`` asks for it."""
        if self.barriers:
            self.flush()

    def close(self) -> None:
        """Release the mapping and the lock."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MemoryRegion(Region):
    """A region in anonymous memory, for tests: starts as zeros, or as a copy of ``image``."""

    def __init__(self, size: int = 0, image: bytes | bytearray | memoryview = b"") -> None:
        self._map = mmap.mmap(-1, size or len(image))
        super().__init__(memoryview(self._map))
        if image:
            self.view[: len(image)] = image

    def discard(self, offset: int, length: int) -> None:
        """Back to the host; reads zero afterwards (DONTNEED would not do: the mapping is a shared one)."""
        self._map.madvise(mmap.MADV_REMOVE, offset, length)
