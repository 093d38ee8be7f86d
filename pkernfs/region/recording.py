"""The recording twin: logs every store and flush, so that a test can replay any prefix or subset of them."""

from typing import Final, NamedTuple

from pkernfs.region.base import MemoryRegion


class Store(NamedTuple):
    """One change of the region.  ``word``: it was made with one aligned 8-byte store."""

    offset: int
    data: bytes
    word: bool


FLUSH: Final = Store(0, b"", False)  #: stands in a log for a flush: stores nothing


class RecordingRegion(MemoryRegion):
    """A region in memory with a log of all stores in their order; ``log`` may be cleared at any time.

    ``volatile``: stands for a file on a disk, with barriers, and logs flushes too.
    """

    kind = "recording"

    def __init__(self, size: int = 0, image: bytes | bytearray | memoryview = b"", *, volatile: bool = False) -> None:
        super().__init__(size, image)
        self.volatile = self.barriers = volatile
        self.log: list[Store] = []

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy and log."""
        self.log.append(Store(offset, bytes(data), False))
        super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        """Store one word and log it."""
        self.log.append(Store(offset, value.to_bytes(8, "little"), True))
        super().store_word(offset, value)

    def discard(self, offset: int, length: int) -> None:
        """Logged as a store of zeros, which is what a reader sees."""
        self.log.append(Store(offset, bytes(length), False))
        super().discard(offset, length)

    def flush(self) -> None:
        """Logged as FLUSH where it matters."""
        if self.volatile:
            self.log.append(FLUSH)
