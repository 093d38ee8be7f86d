"""Asking the servers of a mount: stable Python API.

    from pkernfs import api, client

    client.info("/mnt/pkernfs").space_free                      bytes that are free
    client.file("/mnt/pkernfs/guest-ram").extents               where a file is in memory
    client.status("/mnt/pkernfs").takeovers                     also while no worker serves
    client.ask("/mnt/pkernfs/iommu/dom-0", api.IommuAudit())    any request of pkernfs.api

A path is any path in the mount, or the region, in whichever mount namespace it is mounted.  Replies are classes of
pkernfs.api.  examples/api.md has more; pkernfs.vfio is for programs that know VFIO.

Raises UsageError for a path that is neither, and ControlError, which has an ``errno``, when the server refuses or is
gone.  A server that is replaced meanwhile is no error: the question is asked again, and what changes something is done
once.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from pkernfs import mountinfo
from pkernfs.errors import PkernfsError, UsageError
from pkernfs.mountinfo import FSTYPE, Mount
from pkernfs.processes import NoProcError
from pkernfs.served import Served, served
from pkernfs.sockets import find

if TYPE_CHECKING:
    from pkernfs import api

__all__ = [
    "ControlError",
    "ask",
    "create_ram",
    "file",
    "hold",
    "info",
    "keeper_address",
    "mount_of",
    "others",
    "quota",
    "release",
    "set_direct",
    "status",
]

#: Seconds in which another server takes the place of one that is gone.  A takeover takes 10 ms, 300 ms without a
#: standby; when three tries fail it is 1.5 s.  Behind that a person wants to know.  What a request is known by
#: must be kept for longer (fs/replies.py).
TAKEOVER: Final = 5.0
ROOT: Final = 1  #: inode number of the root of every mount
CONTROL: Final = "user.pkernfs.control"  #: attribute of each file of a mount: the worker's socket
R = TypeVar("R")


class ControlError(PkernfsError):
    """The server refused, or does not answer; ``errno`` says why."""


def info(path: str) -> api.MountInfo:
    """The region of a mount."""
    from pkernfs import api

    return ask(path, api.Info())


def file(path: str) -> api.FileInfo:
    """The memory of a regular file, and the domains and processes that map it."""
    from pkernfs import api

    return ask(path, api.File())


def set_direct(path: str, on: bool = True) -> api.FileInfo:
    """Mark a file as one that is mapped directly from the region.

    Its memory stays where it is, and reads through the mount see what is stored there.  ControlError with EBUSY: a
    process has mapped it the other way.
    """
    from pkernfs import api

    return ask(path, api.Direct(on=on))


def create_ram(
    path: str,
    size: int,
    *,
    owner: int | None = None,
    group: int | None = None,
    mode: int = 0o600,
    fragmented: bool = False,
) -> api.FileInfo:
    """Make a guest's memory: a new file of ``size`` bytes, all of them allocated, in one piece but for ``fragmented``.

    It is the caller's but for ``owner`` and ``group``, and there as a whole, or not at all.
    """
    from pkernfs import api

    folder, name = os.path.split(path)
    request = api.CreateRam(
        name=name,
        size=size,
        owner=os.geteuid() if owner is None else owner,
        group=os.getegid() if group is None else group,
        mode=mode,
        fragmented=fragmented,
    )
    return ask(os.path.realpath(folder or "."), request)


def hold(path: str, reason: str) -> api.FileInfo:
    """Let nobody change a file, its attributes and its names, until ``release``.  For root."""
    from pkernfs import api

    return ask(path, api.Hold(reason=reason))


def release(path: str) -> api.FileInfo:
    """End what ``hold`` has begun; of a file that is not held nothing changes.  For root."""
    from pkernfs import api

    return ask(path, api.Release())


def others(path: str) -> api.Others:
    """Whose files the region holds beside those of a file's owner: whoever opens the region can change them."""
    from pkernfs import api

    return ask(path, api.GetOthers())


def quota(path: str, limit: int | None = None) -> api.QuotaUse:
    """The quota that counts for a directory, after setting it to ``limit`` bytes; 0 takes it away."""
    from pkernfs import api

    return ask(path, api.Quota(limit=limit))


def status(path: str, timeout: float | None = None) -> api.Status:
    """Who serves a mount, and how it has been doing.  ``timeout``: seconds, instead of the usual time."""
    from pkernfs import api

    return ask(path, api.GetStatus(), timeout)


