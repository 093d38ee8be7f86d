"""A worker as its keeper sees it: a process, and the socket to it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar, cast

from pkernfs.errors import PkernfsError
from pkernfs.server.messages import Checked, Failure, Forked, Instruction, Opened, Pulse, Ready, Up
from pkernfs.server.resources import GONE, POLL_AGAIN, ResourceError, asking, readable, refusal, reserve
from pkernfs.sockets import receive_fds

Answer = TypeVar("Answer", Up, Forked, Checked, Opened, Ready, Pulse)

PROTOCOL = 1  #: version of the messages between a keeper and its workers
MESSAGE_MAX = 1 << 16
FDS_MAX = 16
START: Final = 60.0  #: seconds that a worker may take to import everything
FORK: Final = 3.0  #: seconds that a worker may take to become two
MISSING: Final = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)  #: of a program that is not there
END: Final = 10.0  #: seconds that it may take to end when its socket is closed
SO_SNDBUFFORCE = 32  #: asm-generic/socket.h; the socket module has no name for it


class Readable(Protocol):
    """How to wait for a descriptor: resources.readable, or a keeper's way, which does other things meanwhile."""

    def __call__(self, fd: int, seconds: float | None = None, /) -> bool:
        """Whether it is readable, or at its end, within so many seconds."""


class WorkerGoneError(PkernfsError):
    """The worker has ended."""


class WorkerStuckError(WorkerGoneError):
    """The worker does not answer in time."""


class WorkerError(PkernfsError):
    """The worker could not do what a message wants; the text is the worker's."""


class RegionLostError(WorkerError):
    """The worker could not open the region, or has ended over it: another one will hardly fare better."""


def python_command(module: str, *arguments: str) -> list[str]:
    """A module of this installation as a program.

    -P: not one of the directory that it happens to be started in.  -I, where this process has it (mount_helpers/install
    sees to that): nothing of whoever started the mount either, $PYTHONPATH for one.  utf8: names are the same bytes to
    every process, whatever the locale of the one that started it.
    """
    return [sys.executable, "-I" if sys.flags.isolated else "-P", "-X", "utf8", "-m", module, *arguments]


def worker_command() -> list[str]:
    """The program of a worker of this installation; $PKERNFS_WORKER names another one (tests let it fail)."""
    return shlex.split(os.environ.get("PKERNFS_WORKER", "")) or python_command("pkernfs.server.worker")


