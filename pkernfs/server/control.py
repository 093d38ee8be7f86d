"""The control socket: verbs as JSON objects, one a line each way, for the owner of the mount and root only."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from pkernfs.errors import FsError, PkernfsError, RegionError

log = logging.getLogger("pkernfs")

LINE_MAX = 1 << 16
CONNECTIONS = 32  #: more at once are refused
PATIENCE = 60.0  #: seconds that a client may take to send a line, or to take a reply
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def runtime_dir() -> str:
    """A directory of this user's own for sockets: /run/pkernfs, or below $XDG_RUNTIME_DIR or /tmp for others than root.

    Clients are told by the mount where the socket is: where another user has prepared the usual path, any other will
    do.  Raises RegionError.
    """
    uid = os.getuid()
    places = ["/run/pkernfs"] if uid == 0 else [f"/tmp/pkernfs-{uid}"]
    if uid and os.path.isabs(runtime := os.environ.get("XDG_RUNTIME_DIR", "")):
        places.insert(0, os.path.join(runtime, "pkernfs"))
    for path in places:
        with suppress(OSError):
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            if _is_safe(path, uid):
                return path
    try:
        return tempfile.mkdtemp(prefix=f"pkernfs-{uid}-", dir="/tmp")
    except OSError as error:
        raise RegionError(f"/tmp: cannot make a directory for the control socket: {error.strerror}") from None


def _is_safe(path: str, uid: int) -> bool:
    """Whether ``path`` is a directory that only this user may write, and that no other can move away."""
    status, above = os.lstat(path), os.stat(os.path.dirname(path))
    fixed = above.st_uid in (0, uid) and (not above.st_mode & 0o022 or bool(above.st_mode & stat.S_ISVTX))
    return fixed and stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022


def remove_stale(folder: str) -> None:
    """Remove the sockets of servers that were killed: nobody listens there."""
    for name in os.listdir(folder):
        if name.endswith(".sock"):
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.setblocking(False)
                if probe.connect_ex(os.path.join(folder, name)) == errno.ECONNREFUSED:
                    os.unlink(os.path.join(folder, name))


class ControlSocket:
    """Listens at ``path`` and answers with the functions in ``verbs``; each gets the request and gives the result."""

    def __init__(self, verbs: dict[str, Verb]) -> None:
        self.verbs = verbs
        self.connections = 0
        self.folder = runtime_dir()
        remove_stale(self.folder)
        self.path = os.path.join(self.folder, f"{os.getpid()}-{os.urandom(4).hex()}.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Its name only when it listens: until then remove_stale of another server would take it for a dead one's.
        unfinished = self.path.removesuffix(".sock")
        old_umask = os.umask(0o177)
        try:
            self.listener.bind(unfinished)
        finally:
            os.umask(old_umask)
        self.listener.listen(CONNECTIONS)
        os.rename(unfinished, self.path)

    async def serve(self) -> None:
        """Accept connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listener))
        await trio.serve_listeners(self._connection, [listener])

    def close(self) -> None:
        """Remove the socket."""
        self.listener.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        if os.path.basename(self.folder).startswith(f"pkernfs-{os.getuid()}-"):
            with suppress(OSError):
                os.rmdir(self.folder)

    async def _connection(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            async with stream:
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass
        except Exception:
            log.exception("a bug: a control connection failed")
        finally:
            self.connections -= 1

    async def _converse(self, stream: trio.SocketStream) -> None:
        """Answer line by line.  Raises TooSlowError, BrokenResourceError."""
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (0, os.getuid()):
            return await _send(stream, _error(FsError(errno.EPERM, f"user {uid} does not own this mount")))
        if self.connections > CONNECTIONS:
            return await _send(stream, _error(FsError(errno.EAGAIN, f"{CONNECTIONS} connections are open")))
        buffer = bytearray()
        while True:
            with trio.fail_after(PATIENCE):
                while (end := buffer.find(b"\n")) < 0:
                    if len(buffer) > LINE_MAX:
                        error = FsError(errno.E2BIG, f"a request of more than {LINE_MAX} bytes")
                        return await _send(stream, _error(error))
                    chunk = await stream.receive_some(LINE_MAX)
                    if not chunk:
                        return None
                    buffer += chunk
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            await _send(stream, await self.answer(line))

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


async def _send(stream: trio.SocketStream, reply: bytes) -> None:
    with trio.fail_after(PATIENCE):
        await stream.send_all(reply)


def _error(error: PkernfsError) -> bytes:
    return json.dumps({"error": str(error), "errno": error.errno}).encode() + b"\n"
