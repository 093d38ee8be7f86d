"""What the host has for the memory of a region: its filesystem, its huge pages, its RAM, the limit of a cgroup."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress

from pkernfs.format import KiB

#: linux/magic.h
FILESYSTEMS = {0x01021994: "tmpfs", 0x958458F6: "hugetlbfs"}


def kind_of_file(fd: int) -> str:
    """What a region in this file is called: "tmpfs", "hugetlbfs", or "file" for one on a disk.

    fstatfs(2), which os.fstatvfs does not show all of, and not mountinfo: that needs /proc, and st_dev is not in it for
    files of btrfs and overlayfs.
    """
    buffer = ctypes.create_string_buffer(256)  # struct statfs: f_type comes first, a long
    if ctypes.CDLL(None).fstatfs(fd, buffer):
        return "file"
    kind = int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return FILESYSTEMS.get(kind, "file")


def what_it_has(fd: int, size: int) -> int:
    """How many of its ``size`` bytes a file has memory, or room on its disk, for."""
    return min(os.fstat(fd).st_blocks * 512, size)


def free_for(fd: int, kind: str, *, thorough: bool = False) -> int:
    """How many bytes more a file of a region's ``kind`` can get; an estimate, as others take memory too.

    ``thorough``: for a region that is to be made: limits of cgroups too, of this process, which costs a tenth of a
    millisecond.
    """
    filesystem = os.fstatvfs(fd)
    # A tmpfs or hugetlbfs without a limit says 0 blocks, or none at all.
    limited = 0 < filesystem.f_blocks < 1 << 52
    limits = [filesystem.f_bavail * filesystem.f_frsize] if limited else []
    if kind == "hugetlbfs":
        # Those that are set aside are the region's own once it is mapped.
        limits += [_huge_pages(filesystem.f_bsize, set_aside=not thorough)]
    elif kind == "tmpfs":
        limits += _ram()
        if thorough:
            limits += _cgroups()
    return min(limits, default=1 << 62)


def most_for(fd: int, kind: str) -> int:
    """How many bytes a file of a region's ``kind`` can ever get: all RAM and swap, all huge pages, all of its disk.

    The size of a tmpfs is no limit to that: remounting changes it.
    """
    filesystem = os.fstatvfs(fd)
    if kind == "tmpfs":
        memory = _numbers("/proc/meminfo")
        return (memory["MemTotal"] + memory.get("SwapTotal", 0)) * KiB if "MemTotal" in memory else 1 << 62
    if kind == "hugetlbfs":
        folder = _huge_page_folder(filesystem.f_bsize)
        names = ("nr_hugepages", "nr_overcommit_hugepages")
        return sum(_number(f"{folder}/{name}") or 0 for name in names) * filesystem.f_bsize
    return filesystem.f_blocks * filesystem.f_frsize


def memory_of(fd: int) -> tuple[int | None, int | None]:
    """What the region in a file has, and how much more it can get, bytes; None of a device."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return None, None
    return what_it_has(fd, status.st_size), free_for(fd, kind_of_file(fd))


def _numbers(path: str) -> dict[str, int]:
    """The lines "NAME[:] NUMBER ..." of a file of the kernel's; nothing when it cannot be read."""
    found = {}
    with suppress(OSError), open(path, "rb") as file:
        for line in file:
            words = line.split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0].rstrip(b":").decode(errors="replace")] = int(words[1])
    return found


def _number(path: str) -> int | None:
    """The number that a file of the kernel's holds; None: another word ("max"), or none that can be read."""
    with suppress(OSError, ValueError), open(path, "rb") as file:
        return int(file.read())
    return None


def _ram() -> list[int]:
    memory = _numbers("/proc/meminfo")
    if "MemAvailable" not in memory:
        return []
    return [(memory["MemAvailable"] + memory.get("SwapFree", 0)) * KiB]


def _huge_page_folder(size: int) -> str:
    return f"/sys/kernel/mm/hugepages/hugepages-{size // KiB}kB"


def _huge_pages(size: int, *, set_aside: bool) -> int:
    folder = _huge_page_folder(size)
    names = ("free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
    free, reserved, more, surplus = (_number(f"{folder}/{name}") or 0 for name in names)
    return max(0, free - reserved * (not set_aside) + more - surplus) * size


def _cgroups(process: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> Iterator[int]:
    """What is left in each cgroup (version 2) around this process; its page cache counts as free."""
    path = ""
    with suppress(OSError), open(process, "rb") as file:
        for line in file:
            if line.startswith(b"0::"):
                path = os.fsdecode(line[3:].rstrip(b"\n"))
    while path.strip("/"):
        folder = f"{root}{path}"
        limit, used = _number(f"{folder}/memory.max"), _number(f"{folder}/memory.current")
        if limit is not None and used is not None:
            cached = _numbers(f"{folder}/memory.stat")
            yield max(0, limit - used + cached.get("inactive_file", 0) + cached.get("active_file", 0))
        path = os.path.dirname(path)
