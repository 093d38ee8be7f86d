"""Other processes as /proc shows them: what they are called, what they map, which locks they hold.

The text is the kernel's, with names in it that anybody on the machine may have chosen: of programs, of files.  So it is
read as bytes and split at exactly the bytes that the kernel puts, here and in mountinfo.py; a line that is not as it
should be is somebody else's, and skipped.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Final, NamedTuple

from pkernfs.errors import PkernfsError, printable

SHOWN: Final = 100  #: letters of a command line
#: What ps and top show of a program's name: TASK_COMM_LEN of the kernel, without the zero at the end.
COMM: Final = 15

#: proc_pid_maps(5); fs/proc/task_mmu.c: fixed fields with one space behind each, then spaces, then the name up to the
#: newline.  In the name only a newline is escaped; a carriage return, a space or a backslash stands there as it is.
_MAPPING = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) [r-]([w-])[x-]([sp]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+) *(.*)", re.DOTALL
)


class NoProcError(PkernfsError):
    """/proc is not mounted: what the kernel tells there is not known."""

    def __init__(self) -> None:
        super().__init__("/proc is not mounted: who uses what is not known", hint="mount -t proc proc /proc")


class Holder(NamedTuple):
    """A process that has something that is asked for: "process 1234, qemu-system-x86 -name g1"."""

    pid: int
    command: str  #: for people; "" when the process is gone
    guest: bool = False  #: whether it is a QEMU, whose guest it names

    def __str__(self) -> str:
        return f"process {self.pid}, {self.command}" if self.command else f"process {self.pid}"


class Mapping(NamedTuple):
    """A line of /proc/PID/maps.  ``start`` and ``end``: which bytes of the file."""

    addresses: str  #: as /proc/PID/map_files names it
    shared: bool
    writable: bool
    start: int
    end: int
    device: str  #: of the filesystem, MAJOR:MINOR in hexadecimal
    inode: int
    name: bytes


def pids() -> list[int]:
    """All processes that /proc shows.  Raises NoProcError, OSError."""
    try:
        os.readlink("/proc/self")
        return [int(name) for name in os.listdir("/proc") if name.isascii() and name.isdigit()]
    except FileNotFoundError:
        raise NoProcError from None


def holder(pid: int) -> Holder:
    """A process with its name, in one line: a guest's by that, any other by its command line.

    A QEMU has a hundred arguments: of those the name of its guest is what an operator knows it by.
    """
    words = _words(pid)
    if not words[0]:  # of the kernel's, about to end, or gone
        with suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
            return Holder(pid, printable(file.read().rstrip(b"\n")))
        return Holder(pid, "")
    words[:2] = map(os.path.basename, words[:2])
    if words[0].startswith((b"qemu", b"kvm")) and (guest := guest_of(words)):
        return Holder(pid, f"{printable(words[0][:COMM])} -name {printable(guest[:SHOWN])}", guest=True)
    return Holder(pid, printable(b" ".join(words)[:SHOWN]))


def is_server(pid: int) -> bool:
    """Whether a process serves a mount, by its command line."""
    words = _words(pid)
    return any(word.startswith(b"pkernfs.server.") for word in words) or any(
        os.path.basename(word) in (b"pkernfs", b"mount.pkernfs") for word in words[:2]
    )


def _words(pid: int) -> list[bytes]:
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read(1 << 20).rstrip(b"\0").split(b"\0")
    return [b""]


def guest_of(words: list[bytes]) -> bytes:
    """The name of the guest in QEMU's command line: -name g1, or -name guest=g1,debug-threads=on as libvirt has it."""
    for option, value in pairwise(words):
        if option in (b"-name", b"--name"):
            for field in value.replace(b",,", b"\0").split(b","):  # a comma within a value is doubled
                key, equals, rest = field.partition(b"=")
                if not equals or key == b"guest":
                    return (rest if equals else key).replace(b"\0", b",")
    return b""


