"""The control socket: verbs as JSON objects, one a line each way, for the owner of the mount and root only."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from pkernfs.errors import FsError, PkernfsError, RegionError

log = logging.getLogger("pkernfs")

LINE_MAX = 1 << 16
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def runtime_dir() -> str:
    """A directory of this user's own for sockets: /run/pkernfs for root.  Raises RegionError."""
    uid = os.getuid()
    path = "/run/pkernfs" if uid == 0 else os.path.join(os.environ.get("XDG_RUNTIME_DIR", "/tmp"), f"pkernfs-{uid}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise RegionError(f"{path}: cannot make a directory for the control socket: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise RegionError(f"{path}: expected a directory that only user {uid} may write", hint="remove it")
    return path


class ControlSocket:
    """Listens at ``path`` and answers with the functions in ``verbs``; each gets the request and gives the result."""

    def __init__(self, verbs: dict[str, Verb]) -> None:
        self.verbs = verbs
        self.path = os.path.join(runtime_dir(), f"{os.getpid()}.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        if os.path.lexists(self.path):
            os.unlink(self.path)  # of a dead process that had our pid
        old_umask = os.umask(0o177)
        try:
            self.listener.bind(self.path)
        finally:
            os.umask(old_umask)
        self.listener.listen(16)

    async def serve(self) -> None:
        """Accept connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listener))
        await trio.serve_listeners(self._connection, [listener])

    def close(self) -> None:
        """Remove the socket."""
        self.listener.close()
        if os.path.lexists(self.path):
            os.unlink(self.path)

    async def _connection(self, stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        try:
            async with stream:
                if uid not in (0, os.getuid()):
                    await stream.send_all(_error(FsError(errno.EPERM, f"user {uid} does not own this mount")))
                    return
                buffer = b""
                async for chunk in stream:
                    buffer += chunk
                    while b"\n" in buffer:
                        line, _, buffer = buffer.partition(b"\n")
                        await stream.send_all(await self.answer(line))
                    if len(buffer) > LINE_MAX:
                        await stream.send_all(_error(FsError(errno.E2BIG, f"a request of more than {LINE_MAX} bytes")))
                        return
        except trio.BrokenResourceError:
            pass

    async def answer(self, line: bytes) -> bytes:
        """The reply to one request; never raises."""
        try:
            request = json.loads(line)
            verb = self.verbs.get(request["verb"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return _error(FsError(errno.EINVAL, 'expected a JSON object with "verb"'))
        if verb is None:
            return _error(FsError(errno.EOPNOTSUPP, f"verb {request['verb']!r}; known are {', '.join(self.verbs)}"))
        try:
            return json.dumps({"result": await verb(request)}).encode() + b"\n"
        except PkernfsError as error:
            return _error(error)
        except Exception as error:
            log.exception("a bug: control verb %r failed", request)
            return _error(FsError(errno.EIO, f"a bug in the server, see its log ({error!r})"))


def _error(error: PkernfsError) -> bytes:
    return json.dumps({"error": str(error), "errno": error.errno}).encode() + b"\n"
