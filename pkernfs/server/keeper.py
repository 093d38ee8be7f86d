"""The keeper of one mount: it holds /dev/fuse, and sees to it that somebody serves.

It mounts, reads the kernel's INIT and keeps it, and starts workers.  A worker gets INIT, and after a takeover what was
not answered, through a socket that stands in for /dev/fuse (relay.py), and goes on with the descriptor itself when that
socket ends.  A standby waits for the end of the worker.  The keeper never looks into the region: it only holds its
lock.  Its end is not the end of the mount (succession.py).
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.mountinfo import mount_at
from pkernfs.server.buffers import keep_resident
from pkernfs.server.child import Child, WorkerError, WorkerGoneError, WorkerStuckError
from pkernfs.server.commands import Command, Commands
from pkernfs.server.device import Device, mount_device
from pkernfs.server.exporter import Exporter
from pkernfs.server.heartbeat import BEAT, Heartbeat, end_stuck
from pkernfs.server.memory import dirty_bytes, pinned_bytes
from pkernfs.server.relay import Relay
from pkernfs.server.standby import Standby, backoff
from pkernfs.server.state import STORED, Descriptors, State
from pkernfs.server.stats import BUGS, map_stats, requests
from pkernfs.server.systemd import service
from pkernfs.server.upgrade import Upgrade
from pkernfs.sockets import listen, remove, remove_stale, runtime_dir

log = logging.getLogger("pkernfs")

START = 60.0  #: seconds that a worker may take to import and open
HAND_OVER = 30.0  #: seconds that the next keeper may take


class Keeper:
    """One mount.  ``worker``: the one that serves already, when another keeper has started it."""

    def __init__(self, state: State, fds: Descriptors, worker: Child | None = None) -> None:
        self.state = state
        self.fds = fds
        self.worker = worker
        self.standby = Standby()
        self.upgrade: Upgrade | None = None
        self.stats = map_stats(fds.stats)
        self.service = service()
        self.exporter = Exporter(state.mountpoint, state.options.metrics)
        self.unmounting: subprocess.Popen[bytes] | None = None
        self.ending = False  #: the mount is to end with its worker
        self.leaving = False  #: somebody else keeps the mount from now on
        self.state_file = -1
        self.wake, self.wakened = socket.socketpair()
        for one in (self.wake, self.wakened):
            one.setblocking(False)
        signal.set_wakeup_fd(self.wakened.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.commands: Commands | None = None
        if fds.device >= 0:
            self._begin(Device(fds.device))

    def _begin(self, device: Device) -> None:
        """The mount is there."""
        self.device = device
        self.relay = Relay(device, self.state.mountpoint, self.state.init, self.state.options.hang)
        self.commands = Commands(socket.socket(fileno=os.dup(self.fds.orders)), self.status, self._wake)

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            self.wakened.send(b"\0")

    # -- the first worker -----------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Open, mount, serve; what the first worker says when the mount is usable.  Raises PkernfsError."""
        state = self.state
        worker = Child(state.command)
        device: Device | None = None
        try:
            opened = self.open(worker, first=True)
            device = mount_device(state.region, state.mountpoint, state.options)
            state.init = device.read()
            mounted = mount_at(state.mountpoint)
            state.device = mounted.device if mounted else ""
            self._listen(device)
            self._hand_over(worker, takeover=False)
            ready = worker.receive(START)
            self._served_by(worker)
            log.info("%s: mounted on %s", state.region, state.mountpoint)
            return opened | ready
        except BaseException:
            worker.kill()
            if device is not None:
                subprocess.run(self._umount_command(lazy=True), stderr=subprocess.DEVNULL, check=False)
            self._remove_sockets()
            raise

    def _listen(self, device: Device) -> None:
        state = self.state
        folder = runtime_dir()
        remove_stale(folder)
        name = os.path.join(folder, f"{state.device}-{os.urandom(4).hex()}")
        state.control_path, state.orders_path = f"{name}.worker.sock", f"{name}.keeper.sock"
        control, orders = listen(state.control_path), listen(state.orders_path)
        self.fds = self.fds._replace(control=control.detach(), orders=orders.detach(), device=device.fd)
        self._begin(device)

    def open(self, worker: Child, *, first: bool) -> dict[str, Any]:
        """Let a worker open the region.  Raises WorkerError, WorkerGoneError."""
        worker.up(START)
        message = {"verb": "open", "state": self.state.to_json(), "first": first}
        worker.send(message, [self.fds.region, self.fds.references, self.fds.stats])
        return worker.receive(START)

    def _hand_over(self, worker: Child, *, takeover: bool) -> None:
        message = {"state": self.state.to_json(), "revive": not self.service}
        self.relay.hand_over(worker, message, [self.fds.control, self.fds.orders], takeover=takeover)

    def _served_by(self, worker: Child) -> None:
        """Note that a worker serves."""
        state = self.state
        self.worker = worker
        state.worker, state.worker_since = worker.pid, time.time()
        state.version = worker.facts.get("version", "")
        self.tell()

    def tell(self) -> None:
        """Give the state to those who start the next keeper: the worker, or systemd."""
        if self.worker is not None:
            with suppress(WorkerGoneError):
                self.worker.send({"verb": "know", "state": self.state.to_json()})
            self._store(self.worker)

    # -- the loop -------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """See to it that somebody serves, until the mount ends, or another keeper has taken over."""
        keep_resident()
        self.tell()
        self.service.notify("READY=1", f"STATUS={self.state.region} on {self.state.mountpoint}")
        while not (self.leaving or self.ending):
            reason = self._watch()
            if self.leaving or self.ending or self._is_over():
                break
            if self.upgrade is not None and self.upgrade.serving:
                self.upgrade.fail(f"the new worker ended with {reason}")
            self.take_over(reason)
        self.close()

    def _watch(self) -> str:
        """Wait until the worker is gone; how it ended."""
        heartbeat: Heartbeat | None = None
        while not self.leaving:
            worker = self.worker
            assert worker is not None
            if heartbeat is None or heartbeat.worker is not worker:
                heartbeat = Heartbeat(worker, self.device)
            heartbeat.patience = self._patience()
            self.standby.look_after(self.state.command)
            self.exporter.look_after()
            for said in self._select(heartbeat):
                if said is not None:
                    said()
                    continue
                try:
                    heartbeat.heard(worker.receive(0))
                except WorkerError as error:
                    log.error("%s", error)
                except WorkerGoneError:
                    return worker.end()
            self._obey()
            self.service.sign_of_life()
            if self.worker is worker and (why := heartbeat.lost()):
                end_stuck(worker, why)
            if self.upgrade is not None and self.upgrade.serving:
                self.upgrade.look()
        return ""

    def _select(self, heartbeat: Heartbeat) -> list[Callable[[], None] | None]:
        """Wait until something is said; what is to be called for it, None for the worker."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.wake, selectors.EVENT_READ, self._woken)
            selector.register(heartbeat.worker.socket, selectors.EVENT_READ)
            if self.standby.worker is not None:
                selector.register(self.standby.worker.socket, selectors.EVENT_READ, self.standby.spoke)
            if self.upgrade is not None and not self.upgrade.serving:
                selector.register(self.upgrade.worker.socket, selectors.EVENT_READ, self.upgrade.spoke)
            # The worker's first: what it has said of itself holds before another one takes its place.
            return sorted((key.data for key, _ in selector.select(heartbeat.interval)), key=bool)

    def _patience(self) -> float:
        """Seconds without an answer after which a worker is lost."""
        hang, upgrade = self.state.options.hang, self.upgrade
        return min(hang, upgrade.probation / 2) if upgrade is not None and upgrade.serving else hang

    def _woken(self) -> None:
        """Signals; commands are looked at in any case."""
        with suppress(BlockingIOError):
            self._signals(self.wake.recv(100))

    def _obey(self) -> None:
        """Commands."""
        assert self.commands is not None
        while (command := self.commands.next()) is not None:
            try:
                if command.verb == "hand-over":
                    self.hand_on(command)
                elif self.upgrade is not None:
                    raise RegionError("an upgrade is under way", hint="try again when it is done")
                else:
                    self.upgrade = Upgrade(self, command)
            except PkernfsError as error:
                command.refuse(error)

    def _signals(self, numbers: bytes) -> None:
        # Of two that wait, the handler of the later one runs first: SIGINT of systemd's ExecStop comes before SIGTERM.
        for number in sorted(set(numbers) - {0, signal.SIGCHLD}):
            if self.ending or self.unmounting is not None:
                continue
            if self.service and number == signal.SIGTERM:
                log.info("SIGTERM: leaving %s to the next keeper", self.state.mountpoint)
                self.leaving = True
            else:
                log.info("%s: unmounting %s", signal.Signals(number).name, self.state.mountpoint)
                self.unmounting = subprocess.Popen(self._umount_command(), stderr=subprocess.DEVNULL)
        if self.unmounting is not None and self.unmounting.poll() not in (None, 0):
            self.unmounting = None
            log.warning("%s is in use: what is open there fails from now on", self.state.mountpoint)
            self.ending = True
            assert self.worker is not None
            with suppress(WorkerGoneError):
                self.worker.send({"verb": "end"})

    def _umount_command(self, *, lazy: bool = False) -> list[str]:
        if os.geteuid() == 0:
            return ["umount", "-i", *["-l"] * lazy, self.state.mountpoint]
        return ["fusermount3", "-u", *["-z"] * lazy, "--", self.state.mountpoint]

    def _is_over(self) -> bool:
        try:
            self.device.readable()
        except ConnectionAbortedError:
            return True
        return False

    # -- takeover -------------------------------------------------------------------------------------------------

    def take_over(self, reason: str) -> None:
        """Let the standby serve in place of a worker that has ended."""
        state = self.state
        begin = time.monotonic()
        state.last_reason = reason
        log.warning("worker %d ended with %s: another one takes over", state.worker, reason)
        failures = 0
        while True:
            self._pause(backoff(failures))
            if self.leaving or self.ending:
                return
            worker = self.standby.take(state.command)
            try:
                self.let_serve(worker, begin)
                return
            except ConnectionAbortedError:
                self.worker = worker  # which sees the end of the mount too
                return
            except (PkernfsError, OSError) as error:
                failures += 1
                log.error("the takeover failed: %s", error)
                if isinstance(error, WorkerStuckError):
                    end_stuck(worker, "did not answer")
                worker.kill()

    def let_serve(self, worker: Child, begin: float) -> None:
        """Open and hand over; ``begin``: when nobody served any more.  Raises PkernfsError, ConnectionAbortedError."""
        state = self.state
        self.open(worker, first=False)
        self._hand_over(worker, takeover=True)
        stall = time.monotonic() - begin
        state.takeovers += 1
        state.last_takeover = time.time()
        state.longest_stall = max(state.longest_stall, stall)
        self._served_by(worker)
        log.info("worker %d serves after %.1f ms", worker.pid, stall * 1000)

    def _pause(self, seconds: float) -> None:
        """Wait, but not longer than until a signal says that the mount is to end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                selector.register(self.wake, selectors.EVENT_READ)
                selector.select(min(left, BEAT))
            self.service.sign_of_life()
            with suppress(BlockingIOError):
                numbers = set(self.wake.recv(100)) & {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
                if numbers:
                    # Nobody serves, so nothing can be written back: umount would wait for ever.
                    self.leaving = bool(self.service) and numbers == {signal.SIGTERM}
                    self.ending = not self.leaving
                    return

    def drain(self) -> None:
        """End the worker when it has answered what it has read."""
        worker = self.worker
        assert worker is not None
        with suppress(WorkerGoneError):
            worker.send({"verb": "drain"})
            while True:
                worker.receive(self.state.options.hang)
        worker.kill()

    # -- other keepers --------------------------------------------------------------------------------------------

    def hand_on(self, command: Command) -> None:
        """Give everything to another keeper, which says when it has it.  Raises RegionError."""
        if self.service:
            raise RegionError("systemd started this keeper", hint="systemctl restart its service")
        assert self.worker is not None
        command.answer(self.state.to_json(), [*self.fds, self.worker.socket.fileno()])
        command.connection.settimeout(HAND_OVER)
        try:
            said = command.connection.recv(1)
        except OSError:
            said = b""
        command.done.set()
        if said:
            log.info("another keeper has taken over")
            self.leaving = True
        else:
            log.error("the next keeper has failed: this one goes on")

    def _store(self, worker: Child) -> None:
        if not self.service:
            return
        if self.state_file < 0:
            self.state_file = os.memfd_create("pkernfs-state", os.MFD_CLOEXEC)
            self.service.store({"state": self.state_file, **self.fds._asdict()})
        os.truncate(self.state_file, 0)
        os.pwrite(self.state_file, json.dumps(self.state.to_json()).encode(), 0)
        self.service.store({"worker": worker.socket.fileno()})

    # -- telling --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `pkernfs status` shows."""
        return {
            **self.state.status(),
            "standby": self.standby.pid,
            "requests": requests(self.stats),
            "failed_requests": self.stats[BUGS],
            "dirty": dirty_bytes(self.state.device),
            "pinned": pinned_bytes(self.fds.region, self.state.worker),
        }

    def close(self) -> None:
        """End the standby; and the mount, unless another keeper has it."""
        self.exporter.close()
        self.standby.kill()
        if self.upgrade is not None and not self.upgrade.serving:
            self.upgrade.worker.kill()
        if self.leaving:
            return
        self.service.forget(STORED)
        if self.ending:
            subprocess.run(self._umount_command(lazy=True), stderr=subprocess.DEVNULL, check=False)
        self._remove_sockets()
        log.info("%s: unmounted %s", self.state.region, self.state.mountpoint)

    def _remove_sockets(self) -> None:
        for path in (self.state.control_path, self.state.orders_path):
            if path:
                remove(path)
