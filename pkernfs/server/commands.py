"""The keeper's control socket, served by threads: what can be asked of a mount whatever its worker does.

What only tells is answered while the keeper waits for something; what changes something is a Command that waits for
the keeper.
"""

from __future__ import annotations

import _thread
import errno
import logging
import os
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
from pkernfs.server.resources import Attempt, ResourceError, asking, backoff, refusal, reserve

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
    """Listens on the socket ``fd``.  ``status`` gives the facts of the mount; ``wake`` is called for each command."""

    def __init__(
        self, fd: int, status: Callable[[], Status], wake: Callable[[], None], attempt: Attempt | None = None
    ) -> None:
        self.fd = fd
        self.status = status
        self.wake = wake
        self.waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.connections = 0
        self.attempt = attempt or Attempt("commands", "cannot be answered")
        self._lock = threading.Lock()  #: of connections
        self._listens = False
        self.ensure()

    def ensure(self) -> None:
        """Start the thread that listens, if it could not be started before."""
        if not self._listens and self.attempt.due():
            self._listens = self._start(self._listen)

    def next(self) -> Command | None:
        """The next command, if there is one."""
        with suppress(queue.Empty):
            return self.waiting.get_nowait()
        return None

    def _start(self, target: Callable[..., None], *arguments: Any) -> bool:
        """A thread for something; False: the host refuses one.

        Not threading.Thread: its start waits for ever for a thread that finds no memory for its first step.
        """
        try:
            with asking("a thread"):
                _thread.start_new_thread(target, arguments)
        except ResourceError as error:
            self.attempt.refused(error)
            return False
        return True

    def _listen(self) -> None:
        listener: socket.socket | None = None
        while True:
            try:
                if listener is None:
                    listener = socket.socket(fileno=reserve().ask(lambda: os.dup(self.fd)))
                connection, _ = reserve().ask(listener.accept)
            except OSError as error:  # nothing is lost: whoever wants to connect waits in the socket's queue
                if error.errno == errno.EINVAL:  # it was shut down
                    self._listens = False
                    return listener.close() if listener is not None else None
                self.attempt.refused(refusal("a connection", error))
                time.sleep(backoff(self.attempt.failures))
            else:
                if self._start(self._connection, connection):
                    self.attempt.succeeded()
                else:
                    self._connection(connection)

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
                reply = encode_result(reserve().ask(self.status))
            except Exception as error:
                reply = encode_error(error, request)
            connection.sendall(reply)
        else:
            command = Command(request, connection)
            self.waiting.put(command)
            self.wake()
            command.done.wait()
