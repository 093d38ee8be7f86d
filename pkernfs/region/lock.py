"""The lock of a region, and who uses its memory: looked up in /proc, so that an error can name them."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import RegionBusyError
from pkernfs.mountinfo import mountpoints_of

LOCK_WAIT = 10.0  #: seconds


class Holder(NamedTuple):
    """The process that holds a region's lock."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def lock_holder(path: str) -> Holder | None:
    """Who holds the lock of the region at ``path``; None when nobody does, or nobody that may be seen.

    From the lock lines of /proc/PID/fdinfo and not from /proc/locks, which names the process that took the lock: it may
    have handed it to a child since.  Descriptors are only looked at closer when such a line names the region's inode: a
    stat of any other may wait for a server that hangs.
    """
    status = os.stat(path)
    wanted = re.compile(rf"^lock:.* FLOCK .*:{status.st_ino} 0 EOF$", re.MULTILINE)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fdinfo") if int(pid) != os.getpid() else ():
                with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8") as info:
                    if wanted.search(info.read()) and os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), status):
                        return Holder(int(pid), command_of(pid))
    return None


def command_of(pid: str) -> str:
    """A process's command line, program and script without their folders; one line, 100 letters at most."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        arguments = file.read().rstrip(b"\0").decode(errors="replace").split("\0")
    line = " ".join([os.path.basename(word) for word in arguments[:2]] + arguments[2:])
    return "".join(letter if letter.isprintable() else " " for letter in line[:100])


def lock(fd: int, path: str, *, shared: bool = False) -> None:
    """Take the lock of the region at ``path``: exclusive, or shared with others who only read.

    umount(8) returns before the server has ended: while the lock is held and the region is not mounted, wait for up to
    LOCK_WAIT seconds.  Raises RegionBusyError, which says who has it.
    """
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            return fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            mounted = mountpoints_of(path)
            if mounted or time.monotonic() >= deadline:
                break
        time.sleep(0.005)
    raise RegionBusyError(
        f"{path}: the region is in use by {lock_holder(path) or 'another process'}"
        + (f", mounted on {mounted[0]}" if mounted else ""),
        hint=f"umount {mounted[0]} first" if mounted else "end it first",
    )


def shared_mappings(fd: int) -> Iterator[tuple[int, int, int]]:
    """(process id, first byte, end) of each shared mapping of the file, of the processes that we may look at."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                addresses, mode, at, where, inode = line.split(maxsplit=5)[:5]
                if inode == str(status.st_ino) and where == device and mode.endswith("s"):
                    low, high = (int(word, 16) for word in addresses.split("-"))
                    yield int(pid), int(at, 16), int(at, 16) + high - low
