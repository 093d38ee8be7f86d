"""Memory for requests, there before they are read.

The kernel copies a request to its reader's memory.  When that has to be found page by page, and the reader is killed
meanwhile, the copy fails, and the kernel ends the request with EIO (fuse_dev_do_read; get_user_pages gives up at a
fatal signal; seen on Linux 6.18).  Into memory that is in the page table already it is copied to the end, and what was
read and not answered comes again.  libfuse allocates its buffers itself, with malloc, so malloc is told.
"""

from __future__ import annotations

import ctypes
from typing import Final

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  #: malloc.h
RESIDENT: Final = 4 << 20  #: bytes: the largest request, for libfuse, once more for Python, and what else comes between
#: Bytes in a keeper, which has no libfuse, and hands on one request at a time.
RELAYED: Final = 2 << 20


def keep_resident(size: int = RESIDENT) -> None:
    """Let the next ``size`` bytes that malloc gives out be in memory, and keep what is freed for the next ones.

    Where the allocator is not glibc's, nothing but a kill in that moment is worse.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(M_MMAP_THRESHOLD, 2 * size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)
    if memory := libc.malloc(size):
        ctypes.memset(memory, 0, size)
        libc.free(memory)
