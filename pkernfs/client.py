"""The client of a mount's control sockets: one JSON object a line each way.

    control("/mnt/pkernfs", "info")                       -> facts of the region
    control("/mnt/pkernfs/guest-ram", "file")             -> facts of the file's memory
    ask_keeper("/mnt/pkernfs", "status")                  -> facts of the mount, whatever its worker does

The worker's socket is found from the mount itself: the read-only attribute user.pkernfs.control of its root directory.
The keeper's has a name that is known without asking the mount.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from pkernfs.errors import PkernfsError, UsageError
from pkernfs.mountinfo import FSTYPE, Mount, mounts
from pkernfs.sockets import find

#: Seconds in which another server takes the place of one that is gone.
PATIENCE = 5.0


class ControlError(PkernfsError):
    """The server refused, or does not answer."""


def mount_of(path: str) -> Mount | None:
    """The pkernfs mount that ``path`` is in, or None."""
    real = os.path.realpath(path)
    found: Mount | None = None
    for mount in mounts():
        inside = real == mount.mountpoint or real.startswith(mount.mountpoint.rstrip("/") + "/")
        # Of several mounts above the path the longest counts, of equal ones the last.
        if inside and (found is None or len(mount.mountpoint) >= len(found.mountpoint)):
            found = mount
    return found if found is not None and found.fstype == FSTYPE else None


def control(path: str, verb: str, timeout: float | None = 60.0, **arguments: Any) -> dict[str, Any]:
    """Ask the server of the mount that ``path`` is in; ``path`` itself goes along as an inode number, unless "ino" is
    among the arguments.

    Raises UsageError when ``path`` is not in a pkernfs mount, ControlError when the server refuses or is gone.
    """
    mount = _mount_of(path)
    try:
        request = {"verb": verb, "ino": os.lstat(path).st_ino, **arguments}
        address = os.getxattr(mount.mountpoint, "user.pkernfs.control")
    except OSError as error:
        raise ControlError(f"{path}: cannot reach the server: {error.strerror or error}") from None
    return _ask(lambda: address, path, request, timeout)


def ask_keeper(path: str, verb: str, timeout: float | None = 60.0, **arguments: Any) -> dict[str, Any]:
    """Ask the keeper of the mount that ``path`` is in.  Raises UsageError, ControlError."""
    return _ask(lambda: keeper_address(path), path, {"verb": verb, **arguments}, timeout)


def keeper_address(path: str) -> str:
    """The socket of the keeper of the mount that ``path`` is in.  Raises UsageError; FileNotFoundError: it has none."""
    mount = _mount_of(path)
    address = find(mount.device, mount.owner)
    if address is None:
        raise FileNotFoundError(errno.ENOENT, "it has no socket")
    return address


def _ask(
    address: Callable[[], str | bytes], path: str, request: dict[str, Any], timeout: float | None
) -> dict[str, Any]:
    """One request and its result; asked again when whoever had it is gone: what can be asked can be asked twice."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout)
                connection.connect(address())
                connection.sendall(json.dumps(request).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    line = lines.readline()
            if line:
                break
            error = "it closed the connection"
        except OSError as caught:
            error = caught.strerror or str(caught)
        if time.monotonic() > end:
            raise ControlError(f"{path}: cannot reach the server: {error}")
        time.sleep(0.05)
    reply = json.loads(line)
    if "error" in reply:
        refusal = ControlError(f"{path}: {reply['error']}")
        refusal.errno = reply.get("errno", refusal.errno)
        raise refusal
    result: dict[str, Any] = reply["result"]
    return result


def _mount_of(path: str) -> Mount:
    mount = mount_of(path)
    if mount is None:
        raise UsageError(f"{path}: expected a path in a pkernfs mount", hint="mount -t pkernfs REGION DIR makes one")
    return mount
