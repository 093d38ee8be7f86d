"""The worker's control socket, served by trio beside FUSE's requests."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from pkernfs.api import PATIENCE, Request, Server, WorkerRequest
from pkernfs.codec import encode_error, encode_result
from pkernfs.errors import FsError, PkernfsError
from pkernfs.format import Ino
from pkernfs.server.conversation import CHUNK, Conversation
from pkernfs.server.resources import Attempt, backoff, refusal, reserve

log = logging.getLogger("pkernfs")

Handler = Callable[[Any], Awaitable[object]]  #: from a request to its result


def inode_of(request: WorkerRequest[Any]) -> Ino:
    """The inode that a request is about.  Raises FsError(EINVAL) when it names none."""
    if not request.ino:
        raise FsError(errno.EINVAL, '"ino": expected an inode number, found 0')
    return Ino(request.ino)


class ControlSocket:
    """Answers on ``listener`` with ``handlers``: one for each class of requests to the worker."""

    def __init__(self, listener: socket.socket, handlers: Mapping[type[Request[Any]], Handler]) -> None:
        self.handlers = handlers
        self.connections = 0
        self.listener = listener

    async def serve(self) -> None:
        """Accept connections until cancelled."""
        attempt = Attempt("control socket", "cannot be answered")
        self.listener.setblocking(False)
        with self.listener:
            async with trio.open_nursery() as nursery:
                await self._accept(nursery, attempt)

    async def _accept(self, nursery: trio.Nursery, attempt: Attempt) -> None:
        while True:
            # Not trio.serve_listeners: where there is no descriptor it logs a traceback ten times a second, and of
            # other errors the worker would end.
            try:
                await trio.lowlevel.wait_readable(self.listener)
                connection, _ = reserve().ask(self.listener.accept)
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
            except BlockingIOError:
                continue
            except (OSError, MemoryError) as error:
                attempt.refused(refusal("a connection", error))
                await trio.sleep(backoff(attempt.failures))
            else:
                attempt.succeeded()
                nursery.start_soon(self._connection, stream)

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
        conversation = Conversation(stream.socket, Server.WORKER, self.connections)
        while not conversation.over:
            with trio.fail_after(PATIENCE):
                while (request := conversation.next()) is None:
                    chunk = await stream.receive_some(CHUNK)
                    if not chunk:
                        return
                    conversation.feed(chunk)
            reply = await self.answer(request)
            with trio.fail_after(PATIENCE):
                await stream.send_all(reply)

    async def answer(self, request: Request[Any] | PkernfsError) -> bytes:
        """The reply to one request; never raises."""
        if isinstance(request, PkernfsError):
            return encode_error(request)
        try:
            return encode_result(await self.handlers[type(request)](request))
        except Exception as error:
            return encode_error(error, request)
