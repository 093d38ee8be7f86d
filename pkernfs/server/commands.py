"""The keeper's own control socket: what can be asked of a mount whatever its worker does.

The same lines as the worker's (control.py), one request a connection.  Threads answer: what only tells is answered
while the keeper waits for something; what changes something is a Command that waits for the keeper.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pkernfs.errors import PkernfsError
from pkernfs.sockets import CONNECTIONS, check_owner

log = logging.getLogger("pkernfs")

LINE_MAX = 1 << 16
PATIENCE = 10.0  #: seconds that a client may take to send its line


class Command:
    """Something that the keeper is to do.  ``verb`` is one of ORDERS; whoever gave it waits for an answer."""

    def __init__(self, request: dict[str, Any], connection: socket.socket) -> None:
        self.verb: str = request["verb"]
        self.request = request
        self.connection = connection
        self.done = threading.Event()

    def answer(self, result: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Tell the client that it is done."""
        self._send({"result": result}, fds)

    def refuse(self, error: PkernfsError) -> None:
        """Tell the client that it is not done."""
        self._send({"error": str(error), "errno": error.errno}, ())

    def _send(self, reply: dict[str, Any], fds: Sequence[int]) -> None:
        with suppress(OSError):
            socket.send_fds(self.connection, [json.dumps(reply).encode() + b"\n"], list(fds))
        if not fds:
            self.done.set()


class Commands:
    """Listens on ``listener``.  ``status`` gives the facts of the mount, ``wake`` is called for each new command."""

    VERBS = ("upgrade", "hand-over")

    def __init__(self, listener: socket.socket, status: Callable[[], dict[str, Any]], wake: Callable[[], None]) -> None:
        self.listener = listener
        self.status = status
        self.wake = wake
        self.waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.connections = threading.Semaphore(CONNECTIONS)
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> Command | None:
        """The next command, if there is one."""
        with suppress(queue.Empty):
            return self.waiting.get_nowait()
        return None

    def _listen(self) -> None:
        while True:
            self.connections.acquire()
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                self._converse(connection)
            except Exception:
                log.exception("a bug: a command failed")
            finally:
                self.connections.release()

    def _converse(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        command = Command({"verb": ""}, connection)
        try:
            check_owner(connection)
        except PkernfsError as error:
            return command.refuse(error)
        line = b""
        with suppress(OSError):
            while not line.endswith(b"\n") and len(line) < LINE_MAX and (chunk := connection.recv(LINE_MAX)):
                line += chunk
        try:
            command.request = json.loads(line)
            command.verb = command.request["verb"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return command.refuse(PkernfsError('expected a JSON object with "verb"'))
        if command.verb == "status":
            return command.answer(self.status())
        if command.verb not in self.VERBS:
            return command.refuse(PkernfsError(f"verb {command.verb!r}; known are status, {', '.join(self.VERBS)}"))
        self.waiting.put(command)
        self.wake()
        command.done.wait()
        return None
