"""What has happened on a mount, counted in memory that its workers and its keeper share: 512 words of 8 bytes.

The word of an opcode (include/uapi/linux/fuse.h) holds how many such requests there were; BUGS, how many of them ended
in an exception that is none of ours.
"""

from __future__ import annotations

import mmap
import os

from pkernfs.server.device import OPCODES

SIZE = 4096
BUGS = 511
INDEX = {name.lower(): opcode for opcode, name in OPCODES.items()}


def make_stats() -> int:
    """A descriptor of such memory, all zeros."""
    fd = os.memfd_create("pkernfs-stats", os.MFD_CLOEXEC)
    os.truncate(fd, SIZE)
    return fd


def map_stats(fd: int) -> memoryview:
    """The words."""
    return memoryview(mmap.mmap(fd, SIZE)).cast("Q")


def requests(words: memoryview) -> dict[str, int]:
    """How many requests there were, by kind; those that there were none of are left out."""
    return {name: words[opcode] for name, opcode in INDEX.items() if words[opcode]}