def parse_maps(text: bytes) -> Iterator[Mapping]:
    """The lines of a /proc/PID/maps."""
    for line in text.split(b"\n"):
        if match := _MAPPING.fullmatch(line):
            low, high, write, shared, offset, device, inode, name = match.groups()
            first, size = int(offset, 16), int(high, 16) - int(low, 16)
            addresses = f"{low.decode()}-{high.decode()}"
            where = device.decode(), int(inode), name
            yield Mapping(addresses, shared == b"s", write == b"w", first, first + size, *where)


def _as_in_maps(device: int) -> str:
    """The number of a filesystem as maps has it: MAJOR:MINOR in hexadecimal."""
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def shared_by(pid: int, device: int, ino: int) -> list[Mapping]:
    """A process's shared mappings of inode ``ino`` of the filesystem ``device``, as st_dev has it.  Raises OSError."""
    with open(f"/proc/{pid}/maps", "rb") as file:
        text = file.read()
    if b" %d " % ino not in text:  # nearly all: most are read for nothing
        return []
    wanted = True, _as_in_maps(device), ino
    return [one for one in parse_maps(text) if (one.shared, one.device, one.inode) == wanted]


def parse_locks(text: bytes) -> Iterator[int]:
    """The inodes of whole files that the lock lines of a /proc/PID/fdinfo/FD show as locked by flock(2)."""
    yield from map(int, re.findall(rb"^lock:\t[^\n]* FLOCK [^\n]*:([0-9]+) 0 EOF$", text, re.MULTILINE))


def shared_mappings(fd: int, *, private: bool = False) -> Iterator[tuple[int, int, int]]:
    """(process id, first byte, end) of each shared mapping of the file, of the processes that we may look at.

    ``private``: of each private one, too.  By device and inode, so that a file is found by whatever name it was opened;
    a character device by its number, too: libvirt gives each QEMU a /dev with nodes of its own.  Raises NoProcError.
    """
    status = os.fstat(fd)
    device = _as_in_maps(status.st_dev)
    wanted = b" /dev/" if stat.S_ISCHR(status.st_mode) else b" %d" % status.st_ino
    for pid in pids():
        with suppress(OSError):
            with open(f"/proc/{pid}/maps", "rb") as file:
                text = file.read()
            if wanted not in text:  # nearly all: most are read for nothing
                continue
            for one in parse_maps(text):
                if not (one.shared or private):
                    continue
                same = one.inode == status.st_ino
                if (same and one.device == device) or (
                    (same or one.name.startswith(b"/dev/")) and _is_mapping_of(pid, one, status)
                ):
                    yield pid, one.start, one.end


def _is_mapping_of(pid: int, one: Mapping, status: os.stat_result) -> bool:
    """Whether it maps this file, though maps has another device for it: so with btrfs and overlayfs, as stat(2) has.

    Or another node of this character device.
    """
    with suppress(OSError):
        found = os.stat(f"/proc/{pid}/map_files/{one.addresses}")
        node = stat.S_ISCHR(found.st_mode) and stat.S_ISCHR(status.st_mode) and found.st_rdev == status.st_rdev
        return node or os.path.samestat(found, status)
    return False


def lock_holder(path: str) -> Holder | None:
    """Who holds the lock of the region at ``path``; None when nobody does, or nobody that may be seen.

    From the lock lines of /proc/PID/fdinfo and not from /proc/locks, which names the process that took the lock: it may
    have handed it to a child since.  Descriptors are only looked at closer when such a line names the region's inode: a
    stat of any other may wait for a server that hangs.  Raises OSError for ``path``, NoProcError.
    """
    status = os.stat(path)
    for pid in pids():
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fdinfo") if pid != os.getpid() else ():
                with suppress(OSError), open(f"/proc/{pid}/fdinfo/{fd}", "rb") as info:
                    if status.st_ino in parse_locks(info.read()) and os.path.samestat(
                        os.stat(f"/proc/{pid}/fd/{fd}"), status
                    ):
                        return holder(pid)
    return None
