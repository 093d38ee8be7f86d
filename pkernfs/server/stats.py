"""What has happened on a mount, counted in memory that its workers and its keeper share: 512 counters of 8 bytes.

The counter of an opcode (include/uapi/linux/fuse.h) holds how many such requests there were; BUGS, how many of them
ended in an exception that is none of ours; AWAITING, how many bytes await an invalidation.  In memory, and not in
messages to the keeper: counting is one store for each request, and what a worker has counted survives kill -9.
"""

from __future__ import annotations

import mmap
import os

from pkernfs.server.device import OPCODES

SIZE = 4096
BUGS = 511
AWAITING = 510
INDEX = {name.lower(): opcode for opcode, name in OPCODES.items()}


def make_stats() -> int:
    """A descriptor of such memory, all zeros."""
    fd = os.memfd_create("pkernfs-stats", os.MFD_CLOEXEC)
    os.truncate(fd, SIZE)
    return fd


def map_stats(fd: int) -> memoryview:
    """The counters."""
    return memoryview(mmap.mmap(fd, SIZE)).cast("Q")


def requests(counters: memoryview) -> dict[str, int]:
    """How many requests there were, by kind; those that there were none of are left out."""
    return {name: counters[opcode] for name, opcode in INDEX.items() if counters[opcode]}
