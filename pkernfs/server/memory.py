"""Memory of a mount that is not in its region yet, and memory of a region that others hold."""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress

from pkernfs.processes import NoProcError, shared_mappings

# Numbers and constants of the mount API (asm-generic/unistd.h, linux/mount.h), the same on all machines that we know.
FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432
FSCONFIG_CMD_CREATE = 6
CLOEXEC = 1


def _debugfs() -> int:
    """A descriptor of debugfs's root, which need not be mounted anywhere.  Raises OSError.

    fsopen(2) and fsmount(2) (Linux 5.2) instead of a path: containers and hardened hosts do not mount it.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result = libc.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), "debugfs")
        return int(result)

    context = call(FSOPEN, b"debugfs", ctypes.c_uint(CLOEXEC))
    try:
        call(FSCONFIG, ctypes.c_int(context), ctypes.c_uint(FSCONFIG_CMD_CREATE), None, None, ctypes.c_int(0))
        return call(FSMOUNT, ctypes.c_int(context), ctypes.c_uint(CLOEXEC), ctypes.c_uint(0))
    finally:
        os.close(context)


def dirty_bytes(device: str) -> int | None:
    """Bytes that were written to the mount ``device`` (MAJOR:MINOR) and are in the kernel's page cache only.

    None when the kernel does not tell: to others than root, or without debugfs.
    """
    with suppress(OSError, ValueError, MemoryError):
        root = _debugfs()
        try:
            fd = os.open(f"bdi/{device}/stats", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        finally:
            os.close(root)
        with open(fd, "rb") as file:
            text = file.read()
        # Not BdiDirtied: that counts what was ever dirtied (mm/backing-dev.c, bdi_debug_stats_show).
        found = re.findall(rb"^(?:BdiReclaimable|BdiWriteback): +([0-9]+) kB$", text, re.MULTILINE)
        return sum(map(int, found)) * 1024 if len(found) == 2 else None
    return None


def pinned_bytes(region_fd: int, worker: int) -> int | None:
    """Bytes of the region that processes other than its worker map: guests with the direct map, for one.

    None when that cannot be found out now: without /proc, or a descriptor to read it.
    """
    try:
        ranges = sorted((first, end) for pid, first, end in shared_mappings(region_fd) if pid != worker)
    except (NoProcError, OSError, MemoryError):
        return None
    total = reached = 0
    for first, end in ranges:
        total += max(end - max(first, reached), 0)
        reached = max(reached, end)
    return total
