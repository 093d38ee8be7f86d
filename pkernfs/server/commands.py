"""The keeper's control socket, served by threads: what can be asked of a mount whatever its worker does.

What only tells is answered while the keeper waits for something; what changes something is a Command that waits for
the keeper.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pkernfs.api import PATIENCE, GetStatus, Request, Server, Status
from pkernfs.codec import encode_error, encode_result
from pkernfs.errors import PkernfsError
from pkernfs.server.conversation import CHUNK, Conversation

log = logging.getLogger("pkernfs")


class Command:
    """Something that the keeper is to do; whoever sent it waits for an answer."""

    def __init__(self, request: Request[Any], connection: socket.socket) -> None:
        self.request = request
        self.connection = connection
        self.done = threading.Event()

    def answer(self, result: object, fds: Sequence[int] = ()) -> None:
        """Tell the client that it is done.  With descriptors it is not over then: whoever sends them sets ``done``."""
        self._send(encode_result(result), fds)

    def refuse(self, error: PkernfsError) -> None:
        """Tell the client that it is not done."""
        self._send(encode_error(error), ())

    def _send(self, reply: bytes, fds: Sequence[int]) -> None:
        with suppress(OSError):
            if fds:
                socket.send_fds(self.connection, [reply], list(fds))
            else:
                self.connection.sendall(reply)
        if not fds:
            self.done.set()


class Commands:
    """Listens on ``listener``.  ``status`` gives the facts of the mount, ``wake`` is called for each new command."""

    def __init__(self, listener: socket.socket, status: Callable[[], Status], wake: Callable[[], None]) -> None:
        self.listener = listener
        self.status = status
        self.wake = wake
        self.waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.connections = 0
        self._lock = threading.Lock()  #: of connections
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> Command | None:
        """The next command, if there is one."""
        with suppress(queue.Empty):
            return self.waiting.get_nowait()
        return None

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # shut down
                return self.listener.close()
            threading.Thread(target=self._connection, args=[connection], daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        with self._lock:
            self.connections += 1
        try:
            with connection:
                self._converse(connection)
        except OSError:  # the client is gone, or too slow
            pass
        except Exception:
            log.exception("a bug: a control connection failed")
        finally:
            with self._lock:
                self.connections -= 1

    def _converse(self, connection: socket.socket) -> None:
        """Answer line by line.  Raises OSError."""
        conversation = Conversation(connection, Server.KEEPER, self.connections)
        while not conversation.over:
            end = time.monotonic() + PATIENCE
            while (request := conversation.next()) is None:
                connection.settimeout(max(end - time.monotonic(), 0.001))
                chunk = connection.recv(CHUNK)
                if not chunk:
                    return
                conversation.feed(chunk)
            connection.settimeout(PATIENCE)
            self._answer(request, connection)

    def _answer(self, request: Request[Any] | PkernfsError, connection: socket.socket) -> None:
        """Reply to one request.  Raises OSError."""
        if isinstance(request, PkernfsError):
            connection.sendall(encode_error(request))
        elif isinstance(request, GetStatus):
            try:
                reply = encode_result(self.status())
            except Exception as error:
                reply = encode_error(error, request)
            connection.sendall(reply)
        else:
            command = Command(request, connection)
            self.waiting.put(command)
            self.wake()
            command.done.wait()
