"""Handing the connection to the kernel over to a worker: INIT, what was not answered, then the descriptor itself."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

from pkernfs.mountinfo import reached
from pkernfs.processes import NoProcError
from pkernfs.server.child import Child, Readable, WorkerGoneError, WorkerStuckError
from pkernfs.server.device import BUFFER, REPLY, REQUEST, RESENT, WITHOUT_REPLY, Device, Request, patched_init
from pkernfs.server.messages import Instruction
from pkernfs.server.resources import GONE, asking

log = logging.getLogger("pkernfs")

#: So many workers may end while the same request comes to them again.  More than one: the request need not be what they
#: died of.  Few: everybody waits meanwhile.
DEATHS = 3
#: Requests before the next one that are failed where the kernel cannot deliver again.  Nobody knows how many were read:
#: far more than max_background and all threads of a machine together.  An answer that no request waits for
#: costs one write(2) that fails.
LOST = 1 << 16
RequestSocket = tuple[socket.socket, socket.socket, int]  #: see request_socket
PROVOKED = 5.0  #: seconds that a request of our own may take to come


def _provoke(number: str) -> None:
    with suppress(OSError, NoProcError), reached(number) as path:
        os.statvfs(path)


def _send(worker: Child, ours: socket.socket, raw: bytes) -> bool:
    """Hand a request over; False when it is too large.  Raises WorkerGoneError."""
    try:
        ours.send(raw)
    except OSError as error:
        if error.errno in GONE:
            raise WorkerGoneError(f"worker {worker.pid} has ended") from None
        if error.errno != errno.EMSGSIZE:
            raise
        return False
    return True


def fail_before(device: Device, unique: int) -> None:
    """Answer what may have been lost with EIO: the kernel cannot deliver it again."""
    for lost in range(max(unique - 2 * LOST, 2), unique, 2):
        device.fail(lost, errno.EIO)


class Relay:
    """Stands between the kernel and each new worker, until that one has answered what the one before did not.

    Why not the descriptor itself from the beginning: pyfuse3 must see an INIT, which the kernel sends once in the life
    of a mount; and only here it is known which request a worker has died of.  Why not always: a hop through a socket
    costs two wake-ups for each request.
    """

    def __init__(self, device: Device, number: str, init: bytes, patience: float, readable: Readable) -> None:
        self.device = device
        self.number = number  #: MAJOR:MINOR of the mount
        self.init = init
        self.patience = patience  #: seconds that a worker may take for a request
        self.readable = readable  #: how replies are waited for
        self.deaths: dict[int, int] = {}  #: workers that ended with a request, by its unique number

    def hand_over(
        self, worker: Child, message: Instruction, fds: Sequence[int], sockets: RequestSocket, *, takeover: bool
    ) -> None:
        """Let an opened worker serve.

        It gets ``message``, a "serve", with the descriptors of the device, of what stands in for that, and ``fds``.
        ``sockets``: from request_socket.  Raises WorkerGoneError, OSError; ConnectionAbortedError when the mount has
        ended.
        """
        ours, theirs, largest = sockets
        with ours:
            with theirs:
                worker.send(message, [self.device.fd, theirs.fileno(), *fds])
            _send(worker, ours, self.init)
            reply = self._reply(worker, ours)
            if takeover:
                self._resend(worker, ours)
            else:
                self.device.reply(patched_init(reply, largest))

    def _resend(self, worker: Child, ours: socket.socket) -> None:
        """Relay what was read and not answered, and the one request behind that.

        The one behind: the kernel puts what it delivers again before all others, so that nothing of it is left then.
        """
        device = self.device
        can_resend = device.resend()
        if not can_resend:
            # The number of any request tells which ones may be lost.
            with asking("a thread that provokes a request"):
                threading.Thread(target=_provoke, args=[self.number], daemon=True).start()
        while device.readable(0 if can_resend else PROVOKED):
            raw = device.read()
            request = REQUEST.unpack(raw)
            again = bool(request.unique & RESENT)
            if not can_resend:
                fail_before(device, request.unique)
                can_resend = True
            if again and self.deaths.get(request.unique, 0) >= DEATHS:
                log.error("%s has ended %d workers: it is answered with EIO", request, DEATHS + 1)
                del self.deaths[request.unique]
                device.fail(request.unique, errno.EIO)
                continue
            self._relay(worker, ours, raw, request)
            # What needs no reply (FORGET) can come before what comes again.
            if not again and request.opcode not in WITHOUT_REPLY:
                break
        self.deaths.clear()

    def _relay(self, worker: Child, ours: socket.socket, raw: bytes, request: Request) -> None:
        key = request.unique | RESENT
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if not _send(worker, ours, raw):
            log.error("%s does not fit through a socket: it is answered with EIO", request)
            self.device.fail(request.unique, errno.EIO)
            return
        if request.opcode not in WITHOUT_REPLY:
            self.device.reply(self._reply(worker, ours))
        del self.deaths[key]

    def _reply(self, worker: Child, ours: socket.socket) -> bytes:
        """The next reply; notifications go on to the kernel."""
        while True:
            if not self.readable(ours.fileno(), self.patience):
                raise WorkerStuckError(f"worker {worker.pid} does not answer within {self.patience:g} s")
            try:
                reply = ours.recv(BUFFER)
            except ConnectionResetError:
                reply = b""
            if not reply:
                raise WorkerGoneError(f"worker {worker.pid} has ended")
            if REPLY.unpack(reply).unique:
                return reply
            self.device.reply(reply)
