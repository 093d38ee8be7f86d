"""The keeper of one mount: it holds /dev/fuse, and sees to it that somebody serves.

It mounts, reads the kernel's INIT and keeps it, and starts workers (serving.py).  A worker gets INIT, and after a
takeover what was not answered, through a socket that stands in for /dev/fuse (relay.py), and goes on with the
descriptor itself when that socket ends.  A standby waits for the end of the worker.  The keeper never looks into the
region: it only holds its lock.  Its end is not the end of the mount (succession.py).

One thread, one loop: it waits for the worker, the standby, the worker of an upgrade, signals and commands, and acts on
one at a time.  What it may do next depends on its phase (phase.py).
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.server.buffers import keep_resident
from pkernfs.server.child import Child, WorkerError, WorkerGoneError
from pkernfs.server.device import umount_command
from pkernfs.server.exporter import Exporter
from pkernfs.server.heartbeat import BEAT, Heartbeat, kill_stuck
from pkernfs.server.memory import dirty_bytes, pinned_bytes
from pkernfs.server.messages import Pulse
from pkernfs.server.phase import Life, Phase
from pkernfs.server.serving import Serving, Started
from pkernfs.server.signals import Wakeup
from pkernfs.server.standby import Standby
from pkernfs.server.state import STORED, Descriptors, State
from pkernfs.server.stats import AWAITING, BUGS, map_stats, requests
from pkernfs.server.systemd import service
from pkernfs.server.upgrade import Action, Decision, Upgrade

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.server.commands import Command

log = logging.getLogger("pkernfs")


class Keeper:
    """One mount.  ``worker``: the one that serves already, when another keeper has started it."""

    def __init__(self, state: State, fds: Descriptors, worker: Child | None = None) -> None:
        self.state = state
        self.serving = Serving(state, fds, worker)
        self.life = Life(state.mountpoint, Phase.SERVING if worker is not None else Phase.STARTING)
        self.standby = Standby()
        self.upgrade: Upgrade | None = None  #: in UPGRADING, PROBATION, and a TAKING_OVER that goes back to the former
        self.umount: subprocess.Popen[bytes] | None = None  #: in UNMOUNTING, and a TAKING_OVER that goes back there
        self.stats = map_stats(fds.stats)
        self.service = service()
        self.exporter = Exporter(state.mountpoint, state.options.metrics)
        self.wakeup = Wakeup()

    @property
    def phase(self) -> Phase:
        """Where in its life it is."""
        return self.life.phase

    def start(self) -> Started:
        """Mount; what the first worker tells when the mount is usable.  Raises PkernfsError."""
        try:
            started = self.serving.start()
        except BaseException:
            self.life.enter(Phase.ENDED)
            raise
        self.life.enter(Phase.SERVING)
        log.info("%s: mounted on %s", self.state.region, self.state.mountpoint)
        return started

    # -- the loop -------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """See to it that somebody serves, until the mount ends, or another keeper has taken over."""
        # Here, where the mount is usable already: it loads msgspec, 15 to 20 ms of the 300 that mounting takes.
        from pkernfs.server.commands import Commands

        keep_resident()
        listener = socket.socket(fileno=os.dup(self.serving.fds.commands))
        self.commands = Commands(listener, self.status, self.wakeup.wake)
        self.serving.publish_state()
        self.service.notify("READY=1", f"STATUS={self.state.region} on {self.state.mountpoint}")
        while True:
            reason = self._watch()
            if self.phase in (Phase.HANDED_OVER, Phase.ENDING) or self.serving.has_ended():
                break
            if self.phase is Phase.PROBATION:
                self._fail_upgrade(f"the new worker ended with {reason}: keeping the previous version")
            then = self.phase if self.phase in (Phase.UPGRADING, Phase.UNMOUNTING) else Phase.SERVING
            self.take_over(reason, then)
        self.close()

    def _watch(self) -> str:
        """Wait until nobody serves, or another keeper has the mount; how the worker ended."""
        heartbeat: Heartbeat | None = None
        while self.phase is not Phase.HANDED_OVER and (worker := self.serving.worker) is not None:
            if heartbeat is None or heartbeat.worker is not worker:
                heartbeat = Heartbeat(worker, self.serving.device)
            heartbeat.patience = self._patience()
            self.standby.ensure(self.state.command)
            self.exporter.ensure()
            for handle in self._wait(heartbeat):
                if handle is not None:
                    handle()
                    continue
                try:
                    heartbeat.on_answer(worker.receive(Pulse, 0))
                except WorkerError as error:
                    log.error("%s", error)
                except WorkerGoneError:
                    return self.serving.wait_for_end(worker)
            self._handle_commands()
            self._check_umount()
            self.service.notify_watchdog()
            if self.serving.worker is worker and (why := heartbeat.check()):
                kill_stuck(worker, why)
            if self.upgrade and self.phase is Phase.PROBATION:
                self._act(self.upgrade, self.upgrade.check_probation(self.stats[BUGS]))
        return ""

    def _wait(self, heartbeat: Heartbeat) -> list[Callable[[], None] | None]:
        """Wait until there is something to read; what handles it, None for the worker."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.wakeup, selectors.EVENT_READ, self._handle_signals)
            selector.register(heartbeat.worker.socket, selectors.EVENT_READ)
            if self.standby.worker is not None:
                selector.register(self.standby.worker.socket, selectors.EVENT_READ, self.standby.on_message)
            if self.upgrade and self.phase is Phase.UPGRADING:
                selector.register(self.upgrade.worker.socket, selectors.EVENT_READ, self._check_upgrade)
            # The worker's first: its end, or its answer, holds before another one takes its place.
            return sorted((key.data for key, _ in selector.select(heartbeat.interval)), key=bool)

    def _patience(self) -> float:
        """Seconds without an answer after which a worker is lost."""
        hang = self.state.options.hang
        return min(hang, self.upgrade.probation / 2) if self.upgrade and self.phase is Phase.PROBATION else hang

    # -- signals --------------------------------------------------------------------------------------------------

    def _handle_signals(self) -> None:
        for number in self.wakeup.signals():
            if self.phase in (Phase.UNMOUNTING, Phase.ENDING, Phase.HANDED_OVER):
                continue
            if self.service and number == signal.SIGTERM:
                log.info("SIGTERM: leaving %s to the next keeper", self.state.mountpoint)
                self.life.enter(Phase.HANDED_OVER)
            else:
                log.info("%s: unmounting %s", number.name, self.state.mountpoint)
                self._fail_upgrade("the mount is being unmounted")
                self.umount = subprocess.Popen(umount_command(self.state.mountpoint), stderr=subprocess.DEVNULL)
                self.life.enter(Phase.UNMOUNTING)

    def _check_umount(self) -> None:
        """When umount has failed the mount is in use, and ends all the same."""
        if self.phase is Phase.UNMOUNTING and self.umount is not None and self.umount.poll() not in (None, 0):
            log.warning("%s is in use: what is open there fails from now on", self.state.mountpoint)
            self.life.enter(Phase.ENDING)
            self.serving.ask_to_end()

    # -- takeover -------------------------------------------------------------------------------------------------

    def take_over(self, reason: str, then: Phase = Phase.SERVING) -> None:
        """Let another worker serve in place of one that has ended; ``then``: the phase to go on with."""
        self.life.enter(Phase.TAKING_OVER)
        if self.standby.take_over(self.serving, reason, self._pause):
            self.life.enter(then)

    def _pause(self, seconds: float) -> bool:
        """Wait, but not longer than until a signal says that the mount is to end; False: it said so."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.wakeup.wait(min(left, BEAT))
            self.service.notify_watchdog()
            if signals := self.wakeup.signals():
                # Nobody serves, so nothing can be written back: umount would wait for ever.
                stays = bool(self.service) and signals == [signal.SIGTERM]
                self.life.enter(Phase.HANDED_OVER if stays else Phase.ENDING)
                return False
        return True

    # -- commands -------------------------------------------------------------------------------------------------

    def _handle_commands(self) -> None:
        while (command := self.commands.next()) is not None:
            try:
                self.handlers()[type(command.request)](command, command.request)
            except PkernfsError as error:
                command.refuse(error)

    def handlers(self) -> dict[type[api.Request[Any]], Callable[[Command, Any], None]]:
        """What handles each command; the status needs none, as nobody is to wait for it (commands.py)."""
        from pkernfs import api

        return {api.Upgrade: self._begin_upgrade, api.HandOver: self._hand_over}

    def _begin_upgrade(self, command: Command, request: api.Upgrade) -> None:
        """Start a worker of another program.  Raises PkernfsError."""
        self.life.check(Phase.UPGRADING, "upgrade")
        self.upgrade = Upgrade(command, request)
        self.life.enter(Phase.UPGRADING)

    def _hand_over(self, command: Command, _: api.HandOver) -> None:
        """Give everything to another keeper, which says when it has it.  Raises PkernfsError."""
        if self.service:
            raise RegionError("systemd started this keeper", hint="systemctl restart its service")
        self.life.check(Phase.HANDED_OVER, "hand-over")
        if self.serving.give_away(command):
            log.info("another keeper has taken over")
            self.life.enter(Phase.HANDED_OVER)
        else:
            log.error("the next keeper has failed: this one goes on")

    # -- upgrades -------------------------------------------------------------------------------------------------

    def _check_upgrade(self) -> None:
        if self.upgrade and self.phase is Phase.UPGRADING:
            self._act(self.upgrade, self.upgrade.check_worker(self.state, self.serving.fds.region))

    def _act(self, upgrade: Upgrade, decision: Decision) -> None:
        """Do what an upgrade has decided on."""
        match decision.action:
            case Action.SERVE:
                self._switch(upgrade)
            case Action.FALL_BACK:
                self._fail_upgrade(f"{decision.why}: keeping the previous version")
                if self.phase is Phase.UPGRADING:
                    self.life.enter(Phase.SERVING)
                else:
                    self.serving.drain()
                    self.take_over("an upgrade that failed")
            case Action.COMMIT:
                self.upgrade = None
                self.state.command = upgrade.program
                self.standby.kill()
                self.life.enter(Phase.SERVING)
                self.serving.publish_state()
                upgrade.succeed(self.state)

    def _switch(self, upgrade: Upgrade) -> None:
        """Let the worker of an upgrade serve, on probation."""
        state, begin = self.state, time.monotonic()
        # Before it serves: what it is handed at first counts.
        upgrade.begin(state.version, self.stats[BUGS])
        state.last_reason = "upgrade"
        self.serving.drain()
        try:
            stall = self.serving.let_serve(upgrade.worker, begin)
        except ConnectionAbortedError:
            self.serving.worker, stall = upgrade.worker, 0.0  # which sees the end of the mount too
        except (PkernfsError, OSError) as error:
            self._fail_upgrade(f"{error}: keeping the previous version")
            self.take_over(f"an upgrade that failed: {error}")
            return
        upgrade.start_probation(stall)
        self.life.enter(Phase.PROBATION)

    def _fail_upgrade(self, why: str) -> None:
        """Give an upgrade up, if there is one."""
        upgrade, self.upgrade = self.upgrade, None
        if upgrade is not None:
            if upgrade.worker is not self.serving.worker:
                upgrade.worker.kill()
            upgrade.fail(why)

    # -- facts, and the end -------------------------------------------------------------------------------------

    def status(self) -> api.Status:
        """What `pkernfs status` shows."""
        return self.state.status(
            standby=self.standby.pid,
            requests=requests(self.stats),
            failed_requests=self.stats[BUGS],
            awaiting=self.stats[AWAITING],
            dirty=dirty_bytes(self.state.device),
            pinned=pinned_bytes(self.serving.fds.region, self.state.worker),
        )

    def close(self) -> None:
        """End the standby; and the mount, unless another keeper has it."""
        self.exporter.close()
        self.standby.kill()
        if self.upgrade is not None and self.upgrade.worker is not self.serving.worker:
            self.upgrade.worker.kill()
        if self.phase is Phase.HANDED_OVER:
            return
        self.service.discard(STORED)
        if self.phase is Phase.ENDING:
            self.serving.umount_lazily()
        self.serving.remove_sockets()
        self.life.enter(Phase.ENDED)
        log.info("%s: unmounted %s", self.state.region, self.state.mountpoint)
