"""A worker with a fault planted in it: what the tests of real mounts must notice.

    PKERNFS_WORKER="python tests/mount/faulty.py FAULT" mount.pkernfs REGION DIR

late-commit     answers before it commits: all but the first 100 transactions reach the region at the end only
short-journal   a journal that holds next to nothing
slow-memory     a host that takes a second for 64 MiB
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Iterable

import pkernfs.region.opening
from pkernfs.format import MiB, Superblock
from pkernfs.fs.journal import Journal
from pkernfs.region.base import Region
from pkernfs.region.file import MAP_NORESERVE, FileRegion
from pkernfs.server import worker

LATE = 100
SHORT = 200  #: bytes


class LateRegion(FileRegion):
    """Stores go to a private mapping first, and all together to the file when ``write_back`` is called."""

    def _mmap(self, size: int) -> mmap.mmap:
        self.stores: list[tuple[int, bytes]] = []
        return mmap.mmap(self.fd, size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.stores.append((offset, bytes(data)))
        super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        self.stores.append((offset, value.to_bytes(8, "little")))
        super().store_word(offset, value)

    def reserve(self, offset: int, length: int) -> None:
        self.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        pass

    def write_back(self) -> None:
        for offset, data in self.stores:
            os.pwrite(self.fd, data, offset)
        self.stores.clear()

    def close(self) -> None:
        if self.fd >= 0:
            self.write_back()
        super().close()


def commit_late() -> None:
    """Plant late-commit."""
    commit = Journal.commit

    def late(
        self: Journal,
        stores: Iterable[tuple[int, bytes]],
        discards: Iterable[tuple[int, int]],
        words: Iterable[tuple[int, bytes]] = (),
    ) -> None:
        commit(self, stores, discards, words)
        region: Region = self.region
        if isinstance(region, LateRegion) and self.sequence <= LATE:
            region.write_back()

    Journal.commit = late  # type: ignore[method-assign]
    pkernfs.region.opening.FileRegion = LateRegion  # type: ignore[attr-defined]


def shorten_journal() -> None:
    """Plant short-journal."""
    init = Journal.__init__

    def short(self: Journal, region: Region, sb: Superblock) -> None:
        init(self, region, sb)
        self.capacity = SHORT

    Journal.__init__ = short  # type: ignore[method-assign]


def slow_memory() -> None:
    """Plant slow-memory."""
    reserve = FileRegion.reserve

    def slow(self: FileRegion, offset: int, length: int) -> None:
        time.sleep(length / (64 * MiB))
        reserve(self, offset, length)

    FileRegion.reserve = slow  # type: ignore[method-assign]


FAULTS = {"late-commit": commit_late, "short-journal": shorten_journal, "slow-memory": slow_memory}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    worker.main()