def send(connection: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    """One message of messages.py, with descriptors."""
    socket.send_fds(connection, [json.dumps(message).encode()], list(fds))


def receive(connection: socket.socket, *, wait: bool = True) -> tuple[Any, list[int]]:
    """The next message of messages.py, with its descriptors; None at the end.  Raises OSError."""
    data, fds = receive_fds(connection, MESSAGE_MAX, FDS_MAX, wait=wait)
    return json.loads(data) if data else None, fds


class Process:
    """What Child uses of Popen, of a process of ours that another one has made (sibling.py)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self) -> int:
        """Its exit code, as Popen has it."""
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:
                self.returncode = 255  # its maker had another parent than us
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it was waited for."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Child:
    """A worker process: it imports everything, sends {"up": ...} and waits.

    Signals go through a pidfd: the process id of one that has ended may be another's by then, and a keeper that was
    handed the mount is not its parent.

    ``command``: its program; or ``template``: a worker that is up, from which it is forked; or, of one that another
    keeper has started, ``connection`` and ``pid``.  ``prints``: where its maker prints; else nowhere, as its maker from
    then on.  ``readable``: how its answers are waited for.  Raises ResourceError
    when the host refuses a process, PkernfsError of the template.
    """

    def __init__(
        self,
        command: Sequence[str] = (),
        *,
        template: Child | None = None,
        prints: bool = False,
        connection: socket.socket | None = None,
        pid: int = 0,
        readable: Readable = readable,
    ) -> None:
        self.facts: Up | None = None  #: what it said of itself; None: nothing yet
        self.told = False  #: whether it was told something: it is as good as new otherwise
        self.command: Sequence[str] = template.command if template is not None else command
        self.started = time.monotonic()
        self.readable = readable  #: how its answers are waited for
        self._process: subprocess.Popen[bytes] | Process | None = None
        self._pidfd = -1
        self._ended = False
        if connection is not None:
            self.socket, self.pid = connection, pid
        else:
            try:
                with asking("a process for a worker"):
                    self.socket, self._process = reserve().ask(lambda: self._start(template, prints))
            except ResourceError as error:
                if error.errno in MISSING:
                    error.hint = "install pkernfs there again, or pkernfs upgrade MOUNT from where it is"
                raise
            self.pid = self._process.pid
        self._open_pidfd()

    def _start(self, template: Child | None, prints: bool) -> tuple[socket.socket, subprocess.Popen[bytes] | Process]:
        """Start the program, or let the template fork.  Raises what resources.REFUSALS has, PkernfsError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                if template is not None:
                    template.send({"verb": "fork", "prints": prints}, [theirs.fileno()])
                    return ours, Process(template.receive(Forked, FORK)["forked"])
                return ours, subprocess.Popen(
                    [*self.command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/"
                )
            except BaseException:
                ours.close()
                raise

    def _open_pidfd(self) -> bool:
        """Have a pidfd, which another call may get where one is refused now; False: there is none."""
        if self._pidfd < 0 and not self._ended:
            try:
                self._pidfd = reserve().ask(lambda: os.pidfd_open(self.pid))
            except ProcessLookupError:
                self._ended = True  # from now on its id may be another's
            except OSError:
                pass
        return self._pidfd >= 0

    def send(self, message: Instruction, fds: Sequence[int] = ()) -> None:
        """Tell it something.  Raises WorkerGoneError, and ResourceError: it is there, and was not told."""
        try:
            send(self.socket, message, fds)
        except OSError as error:
            if error.errno in GONE:
                raise WorkerGoneError(f"worker {self.pid} has ended") from None
            raise refusal(f"a message to worker {self.pid}", error) from None
        self.told = self.told or message["verb"] != "beat"

    def receive(self, answer: type[Answer], timeout: float) -> Answer:  # noqa: ARG002  # says the type
        """Its next message, an ``answer``.

        Raises WorkerStuckError when none comes within ``timeout`` seconds, WorkerGoneError, WorkerError for a Failure,
        and ResourceError: it is there, and can be asked again.
        """
        stuck = WorkerStuckError(f"worker {self.pid} does not answer within {timeout:g} s")
        if timeout and not self.readable(self.socket.fileno(), timeout):
            raise stuck
        try:
            message, _ = receive(self.socket, wait=False)
        except BlockingIOError:
            raise stuck from None
        except (OSError, MemoryError) as error:
            if not isinstance(error, OSError) or error.errno not in GONE:
                time.sleep(POLL_AGAIN)  # it is still there to be read: whoever polls for it would do nothing else
                raise refusal(f"a message of worker {self.pid}", error) from None
            message = None
        if message is None:
            raise WorkerGoneError(f"worker {self.pid} has ended")
        if "error" in message:
            failure = cast(Failure, message)
            error_ = WorkerError(failure["error"])
            error_.exit_code = failure["exit_code"]
            error_.errno = failure.get("errno", error_.errno)
            raise error_
        return cast(Answer, message)

    def wait_until_up(self, timeout: float) -> Up:
        """Wait until it has imported everything; what it says of itself.  Raises as ``receive``."""
        if self.facts is None:
            try:
                self.facts = facts = self.receive(Up, timeout)
            except WorkerStuckError:
                raise
            except WorkerGoneError:
                how = self.wait()
                raise WorkerGoneError(f"the worker has ended with {how} before it was up", hint=self._hint()) from None
            if (found := facts.get("protocol")) != PROTOCOL:
                raise WorkerError(
                    f"worker {self.pid}: expected protocol {PROTOCOL} of its keeper, found {found}",
                    hint="pkernfs upgrade --keeper first",
                )
        return self.facts

    def _hint(self) -> str:
        """What tells somebody why it could not start, and what helps."""
        tried = shlex.join(self.command) or "pkernfs --version"
        return f"`{tried}` says why; pkernfs upgrade MOUNT lets another installation serve"

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self._open_pidfd():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
        elif self._process is not None:
            self._process.send_signal(number)  # which does nothing once it was waited for

    def kill(self) -> None:
        """End it at once, and wait for that."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> str:
        """Wait for its end, which is near; how it ended.  It is killed when it does not come."""
        if self._open_pidfd() and not readable(self._pidfd, END):
            self.signal(signal.SIGKILL)
        how = "a status that another keeper would know"
        if self._process is not None:
            code = self._process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if self._pidfd >= 0:
            readable(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._ended = True
        self.socket.close()
        return how


def request_socket() -> tuple[socket.socket, socket.socket, int]:
    """(ours, theirs, bytes): a pair of sockets that stands in for /dev/fuse, and the largest message that fits.

    Raises ResourceError.
    """
    with asking("a socket for requests"):
        ours, theirs = reserve().ask(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    wanted = 1 << 22
    for one in (ours, theirs):
        try:
            one.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, wanted)
        except OSError:  # others than root; or there is no memory, and a smaller one does, too
            with suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
    # The kernel doubles what it is given, and keeps a part for itself (socket(7)).  SEQPACKET, as /dev/fuse has it: a
    # read gives one message.
    return ours, theirs, ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 3
