"""What is mounted where: /proc/self/mountinfo, as proc_pid_mountinfo(5) describes it.

As in processes.py: bytes, split where the kernel puts a byte to split at.  Any container can make a mount whose source
is empty, or holds what only looks like the text around it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pkernfs.processes import Holder, NoProcError, holder, is_server, pids

FSTYPE = "fuse.pkernfs"
NAMED = 100  #: processes of a mount namespace that are looked at, to name one


class Mount(NamedTuple):
    """One line of mountinfo.  ``device`` is MAJOR:MINOR; names are unescaped; ``owner`` is FUSE's user_id, else 0."""

    device: str
    mountpoint: str
    fstype: str
    source: str
    owner: int = 0
    id: int = 0  #: of the mount, as long as it lives
    parent: int = 0  #: id of the mount that it is on
    root: str = "/"  #: the directory of the filesystem that is mounted


def unescape(field: bytes) -> str:
    """Undo the octal escapes of mountinfo, as of a space: a backslash and 040."""
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda code: bytes([int(code[1], 8)]), field))


def parse(text: bytes) -> Iterator[Mount]:
    """The lines of a mountinfo; what is no such line is skipped.

    fs/proc_namespace.c, show_mountinfo: fields with one space between them, which is escaped within them; the number
    of optional ones is any, so " - " ends them; type and source, which may both be empty, and options.
    """
    for line in text.split(b"\n"):
        before, _, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ", 2)
        if len(fields) < 6 or len(rest) < 3 or not re.fullmatch(rb"\d+ \d+ \d+:\d+", b" ".join(fields[:3])):
            continue
        fstype, source, options = rest
        owner = re.search(rb"(?:^|,)user_id=(\d{1,10})(?:,|$)", options) if fstype.startswith(b"fuse") else None
        yield Mount(
            device=fields[2].decode(),
            mountpoint=unescape(fields[4]),
            fstype=unescape(fstype),
            source=unescape(source),
            owner=int(owner[1]) if owner else 0,
            id=int(fields[0]),
            parent=int(fields[1]),
            root=unescape(fields[3]),
        )


def mounts() -> list[Mount]:
    """All mounts that this process sees, in the order in which they were made.  Raises NoProcError."""
    try:
        return _read("self")
    except FileNotFoundError:
        raise NoProcError from None


def _read(pid: int | str) -> list[Mount]:
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return list(parse(file.read()))


def mounts_of(device: str) -> list[Mount]:
    """The mounts of the pkernfs with this number: where it was mounted, and whatever was bound or moved since.

    Its superblock has the number as long as its connection lives; a path is somebody else's a moment later.  Raises
    NoProcError, OSError.
    """
    return [mount for mount in mounts() if mount.fstype == FSTYPE and mount.device == device]


def mount_of(path: str) -> Mount | None:
    """The mount, of whatever type, that ``path`` is in; None when there is no such path.  Raises NoProcError."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        number = mount_id(fd)  # nobody else gets it while the descriptor is open
        return next((mount for mount in mounts() if mount.id == number), None)
    finally:
        os.close(fd)


def mount_id(fd: int) -> int:
    """The id of the mount that a descriptor, which may be one of O_PATH, is in.  Raises NoProcError.

    From fdinfo (Linux 3.15), as statx(2) knows it from 5.8 only.
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            found = re.search(rb"^mnt_id:\t([0-9]+)$", file.read(), re.MULTILINE)
    except FileNotFoundError:
        raise NoProcError from None
    return int(found[1]) if found else -1


def reach(mount: Mount) -> int:
    """A descriptor (O_PATH) of the root of a mount, by its mountpoint, where no other mount hides it.

    Raises OSError, NoProcError.
    """
    fd = os.open(mount.mountpoint, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if mount_id(fd) != mount.id:
            raise FileNotFoundError(errno.ENOENT, "another mount hides it")
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def reached(device: str) -> Iterator[str]:
    """A path of the pkernfs with this number, wherever it is mounted now.

    Raises FileNotFoundError when all are hidden, or in other mount namespaces, NoProcError.
    """
    for mount in mounts_of(device):
        with suppress(OSError):
            fd = reach(mount)
            break
    else:
        raise FileNotFoundError(errno.ENOENT, "it shows nowhere")
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def elsewhere(device: str) -> list[Holder]:
    """A process of each other mount namespace in which the pkernfs with this number is mounted.

    Of its processes, one that has a guest, or else one that does not serve mounts; those with a guest first.  Raises
    NoProcError, OSError.
    """
    ours = ""
    with suppress(OSError):
        ours = os.readlink("/proc/self/ns/mnt")
    found: dict[str, list[int]] = {ours: []}
    has_it: dict[str, bool] = {ours: False}
    for pid in pids():
        with suppress(OSError):  # it has ended, or we may not look
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in has_it:  # one reading of each
                has_it[namespace] = any(one.device == device and one.fstype == FSTYPE for one in _read(pid))
            if has_it[namespace]:
                found.setdefault(namespace, []).append(pid)
    holders = [[holder(pid) for pid in sorted(one)[:NAMED]] for one in found.values() if one]
    named = [min(one, key=lambda each: (not each.guest, is_server(each.pid))) for one in holders]
    return sorted(named, key=lambda one: (not one.guest, one.pid))  # services that systemd isolates have it, too


def mount_at(mountpoint: str) -> Mount | None:
    """The topmost mount at the real path ``mountpoint``, of whatever type.  Raises NoProcError."""
    found = mount_of(mountpoint)
    return found if found is not None and found.mountpoint == mountpoint else None
