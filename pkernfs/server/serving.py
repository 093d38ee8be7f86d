"""Who serves a mount: the connection to the kernel, and the worker that has it, if there is one.

Nothing here waits for events or decides who is to serve next: that is the keeper's (keeper.py).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import PkernfsError
from pkernfs.mountinfo import mount_at
from pkernfs.server.child import (
    START,
    Child,
    Readable,
    RegionLostError,
    WorkerError,
    WorkerGoneError,
    WorkerStuckError,
    request_socket,
)
from pkernfs.server.device import Device, mount_device
from pkernfs.server.messages import Instruction, Opened, Pulse, Ready
from pkernfs.server.refusing import Refusing
from pkernfs.server.relay import Relay, RequestSocket
from pkernfs.server.resources import REFUSALS, Attempt, ResourceError, asking, backoff, reserve
from pkernfs.server.signals import EndWantedError
from pkernfs.server.state import FD_NAMES, Descriptors, State
from pkernfs.server.systemd import service
from pkernfs.server.umount import umount
from pkernfs.sockets import KEEPER, WORKER, listen, region_key, remove, remove_stale, runtime_dir

if TYPE_CHECKING:
    from pkernfs.server.commands import Command

log = logging.getLogger("pkernfs")

OPEN = 60.0  #: seconds that a worker may take to open the region
UMOUNT_TRIES = 4  #: of an umount that nobody waits for
HAND_OVER = 30.0  #: seconds that the next keeper may take


class Started(NamedTuple):
    """What the first worker reports of a mount that is usable."""

    replayed: int  #: records of the journal
    warning: str  #: or ""


class Serving:
    """``worker``: the one that serves, None while nobody does.  ``fds.device`` is negative before ``start``.

    ``readable``: how workers are waited for.
    """

    def __init__(self, state: State, fds: Descriptors, worker: Child | None, readable: Readable) -> None:
        self.state = state
        self.fds = fds
        self.worker = worker
        self.refusing = Refusing(fds.region, fds.references)
        self._service = service()
        self._state_file = -1
        self._readable = readable
        self.publishing = Attempt("state", "cannot be given to the next keeper")
        if fds.device >= 0:
            self._connect(Device(fds.device))

    def _connect(self, device: Device) -> None:
        self.device = device
        self._relay = Relay(device, self.state.device, self.state.init, self.state.options.hang, self._readable)

    # -- the first worker -----------------------------------------------------------------------------------------

    def start(self, worker: Child) -> Started:
        """Open, mount, let the first worker serve.  Raises PkernfsError, and nothing is left of the mount then."""
        state = self.state
        device: Device | None = None
        try:
            opened = self.open(worker, first=True)
            device = mount_device(state.region, state.mountpoint, state.options)
            mounted = mount_at(state.mountpoint)
            state.device = mounted.device if mounted else ""
            state.init = device.read()
            self._listen(device)
            self._connect(device)
            self._hand_over(worker, request_socket(), takeover=False)
            ready = worker.receive(Ready, OPEN)
            self._note(worker)
            return Started(opened["opened"], ready["warning"])
        except BaseException:
            worker.kill()
            if device is not None:
                self.umount_lazily()
            self.remove_sockets()
            raise

    def _listen(self, device: Device) -> None:
        state = self.state
        folder = runtime_dir()
        remove_stale(folder)
        key = region_key(os.fstat(self.fds.region))
        name = os.path.join(folder, f"{state.device}-{key}-{os.urandom(4).hex()}")
        state.control_path, state.commands_path = name + WORKER, name + KEEPER
        control, commands = listen(state.control_path), listen(state.commands_path)
        self.fds = self.fds._replace(control=control.detach(), commands=commands.detach(), device=device.fd)

    # -- workers --------------------------------------------------------------------------------------------------

    def open(self, worker: Child, *, first: bool) -> Opened:
        """Let a worker open the region.  Raises RegionLostError, WorkerGoneError, ResourceError."""
        worker.wait_until_up(START)
        message = Instruction(verb="open", state=self.state.to_json(), first=first)
        worker.send(message, [self.fds.region, self.fds.references, self.fds.stats])
        try:
            return worker.receive(Opened, OPEN)
        except WorkerStuckError:
            raise
        except WorkerGoneError:
            why = f"worker {worker.pid} ended with {worker.wait()} while it opened the region"
            raise RegionLostError(why) from None
        except WorkerError as error:
            lost = RegionLostError(error.text)
            lost.exit_code, lost.errno = error.exit_code, error.errno
            raise lost from None

    def let_serve(self, worker: Child, begin: float) -> float:
        """Open and hand over, nobody serves since ``begin``; for how long that was so, in seconds.

        Raises PkernfsError, OSError; ConnectionAbortedError when the mount has ended.
        """
        state = self.state
        worker.wait_until_up(START)
        # Before the worker is told anything: when it is refused, the worker is as good as it was.
        sockets = request_socket()
        try:
            self.open(worker, first=False)
            self._hand_over(worker, sockets, takeover=True)
        finally:
            for one in sockets[:2]:
                one.close()
        stall = time.monotonic() - begin
        state.takeovers += 1
        state.last_takeover = time.time()
        state.longest_stall = max(state.longest_stall, stall)
        self._note(worker)
        return stall

    def _hand_over(self, worker: Child, sockets: RequestSocket, *, takeover: bool) -> None:
        message = Instruction(verb="serve", state=self.state.to_json(), revive=not self._service)
        self._relay.hand_over(worker, message, [self.fds.control, self.fds.commands], sockets, takeover=takeover)

    def _note(self, worker: Child) -> None:
        """It serves from now on."""
        state = self.state
        self.worker = worker
        state.worker, state.worker_since = worker.pid, time.time()
        state.version = worker.facts["version"] if worker.facts else ""
        self.publish_state()

    def drain(self) -> None:
        """End the worker, if one serves, when it has answered what it has read."""
        worker = self.worker
        if worker is None:
            return
        try:
            worker.send({"verb": "drain"})
            while True:
                worker.receive(Pulse, self.state.options.hang)
        except (WorkerGoneError, ResourceError, EndWantedError):  # what it has read and not answered comes again
            pass
        finally:
            worker.kill()
            self.worker = None

    def wait_for_end(self, worker: Child) -> str:
        """Wait for the end of the worker that serves, which is about to end; how it ended."""
        self.worker = None
        return worker.wait()

    def ask_to_end(self) -> None:
        """Let the worker write back what is dirty, and end."""
        if self.worker is not None:
            with suppress(WorkerGoneError, ResourceError):
                self.worker.send({"verb": "end"})

    # -- the state, for the next keeper -----------------------------------------------------------------------------

    def publish_state(self) -> None:
        """Give the state to those who start the next keeper: the worker, or systemd; again later where that fails."""
        if self.worker is None:
            return
        try:
            self.worker.send({"verb": "know", "state": self.state.to_json()})
            if self._service:
                with asking("systemd's store of descriptors"):
                    self._store(self.worker)
            self.publishing.succeeded()
        except WorkerGoneError:
            pass
        except ResourceError as error:
            self.publishing.refused(error)

    def ensure_published(self) -> None:
        """Publish what could not be published, when it is time."""
        if self.publishing.failures and self.publishing.due():
            self.publish_state()

    def _store(self, worker: Child) -> None:
        """Raises OSError."""
        file = self._state_file
        if file < 0:
            file = reserve().ask(lambda: os.memfd_create("pkernfs-state", os.MFD_CLOEXEC))
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(self.state.to_json()).encode(), 0)
        if self._state_file < 0:
            self._state_file = file
            self._service.store({"state": file, **dict(zip(FD_NAMES, self.fds, strict=True))})
        self._service.store({"worker": worker.socket.fileno()})

    def give_away(self, command: Command) -> bool:
        """Give everything to the keeper that sent a command; whether it has taken it.  Raises WorkerGoneError."""
        if self.worker is None:
            raise WorkerGoneError("no worker serves the mount", hint="try again")
        command.answer(self.state.to_json(), [*self.fds, self.worker.socket.fileno()])
        taken = b""
        try:
            if self._readable(command.connection.fileno(), HAND_OVER):
                taken = command.connection.recv(1)
        except OSError:
            pass
        finally:
            if not taken:  # it must not come later and find that there is another keeper
                with suppress(OSError):
                    command.connection.shutdown(socket.SHUT_RDWR)
            command.done.set()
        return bool(taken)

    # -- the end ----------------------------------------------------------------------------------------------------

    def has_ended(self) -> bool:
        """Whether the kernel has ended the mount."""
        return self.device.has_ended()

    def umount_lazily(self) -> None:
        """Take the mount out of the tree, whoever uses it; but not what others have mounted on it."""
        for failures in range(UMOUNT_TRIES):
            time.sleep(backoff(failures))
            try:
                reserve().ask(lambda: umount(self.state.device, self.state.region, lazy=True))
                break
            except PkernfsError as error:
                log.warning("%s: the mount is left there, and nobody serves it: %s", self.state.mountpoint, error)
                break
            except REFUSALS as error:
                log.error("%s: cannot unmount: %s", self.state.mountpoint, error)

    def remove_sockets(self) -> None:
        """Nobody finds the mount any more."""
        for path in (self.state.control_path, self.state.commands_path):
            if path:
                remove(path)
