"""The client of a mount's control socket: one JSON object a line each way.

    control("/mnt/pkernfs", "info")                       -> facts of the region
    control("/mnt/pkernfs/guest-ram", "file")             -> facts of the file's memory

The socket is found from the mount itself: the read-only attribute user.pkernfs.control of its root directory.
"""

import json
import os
import socket
from typing import Any

from pkernfs.errors import PkernfsError, UsageError
from pkernfs.mounts import FSTYPE, Mount, mounts


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
    """Ask the server of the mount that ``path`` is in; ``path`` itself goes along as an inode number.

    Raises UsageError when ``path`` is not in a pkernfs mount, ControlError when the server refuses or is gone.
    """
    mount = mount_of(path)
    if mount is None:
        raise UsageError(f"{path}: expected a path in a pkernfs mount", hint="mount -t pkernfs REGION DIR makes one")
    request = {"verb": verb, **arguments}
    try:
        request["ino"] = os.lstat(path).st_ino
        address = os.getxattr(mount.mountpoint, "user.pkernfs.control")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                reply = json.loads(lines.readline() or b'{"error": "the server closed the connection"}')
    except OSError as error:
        raise ControlError(f"{path}: cannot reach the server: {error.strerror or error}") from None
    if "error" in reply:
        refusal = ControlError(f"{path}: {reply['error']}")
        refusal.errno = reply.get("errno", refusal.errno)
        raise refusal
    result: dict[str, Any] = reply["result"]
    return result
