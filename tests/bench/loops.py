"""Loops in Python, whose own cost (about 1 us a call, 0.1 us a word) is the same for all systems."""

from __future__ import annotations

import mmap
import os
import random
import time
from array import array
from typing import Final, NamedTuple

from tests.bench.systems import System, drop_caches

MiB: Final = 1 << 20

#: Files of one round of `metadata`.
FILES: Final = 2000

#: Size of the mapped file, and how many of its words are incremented.
MAPPED: Final = 512 * MiB
WORDS: Final = 1_000_000

#: Calls of `cached`.
CALLS: Final = 200_000

#: After so many seconds of incrementing the rate is known well enough (it can be 300 times less than tmpfs's).
PATIENCE: Final = 10.0


class Metadata(NamedTuple):
    """Microseconds a file."""

    create: float  #: open with O_CREAT | O_EXCL, and close
    stat: float  #: of a file of which the kernel knows nothing any more (tmpfs always does)
    unlink: float


def metadata(system: System) -> Metadata:
    """Create, stat and unlink `FILES` empty files in one new directory."""
    folder = system.mnt / "metadata"
    folder.mkdir()
    names = [f"{folder}/{number:05}" for number in range(FILES)]

    start = time.perf_counter()
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    create = time.perf_counter() - start

    drop_caches()
    start = time.perf_counter()
    for name in names:
        os.stat(name)
    stat = time.perf_counter() - start

    start = time.perf_counter()
    for name in names:
        os.unlink(name)
    unlink = time.perf_counter() - start

    folder.rmdir()
    return Metadata(*(seconds / FILES * 1e6 for seconds in (create, stat, unlink)))


class Cached(NamedTuple):
    """Reads that the page cache answers: of one open file, all of which was read through the same descriptor before."""

    large: float  #: MB/s with 1 MiB calls in sequence
    small: float  #: thousands of 4 KiB calls a second at random places


def cached(system: System) -> Cached:
    """Read the file of `lay_out` with one open."""
    large, small = bytearray(MiB), bytearray(4096)
    places = random.Random(1).choices(range(0, MAPPED, 4096), k=CALLS)
    fd = os.open(system.mnt / "mapped", os.O_RDONLY)
    try:
        for offset in range(0, MAPPED, MiB):
            os.preadv(fd, [large], offset)
        start = time.perf_counter()
        for offset in range(0, MAPPED, MiB):
            os.preadv(fd, [large], offset)
        half = time.perf_counter()
        for offset in places:
            os.preadv(fd, [small], offset)
        end = time.perf_counter()
    finally:
        os.close(fd)
    return Cached(MAPPED / (half - start) / 1e6, CALLS / (end - half) / 1e3)


class Mapped(NamedTuple):
    """Thousands of words a second."""

    first: float  #: pages that are not in memory: each access may fault, and tmpfs's never does
    again: float  #: the same words once more, while the kernel may be writing pages back
    synced: float  #: both passes, and msync until all of it is with the server


def lay_out(system: System) -> None:
    """Write the file that `mapped` and `cached` use, so that they allocate nothing."""
    chunk = bytes(MiB)
    with (system.mnt / "mapped").open("wb", buffering=0) as file:
        for _ in range(MAPPED // MiB):
            file.write(chunk)
        os.fsync(file.fileno())


def mapped(system: System) -> Mapped:
    """Map the file shared, as a hypervisor does with guest RAM, and increment random 8-byte words."""
    drop_caches()
    order = array("I", random.Random(1).choices(range(MAPPED // 8), k=WORDS))
    with (system.mnt / "mapped").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), MAPPED) as memory:
        with memoryview(memory) as view, view.cast("Q") as words:
            start = time.perf_counter()
            count = _increment(words, order)
            half = time.perf_counter()
            count_again = _increment(words, order[:count])
            end = time.perf_counter()
        memory.flush()
        synced = time.perf_counter()
    return Mapped(
        count / (half - start) / 1e3, count_again / (end - half) / 1e3, (count + count_again) / (synced - start) / 1e3
    )


def _increment(words: memoryview, order: array[int]) -> int:
    """Increment the words at the indices `order`, until patience ends; return how many."""
    deadline = time.perf_counter() + PATIENCE
    step = 1000
    for done in range(0, len(order), step):
        for index in order[done : done + step]:
            words[index] = (words[index] + 1) & 0xFFFF_FFFF_FFFF_FFFF
        if time.perf_counter() > deadline:
            return done + step
    return len(order)
