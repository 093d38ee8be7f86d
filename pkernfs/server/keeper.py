"""The keeper of one mount: it holds /dev/fuse, and sees to it that somebody serves.

It mounts, reads the kernel's INIT and keeps it, and starts workers.  A worker gets INIT, and after a takeover what was
not answered, through a socket that stands in for /dev/fuse (relay.py), and goes on with the descriptor itself when that
socket ends.  A standby that has imported everything waits for the end of the worker.  The keeper never looks into the
region: it only holds its lock.  Its end is not the end of the mount: the worker starts another keeper, or systemd does.

python -m pkernfs.server.keeper FD: the keeper that a worker starts when its own is gone; FD is the socket between them.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.mounts import mount_at
from pkernfs.server.buffers import keep_resident
from pkernfs.server.child import Child, WorkerError, WorkerGoneError, WorkerStuckError, receive
from pkernfs.server.device import Device, mount_device
from pkernfs.server.exporter import Exporter
from pkernfs.server.heartbeat import BEAT, Heartbeat, end_stuck
from pkernfs.server.logs import start_logging
from pkernfs.server.memory import dirty_bytes, pinned_bytes
from pkernfs.server.orders import Order, Orders
from pkernfs.server.relay import Relay
from pkernfs.server.state import Descriptors, State
from pkernfs.server.stats import BUGS, map_stats, requests
from pkernfs.server.systemd import service
from pkernfs.server.upgrade import Upgrade
from pkernfs.sockets import listen, remove, remove_stale, runtime_dir

log = logging.getLogger("pkernfs")

START = 60.0  #: seconds that a worker may take to import and open
BACKOFF = (0.0, 0.02, 0.1, 0.5, 2.0, 10.0)  #: seconds before the next try, by tries that failed one after the other
STORED = ("state", "worker", *Descriptors._fields)  #: names of descriptors that systemd keeps
HAND_OVER = 30.0  #: seconds that the next keeper may take


class Keeper:
    """One mount.  ``worker``: the one that serves already, when another keeper has started it."""

    def __init__(self, state: State, fds: Descriptors, worker: Child | None = None) -> None:
        self.state = state
        self.fds = fds
        self.worker = worker
        self.standby: Child | None = None
        self.standby_failures = 0
        self.standby_after = 0.0  #: when the next standby may be started
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
        self.orders: Orders | None = None
        if fds.device >= 0:
            self._begin(Device(fds.device))

    def _begin(self, device: Device) -> None:
        """The mount is there."""
        self.device = device
        self.relay = Relay(device, self.state.mountpoint, self.state.init, self.state.options.hang)
        self.orders = Orders(socket.socket(fileno=os.dup(self.fds.orders)), self.status, self._wake)

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            self.wakened.send(b"\0")

    # -- the first worker -----------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Open, mount, serve; what the first worker says when the mount is usable.  Raises PkernfsError."""
        state = self.state
        worker = Child(state.command)
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
        self._tell()

    def _tell(self) -> None:
        """Give the state to those who start the next keeper: the worker, or systemd."""
        if self.worker is not None:
            with suppress(WorkerGoneError):
                self.worker.send({"verb": "know", "state": self.state.to_json()})
            self._store(self.worker)

    # -- the loop -------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """See to it that somebody serves, until the mount ends, or another keeper has taken over."""
        keep_resident()
        self._tell()
        self.service.notify("READY=1", f"STATUS={self.state.region} on {self.state.mountpoint}")
        while not (self.leaving or self.ending):
            reason = self._watch()
            if self.leaving or self.ending or self._is_over():
                break
            if self.upgrade is not None and self.upgrade.serving:
                self.upgrade.fail(f"the new worker ended with {reason}")
                self._end_upgrade()
            self.take_over(reason)
        self.close()

    def _watch(self) -> str:
        """Wait until the worker is gone; how it ended."""
        worker = self.worker
        assert worker is not None
        heartbeat = Heartbeat(worker, self.device, self.patience())
        while not self.leaving:
            self._look_after_standby()
            self.exporter.look_after()
            with selectors.DefaultSelector() as selector:
                selector.register(self.wake, selectors.EVENT_READ, self._woken)
                selector.register(worker.socket, selectors.EVENT_READ, heartbeat)
                if self.standby is not None:
                    selector.register(self.standby.socket, selectors.EVENT_READ, self._standby_spoke)
                if self.upgrade is not None and not self.upgrade.serving:
                    selector.register(self.upgrade.worker.socket, selectors.EVENT_READ, self._upgrade_spoke)
                ready = selector.select(heartbeat.interval)
            for key, _ in ready:
                if key.data is not heartbeat:
                    key.data()
                    if self.worker is not worker:  # upgraded
                        return self._watch()
                    continue
                try:
                    heartbeat.heard(worker.receive(0))
                except WorkerError as error:
                    log.error("%s", error)
                except WorkerGoneError:
                    return worker.end()
            self.service.sign_of_life()
            if why := heartbeat.lost():
                heartbeat.end(why)
            if self.upgrade is not None and self.upgrade.serving:
                self._probation()
        return ""

    def patience(self) -> float:
        """Seconds without an answer after which a worker is lost."""
        hang = self.state.options.hang
        return min(hang, self.upgrade.probation / 2) if self.upgrade is not None else hang

    def _woken(self) -> None:
        """Signals and orders."""
        with suppress(BlockingIOError):
            self._signals(self.wake.recv(100))
        assert self.orders is not None
        while (order := self.orders.next()) is not None:
            try:
                if order.verb == "hand-over":
                    self.hand_on(order)
                elif self.upgrade is not None:
                    raise RegionError("an upgrade is under way", hint="try again when it is done")
                else:
                    self.upgrade = Upgrade(order, self.state.command)
            except PkernfsError as error:
                order.refuse(error)

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

    # -- standby --------------------------------------------------------------------------------------------------

    def _look_after_standby(self) -> None:
        if self.standby is None and time.monotonic() >= self.standby_after:
            self.standby = Child(self.state.command)

    def _standby_spoke(self) -> None:
        assert self.standby is not None
        try:
            if self.standby.facts:  # it has nothing more to say: it has ended
                self.standby.receive(0)
            self.standby.up(0)
            self.standby_failures = 0
            return
        except PkernfsError as error:
            log.error("standby: %s", error)
        self.standby.kill()
        self.standby = None
        self.standby_failures += 1
        self.standby_after = time.monotonic() + BACKOFF[min(self.standby_failures + 1, len(BACKOFF) - 1)]

    # -- takeover -------------------------------------------------------------------------------------------------

    def take_over(self, reason: str) -> None:
        """Let the standby serve in place of a worker that has ended."""
        state = self.state
        begin = time.monotonic()
        state.last_reason = reason
        log.warning("worker %d ended with %s: another one takes over", state.worker, reason)
        failures = 0
        while True:
            self._pause(BACKOFF[min(failures, len(BACKOFF) - 1)])
            if self.leaving or self.ending:
                return
            worker, self.standby = self.standby or Child(state.command), None
            try:
                self._let_serve(worker, begin)
                return
            except ConnectionAbortedError:
                self.worker = worker  # which sees the end of the mount too
                return
            except PkernfsError as error:
                failures += 1
                log.error("the takeover failed: %s", error)
                if isinstance(error, WorkerStuckError):
                    end_stuck(worker, "did not answer")
                worker.kill()

    def _let_serve(self, worker: Child, begin: float) -> None:
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

    # -- upgrade --------------------------------------------------------------------------------------------------

    def _upgrade_spoke(self) -> None:
        """The new worker is up, or has ended: let it serve if it can."""
        upgrade = self.upgrade
        assert upgrade is not None
        assert self.worker is not None
        try:
            upgrade.check(self.state, self.fds.region)
        except PkernfsError as error:
            upgrade.worker.kill()
            upgrade.fail(str(error))
            return self._end_upgrade()
        begin = time.monotonic()
        upgrade.begin(self.state, self.stats[BUGS])
        self._drain()
        try:
            self._let_serve(upgrade.worker, begin)
        except PkernfsError as error:
            upgrade.worker.kill()
            upgrade.fail(str(error))
            self._end_upgrade()
            self.take_over(f"an upgrade that failed: {error}")
        self.state.last_reason = "upgrade"
        return None

    def _drain(self) -> None:
        """End the worker when it has answered what it has read."""
        worker = self.worker
        assert worker is not None
        with suppress(WorkerGoneError):
            worker.send({"verb": "drain"})
            while True:
                worker.receive(self.state.options.hang)
        worker.kill()

    def _probation(self) -> None:
        """Look at how the new worker is doing; at the end, make it the program of those to come."""
        upgrade = self.upgrade
        assert upgrade is not None
        if self.stats[BUGS] != upgrade.bugs:
            upgrade.fail("the new worker could not answer a request, see the log")
            self._end_upgrade()
            begin = time.monotonic()
            self._drain()
            log.warning("back to the worker of before, %.1f ms after", (time.monotonic() - begin) * 1000)
            return self.take_over("an upgrade that failed")
        if time.monotonic() >= upgrade.until:
            self.state.command = upgrade.command
            upgrade.succeed(self.state)
            if self.standby is not None:
                self.standby.kill()
                self.standby = None
            self._end_upgrade()
            self._tell()
        return None

    def _end_upgrade(self) -> None:
        self.upgrade = None

    # -- other keepers --------------------------------------------------------------------------------------------

    def hand_on(self, order: Order) -> None:
        """Give everything to another keeper, which says when it has it.  Raises RegionError."""
        if self.service:
            raise RegionError("systemd started this keeper", hint="systemctl restart its service")
        assert self.worker is not None
        order.answer(self.state.to_json(), [*self.fds, self.worker.socket.fileno()])
        order.connection.settimeout(HAND_OVER)
        try:
            said = order.connection.recv(1)
        except OSError:
            said = b""
        order.done.set()
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
            "standby": self.standby.pid if self.standby is not None else 0,
            "requests": requests(self.stats),
            "failed_requests": self.stats[BUGS],
            "dirty": dirty_bytes(self.state.device),
            "pinned": pinned_bytes(self.fds.region, self.state.worker),
        }

    def close(self) -> None:
        """End the standby; and the mount, unless another keeper has it."""
        self.exporter.close()
        if self.standby is not None:
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


def adopt(state: State, fds: list[int]) -> Keeper:
    """A keeper of a mount that is there.  ``fds``: Descriptors, and the socket to the worker."""
    *rest, connection = fds
    worker = Child(connection=socket.socket(fileno=connection), pid=state.worker)
    state.keepers += 1
    log.info("%s: keeping %s from now on", state.region, state.mountpoint)
    return Keeper(state, Descriptors(*rest), worker)


def main() -> None:
    """The keeper after one that is gone, started by the worker."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    if os.fork():
        os._exit(0)  # its parent is not the worker then, which may end before it
    os.setsid()
    message, fds = receive(connection)
    state = State.from_json(message["state"])
    start_logging(state.options)
    log.warning("the keeper of %s was gone: this is the next one", state.mountpoint)
    adopt(state, [*fds, connection.detach()]).keep()


if __name__ == "__main__":
    main()
