"""The control socket: verbs as JSON objects, one a line each way, for the owner of the mount and root only."""

from __future__ import annotations

import errno
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from pkernfs.errors import FsError, PkernfsError
from pkernfs.sockets import CONNECTIONS, check_owner

log = logging.getLogger("pkernfs")

LINE_MAX = 1 << 16
PATIENCE = 60.0  #: seconds that a client may take to send a line, or to take a reply
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlSocket:
    """Answers on ``listener`` with the functions in ``verbs``; each gets the request and gives the result."""

    def __init__(self, listener: socket.socket, verbs: dict[str, Verb]) -> None:
        self.verbs = verbs
        self.connections = 0
        self.listener = listener

    async def serve(self) -> None:
        """Accept connections until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listener))
        await trio.serve_listeners(self._connection, [listener])

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
        try:
            check_owner(stream.socket)
        except FsError as refusal:
            return await _send(stream, _error(refusal))
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
