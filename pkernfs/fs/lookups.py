"""How many references the kernel holds to each inode, in memory that outlives the worker that counts them.

A removed file stays while it is referred to.  Counts stand in an array over all inode numbers; a page of it takes
memory once a count in it was not 0.  They are not in the region: they end with the mount, and a look-up would be as
dear as a change if it had to commit one.

A reply that is lost told the kernel of no inode.  So what the request at work has counted is noted, each inode with its
count before, and taken back when the request comes again (replies.py).  The key tells whether it does: a worker that is
killed behind its reply leaves the same notes, and the next request that comes again is another one.  Notes are taken
back before they are dropped, and the first note of an inode counts, so that a worker may be killed anywhere in between.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress

from pkernfs.format import INODE_SIZE, Ino
from pkernfs.region.file import MAP_NORESERVE

#: Bytes before the counts.  The most that one request counts are the entries of one READDIRPLUS reply: of 1 MiB at
#: most (FUSE_MAX_MAX_PAGES, Linux 4.20), with 152 bytes and a name each, which are 6,900.
NOTES = 1 << 17
#: Words of the notes: key of the request at work, number of notes; then (inode, count before) each.
KEY, NUMBER, FIRST = 0, 1, 2
MOST = NOTES // 16 - FIRST  #: notes of one request


def lookups_size(region_size: int) -> int:
    """Bytes for the counts of a region of ``region_size`` bytes, nearly all of them holes."""
    return NOTES + region_size // INODE_SIZE * 8


class Lookups:
    """The counts.  ``memory``: lookups_size() bytes, zeros at the beginning of the mount; by default private ones."""

    def __init__(self, region_size: int, memory: mmap.mmap | None = None) -> None:
        self.memory = memory or mmap.mmap(-1, lookups_size(region_size), flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        words = memoryview(self.memory).cast("Q")
        self.notes = words[: NOTES // 8]
        self.counts = words[NOTES // 8 :]
        #: what the last request of the worker before has counted, and its key
        self.noted: dict[Ino, int] = {}
        self.noted_key = self.notes[KEY]
        for at in range(min(self.notes[NUMBER], MOST) - 1, -1, -1):
            ino, before = self.notes[FIRST + 2 * at : FIRST + 2 * at + 2]
            self.noted[Ino(ino)] = self.counts[ino] - before

    def begin(self, key: int, *, replayed: bool) -> None:
        """A request begins; ``replayed``: the worker before did not answer it.

        Any other one comes when the one before it is answered: what that has counted stands.
        """
        self.notes[KEY] = key
        if not replayed:
            self.notes[NUMBER] = 0
        elif key == self.noted_key:
            for ino, count in self.noted.items():
                self.drop(ino, count)
            self.noted = {}

    def referenced(self, fd: int) -> Iterator[Ino]:
        """The inodes that the kernel knows; ``fd``: the file that the memory is of, whose holes are passed over."""
        end = NOTES
        with suppress(OSError):  # ENXIO: no more data
            while True:
                begin = os.lseek(fd, end, os.SEEK_DATA)
                end = os.lseek(fd, begin, os.SEEK_HOLE)
                yield from (Ino(ino) for ino in range((begin - NOTES) // 8, (end - NOTES) // 8) if self.counts[ino])

    def __getitem__(self, ino: Ino) -> int:
        return self.counts[ino]

    def add(self, ino: Ino) -> None:
        """One reference more."""
        notes, counts = self.notes, self.counts
        number = notes[NUMBER]
        count = counts[ino]
        if number < MOST:
            notes[FIRST + 2 * number] = ino
            notes[FIRST + 2 * number + 1] = count
            notes[NUMBER] = number + 1
        counts[ino] = count + 1

    def drop(self, ino: Ino, count: int) -> int:
        """``count`` references fewer; how many are left."""
        if ino >= len(self.counts):
            return 0
        left = max(self.counts[ino] - count, 0)
        self.counts[ino] = left
        return left
