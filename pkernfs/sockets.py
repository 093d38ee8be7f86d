"""Where the sockets of mounts are: below one directory per user, named by the mount and by the region.

0:45-1a.4d2-0f1e2d3c.worker.sock   verbs about the region and its files, answered by the worker
0:45-1a.4d2-0f1e2d3c.keeper.sock   verbs about the mount, answered by its keeper

The mount's number (MAJOR:MINOR); device and inode number of the region's file, or the number of its device; something
random.  Not by paths: the mount may be moved, or be in another mount namespace, and the region be renamed.
"""

from __future__ import annotations

import errno
import glob
import os
import socket
import stat
import struct
import tempfile
from contextlib import suppress
from typing import Protocol

from pkernfs.errors import FsError, RegionError

#: More at once are refused: each holds a descriptor, and a program that opens and never asks is not to take them all.
CONNECTIONS = 32
FD = struct.Struct("i")  #: a descriptor in an SCM_RIGHTS message
KEEPER, WORKER = ".keeper.sock", ".worker.sock"


class Peer(Protocol):
    """A socket, of the standard library or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """As socket.socket has it."""


def check_owner(connection: Peer) -> int:
    """Whose the other end is.  Raises FsError(EPERM) when it is neither root's nor this process's user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in (0, os.getuid()):
        raise FsError(errno.EPERM, f"user {uid} does not own this mount")
    return int(uid)


def receive_fds(connection: socket.socket, size: int, most: int, *, wait: bool = True) -> tuple[bytes, list[int]]:
    """Up to ``size`` bytes, and up to ``most`` descriptors that came along; no program that is run inherits those.

    Raises OSError; EMFILE when this process may not have as many: the kernel leaves out what does not fit (unix(7)).
    """
    # Not socket.recv_fds: it says nothing of what was left out.
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    data, ancillary, found, _ = connection.recvmsg(size, socket.CMSG_LEN(most * FD.size), flags)
    fds = [
        fd
        for level, kind, raw in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in FD.iter_unpack(raw[: len(raw) - len(raw) % FD.size])
    ]
    if found & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, "descriptors that came through a socket did not fit")
    return data, fds


def _places(uid: int) -> list[str]:
    """Where the directory of a user may be, the usual place first."""
    if uid == 0:
        return ["/run/pkernfs"]
    places = [f"/tmp/pkernfs-{uid}"]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "") if uid == os.getuid() else f"/run/user/{uid}"
    if os.path.isabs(runtime):
        places.insert(0, os.path.join(runtime, "pkernfs"))
    return places


def runtime_dir() -> str:
    """A directory of this user's own for sockets: /run/pkernfs, or below $XDG_RUNTIME_DIR or /tmp for others than root.

    Where another user has prepared the usual path, any other will do.  Raises RegionError.
    """
    uid = os.getuid()
    for path in _places(uid):
        with suppress(OSError):
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            if _is_safe(path, uid):
                return path
    try:
        return tempfile.mkdtemp(prefix=f"pkernfs-{uid}-", dir="/tmp")
    except OSError as error:
        raise RegionError(f"/tmp: cannot make a directory for the control socket: {error.strerror}") from None


def region_key(status: os.stat_result) -> str:
    """What the sockets of a region have in their names."""
    if stat.S_ISCHR(status.st_mode):
        return f"c{status.st_rdev:x}"
    return f"{status.st_dev:x}.{status.st_ino:x}"


def device_of(address: str) -> str:
    """The number of the mount, MAJOR:MINOR, in the name of a socket."""
    return os.path.basename(address).partition("-")[0]


def find(uid: int, *, device: str = "*", region: str = "") -> str | None:
    """The keeper's socket of a mount that is this user's, by its number or by the key of its region.

    The newest, if several have had it.
    """
    found = []
    pattern = f"{device}-{region}{'-' * bool(region)}*{KEEPER}"
    for folder in [*_places(uid), *glob.glob(f"/tmp/pkernfs-{uid}-*")]:
        with suppress(OSError):
            if _is_safe(folder, uid):
                found += glob.glob(f"{glob.escape(folder)}/{pattern}")
    ages = {}
    for path in found:
        with suppress(FileNotFoundError):
            ages[os.lstat(path).st_mtime_ns] = path
    return ages[max(ages)] if ages else None


def _is_safe(path: str, uid: int) -> bool:
    """Whether ``path`` is a directory that only this user may write, and that no other can move away."""
    status, parent = os.lstat(path), os.stat(os.path.dirname(path))
    fixed = parent.st_uid in (0, uid) and (not parent.st_mode & 0o022 or bool(parent.st_mode & stat.S_ISVTX))
    return fixed and stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022


def remove_stale(folder: str) -> None:
    """Remove the sockets of servers that were killed: nobody listens there."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".sock") and not is_alive(path):
            with suppress(OSError):
                os.unlink(path)


def is_alive(path: str) -> bool:
    """Whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def listen(path: str) -> socket.socket:
    """A listening socket that only this process's user may connect to.  Raises RegionError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Its name only when it listens: until then remove_stale of another server would take it for a dead one's.
    unfinished = path.removesuffix(".sock")
    old_umask = os.umask(0o177)
    try:
        listener.bind(unfinished)
        listener.listen(CONNECTIONS)
        os.rename(unfinished, path)
    except OSError as error:
        listener.close()
        raise RegionError(f"{path}: cannot make the control socket: {error.strerror}") from None
    finally:
        os.umask(old_umask)
    return listener


def remove(path: str) -> None:
    """Remove a socket of this process's, and the folder if it was made for it."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    folder = os.path.dirname(path)
    if os.path.basename(folder).startswith(f"pkernfs-{os.getuid()}-"):
        with suppress(OSError):
            os.rmdir(folder)
