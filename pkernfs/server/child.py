"""A worker as its keeper sees it: a process, and the socket to it."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

from pkernfs.errors import PkernfsError
from pkernfs.server.messages import Checked, Failure, Instruction, Opened, Pulse, Ready, Up
from pkernfs.sockets import receive_fds

Answer = TypeVar("Answer", Up, Checked, Opened, Ready, Pulse)

PROTOCOL = 1  #: version of the messages between a keeper and its workers
MESSAGE_MAX = 1 << 16
FDS_MAX = 16
SO_SNDBUFFORCE = 32  #: asm-generic/socket.h; the socket module has no name for it


class WorkerGoneError(PkernfsError):
    """The worker has ended."""


class WorkerStuckError(WorkerGoneError):
    """The worker does not answer in time."""


class WorkerError(PkernfsError):
    """The worker could not do what a message wants; the text is the worker's."""


def python_command(module: str, *arguments: str) -> list[str]:
    """A module of this installation as a program; -P: not one of the directory that it happens to be started in."""
    return [sys.executable, "-P", "-m", module, *arguments]


def worker_command() -> list[str]:
    """The program of a worker of this installation; $PKERNFS_WORKER names another one (tests let it fail)."""
    return shlex.split(os.environ.get("PKERNFS_WORKER", "")) or python_command("pkernfs.server.worker")


def send(connection: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    """One message of messages.py, with descriptors."""
    socket.send_fds(connection, [json.dumps(message).encode()], list(fds))


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The next message of messages.py, with its descriptors; None at the end."""
    data, fds = receive_fds(connection, MESSAGE_MAX, FDS_MAX)
    return json.loads(data) if data else None, fds


class Child:
    """A worker process: it imports everything, sends {"up": ...} and waits.

    Signals go through a pidfd: the process id of one that has ended may be another's by then, and a keeper that was
    handed the mount is not its parent.

    ``command``: its program; or, of one that another keeper has started, ``connection`` and ``pid``.
    """

    def __init__(self, command: Sequence[str] = (), *, connection: socket.socket | None = None, pid: int = 0) -> None:
        self.facts: Up | None = None  #: what it said of itself; None: nothing yet
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        if connection is not None:
            self.socket, self.pid = connection, pid
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(pid)
            return
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/"
            )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)

    def send(self, message: Instruction, fds: Sequence[int] = ()) -> None:
        """Tell it something.  Raises WorkerGoneError."""
        try:
            send(self.socket, message, fds)
        except OSError:
            raise WorkerGoneError(f"worker {self.pid} has ended") from None

    def receive(self, answer: type[Answer], timeout: float | None = None) -> Answer:  # noqa: ARG002  # says the type
        """Its next message, an ``answer``.  Raises WorkerGoneError, WorkerError for a Failure."""
        if not select.select([self.socket], [], [], timeout)[0]:
            raise WorkerStuckError(f"worker {self.pid} does not answer within {timeout:g} s")
        try:
            message, _ = receive(self.socket)
        except OSError:
            message = None
        if message is None:
            raise WorkerGoneError(f"worker {self.pid} has ended")
        if "error" in message:
            failure = cast(Failure, message)
            error = WorkerError(failure["error"])
            error.exit_code = failure["exit_code"]
            error.errno = failure.get("errno", error.errno)
            raise error
        return cast(Answer, message)

    def wait_until_up(self, timeout: float) -> Up:
        """Wait until it has imported everything; what it says of itself.  Raises WorkerGoneError, WorkerError."""
        if self.facts is None:
            self.facts = facts = self.receive(Up, timeout)
            if (found := facts.get("protocol")) != PROTOCOL:
                raise WorkerError(
                    f"worker {self.pid}: expected protocol {PROTOCOL} of its keeper, found {found}",
                    hint="pkernfs upgrade --keeper first",
                )
        return self.facts

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """End it at once, and wait for that."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> str:
        """Wait for its end; how it ended."""
        how = "a status that another keeper would know"
        if self._process is not None:
            code = self._process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if self._pidfd >= 0:
            select.select([self._pidfd], [], [])
            os.close(self._pidfd)
            self._pidfd = -1
        self.socket.close()
        return how


def request_socket() -> tuple[socket.socket, socket.socket, int]:
    """(ours, theirs, bytes): a pair of sockets that stands in for /dev/fuse, and the largest message that fits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wanted = 1 << 22
    for one in (ours, theirs):
        try:
            one.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, wanted)
        except PermissionError:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
    # The kernel doubles what it is given, and keeps a part for itself (socket(7)).  SEQPACKET, as /dev/fuse has it: a
    # read gives one message.
    return ours, theirs, ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 3