def ask(path: str, request: api.Request[R], timeout: float | None = None) -> R:
    """One request and its result, from whichever server of the mount answers it.

    Where the request is about an inode and names none, it is about ``path``; where it needs a key and has none, it gets
    one.  ``timeout``: seconds to wait for the answer, instead of what the table of verbs says.
    """
    from msgspec.structs import replace

    from pkernfs import api, codec

    verb = api.VERBS[str(request.__struct_config__.tag)]
    place = _place_of(path, verb.server is api.Server.KEEPER)
    if isinstance(request, api.Change) and not request.key:
        request = replace(request, key=secrets.randbits(63) or 1)
    try:
        if isinstance(request, api.WorkerRequest) and not request.ino:
            request = replace(request, ino=os.lstat(path).st_ino if isinstance(place, Mount) else ROOT)
        worker = _worker_address(place) if verb.server is api.Server.WORKER else b""
    except OSError as error:
        raise _unreachable(path, error) from None
    line = codec.encode_request(request)
    end = time.monotonic() + TAKEOVER
    while True:
        try:
            reply = exchange(worker or keeper_address(path), line, timeout or verb.patience)
            break
        except OSError as error:
            if time.monotonic() > end:
                raise _unreachable(path, error) from None
        time.sleep(0.05)
    try:
        return codec.decode_reply(reply, request)
    except codec.RefusedError as error:
        refusal = ControlError(f"{path}: {error.text}", hint=error.hint)
        refusal.errno = error.errno
        raise refusal from None


def exchange(address: str | bytes, line: bytes, timeout: float | None) -> bytes:
    """Send a line and get one, whatever they mean.  Raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(address)
        connection.sendall(line)
        with connection.makefile("rb") as lines:
            reply = lines.readline()
    if not reply.endswith(b"\n"):
        raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
    return reply


def _unreachable(path: str, error: OSError) -> ControlError:
    unreachable = ControlError(f"{path}: cannot reach the server: {error.strerror or error}")
    unreachable.errno = error.errno or errno.EIO
    return unreachable


def keeper_address(path: str) -> str:
    """The socket of the keeper of the mount that ``path`` is in, or of the region that it is.

    Raises UsageError; FileNotFoundError: it has none.
    """
    place = _place_of(path, keeper=True)
    address = find(place.owner, device=place.device) if isinstance(place, Mount) else place.keeper
    if address is None:
        raise FileNotFoundError(errno.ENOENT, "it has no socket")
    return address


def device_of(path: str) -> str:
    """The number, MAJOR:MINOR, of the mount that ``path`` is in, or of the one of the region that it is; "": none."""
    place = _find(path, keeper=True)
    return place.device if place else ""


def _worker_address(place: Mount | Served) -> str | bytes:
    """The socket of the worker.  Raises OSError."""
    return os.getxattr(place.mountpoint, CONTROL) if isinstance(place, Mount) else place.worker


def mount_of(path: str) -> Mount | None:
    """The pkernfs mount that ``path`` is in, or None.  Raises NoProcError where /proc would be needed to know."""
    real = os.path.realpath(path)
    try:
        found = mountinfo.mount_of(real)
        while found is None and real != "/":  # nothing of that name, or nobody serves it
            real = os.path.dirname(real)
            found = mountinfo.mount_of(real)
    except NoProcError:
        if os.path.isdir(real) or _is_served(real):
            raise
        return None
    return found if found is not None and found.fstype == FSTYPE else None


def _is_served(path: str) -> bool:
    with suppress(OSError):
        return bool(os.getxattr(path, CONTROL))
    return False


def _find(path: str, keeper: bool) -> Mount | Served | None:
    """The mount that ``path`` is in, or who serves the region that it is.

    A region may be a file of a mount itself: then a ``keeper`` is asked about what it is, a worker about the file.
    """
    real, mount = os.path.realpath(path), mount_of(path)
    if mount is None or (keeper and real != mount.mountpoint):
        return served(real) or mount
    return mount


def _place_of(path: str, keeper: bool) -> Mount | Served:
    """The same.  Raises UsageError when it is neither."""
    place = _find(path, keeper)
    if place is None:
        raise UsageError(
            f"{path}: expected a path in a pkernfs mount, or a region that is mounted",
            hint="mount -t pkernfs REGION DIR mounts one",
        )
    return place
