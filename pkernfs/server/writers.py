"""Who has a file of the mount open for writing, or mapped so: looked up in /proc.

Not seen: processes outside this pid namespace, descriptors that are on their way through a socket, and users inside the
kernel (loop devices, NFS, io_uring).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from pkernfs.processes import Holder, holder, pids, shared_by

FLAGS = re.compile(rb"^flags:\s*([0-7]+)$", re.MULTILINE)
INO = re.compile(rb"^ino:\s*([0-9]+)$", re.MULTILINE)  #: from Linux 5.14 on


def writer_of(device: int, ino: int) -> Holder | None:
    """The first process found that can write to inode ``ino`` of the filesystem ``device``; None: there is none.

    Blocks, and asks the mount for attributes: for a thread.  Raises NoProcError.
    """
    for pid in pids():
        with suppress(OSError):
            # A mapping can be there without a descriptor.
            if _has_open(pid, device, ino) or any(one.writable for one in shared_by(pid, device, ino)):
                return holder(pid)
    return None


def _has_open(pid: int, device: int, ino: int) -> bool:
    """A descriptor is only looked at closer when its inode has the number: a stat may wait for a server that hangs."""
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        with suppress(OSError):
            with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
                facts = file.read()
            flags, number = FLAGS.search(facts), INO.search(facts)
            if number and int(number[1]) == ino and flags and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY:
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                if (status.st_dev, status.st_ino) == (device, ino):
                    return True
    return False
