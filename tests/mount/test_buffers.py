"""A request that is read in a process about to be killed is not lost: the kernel needs no new memory for it there."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from tests.mount.site import MiB, Site, errno_of


def faults(pid: int) -> int:
    """How often a process has been given memory: minflt of proc_pid_stat(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_the_first_large_request(site: Site) -> None:
    """It is read to memory that is there.  One that changes nothing: an offset that no file can have."""
    worker = site.status()["worker"]
    fd = os.open(site.mnt / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, MiB) as data:
        before = faults(worker)
        assert errno_of(os.pwrite, fd, data, 1 << 60) == errno.EFBIG
        assert faults(worker) - before < MiB // mmap.PAGESIZE
    os.close(fd)
