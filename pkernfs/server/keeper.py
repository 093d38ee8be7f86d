"""The keeper of one mount: it holds /dev/fuse, and sees to it that somebody serves.

It mounts, reads the kernel's INIT and keeps it, and starts workers (serving.py).  A worker gets INIT, and after a
takeover what was not answered, through a socket that stands in for /dev/fuse (relay.py), and goes on with the
descriptor itself when that socket ends.  A standby waits for the end of the worker.  The keeper never looks into the
region: it only holds its lock.  Its end is not the end of the mount (succession.py).

One thread, one loop: it waits for the worker, the standby, the worker of an upgrade, signals and commands, and acts on
one at a time.  What it may do next depends on its phase (phase.py).  Where it waits for one thing it goes on with
signals and the watchdog (signals.py).  What the host refuses it ends nothing, and is tried again (resources.py).
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pkernfs.errors import PkernfsError, RegionError
from pkernfs.region import host
from pkernfs.served import Served, still_mounted
from pkernfs.server.buffers import RELAYED, keep_resident
from pkernfs.server.child import Child, WorkerError, WorkerGoneError, WorkerStuckError
from pkernfs.server.exporter import Exporter
from pkernfs.server.heartbeat import BEAT, Heartbeat, kill_stuck
from pkernfs.server.logs import log_attempt
from pkernfs.server.memory import dirty_bytes, pinned_bytes
from pkernfs.server.messages import Pulse
from pkernfs.server.phase import Life, Phase
from pkernfs.server.resources import REFUSALS, Attempt, ResourceError, Trouble, asking, poll, refusal, reserve
from pkernfs.server.serving import Serving, Started
from pkernfs.server.signals import EndWantedError, Wakeup
from pkernfs.server.standby import Standby
from pkernfs.server.state import STORED, Descriptors, State
from pkernfs.server.stats import AWAITING, BUGS, map_stats, requests
from pkernfs.server.systemd import service
from pkernfs.server.umount import Unmounting
from pkernfs.server.upgrade import Action, Decision, Upgrade

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.server.commands import Command, Commands

log = logging.getLogger("pkernfs")

AT_ONCE = 0.001  #: seconds: only to take notice of signals


class Keeper:
    """One mount.  ``worker``: the one that serves already, when another keeper has started it."""

    def __init__(self, state: State, fds: Descriptors, worker: Child | None = None) -> None:
        self.state = state
        self.service = service()
        self.wakeup = Wakeup()
        self.wakeup.tick = self.service.notify_watchdog
        if worker is not None:
            worker.readable = self.wakeup.readable
        self.serving = Serving(state, fds, worker, self.wakeup.readable)
        self.life = Life(state.mountpoint, Phase.SERVING if worker is not None else Phase.STARTING)
        self.standby = Standby(self.wakeup.readable, foreground=state.options.foreground)
        self.upgrade: Upgrade | None = None  #: in UPGRADING, PROBATION, and a TAKING_OVER that goes back to the former
        self.umount: Unmounting | None = None  #: in UNMOUNTING, and a TAKING_OVER that goes back there
        self.stats = map_stats(fds.stats)
        self.exporter = Exporter(state.region, state.options.metrics)
        self.unmounting = Attempt("umount")
        self.commands: Commands | None = None  #: once they can be answered
        self.answering = Attempt("commands", "cannot be answered")
        self.loop = Attempt("keeper", "cannot do all that it should")
        self._refused = False  #: something in this turn of the loop

    @property
    def phase(self) -> Phase:
        """Where in its life it is."""
        return self.life.phase

    def start(self) -> Started:
        """Mount; what the first worker tells when the mount is usable.  Raises PkernfsError."""
        try:
            started = self.serving.start(self.standby.first(self.state.command))
        except BaseException:
            self.standby.kill()
            self.life.enter(Phase.ENDED)
            raise
        self.life.enter(Phase.SERVING)
        log.info("%s: mounted on %s", self.state.region, self.state.mountpoint)
        return started

    # -- the loop -------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """See to it that somebody serves, until the mount ends, or another keeper has taken over."""
        keep_resident(RELAYED)
        self._ensure_commands()
        self.serving.publish_state()
        with self._enduring():
            self.service.notify("READY=1", f"STATUS={self.state.region} on {self.state.mountpoint}")
        while True:
            reason = self._watch()
            if self.phase in (Phase.HANDED_OVER, Phase.ENDING, Phase.ENDED) or self.serving.has_ended():
                break
            if self.phase is Phase.PROBATION:
                self._fail_upgrade(f"the new worker ended with {reason}: keeping the previous version")
            then = self.phase if self.phase in (Phase.UPGRADING, Phase.UNMOUNTING) else Phase.SERVING
            self.take_over(reason, then)
        self.close()

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        """A part of a turn of the loop: what the host refuses it does not end the keeper, the next turn tries again."""
        try:
            yield
        except (ResourceError, *REFUSALS) as error:
            self._refused = True
            self.loop.refused(error if isinstance(error, ResourceError) else refusal("the keeper's loop", error))

    def _watch(self) -> str:
        """Wait until nobody serves, or another keeper has the mount; how the worker ended."""
        heartbeat: Heartbeat | None = None
        while self.phase is not Phase.HANDED_OVER and (worker := self.serving.worker) is not None:
            if heartbeat is None or heartbeat.worker is not worker:
                heartbeat = Heartbeat(worker, self.serving.device)
            heartbeat.patience = self._patience()
            self._refused = False
            for ensure in (self._ensure_standby, self.exporter.ensure):
                with self._enduring():
                    ensure()
            for handle in (*self._wait(heartbeat), *self._duties):
                with self._enduring():
                    if handle is not None:
                        handle()
                        continue
                    try:
                        heartbeat.on_answer(worker.receive(Pulse, 0))
                    except WorkerError as error:
                        log.error("%s", error)
                    except WorkerStuckError:  # it has said nothing
                        pass
                    except WorkerGoneError:
                        return self.serving.wait_for_end(worker)
            with self._enduring():
                if self.serving.worker is worker and (why := heartbeat.check()):
                    kill_stuck(worker, why)
            if not self._refused:
                self.loop.succeeded()
        return ""

    def _wait(self, heartbeat: Heartbeat) -> list[Callable[[], None] | None]:
        """Wait until there is something to read; what handles it, None for the worker."""
        # The worker's first: its end, or its answer, holds before another one takes its place.
        sources: dict[int, Callable[[], None] | None] = {heartbeat.worker.socket.fileno(): None}
        sources[self.wakeup.fileno()] = self._handle_signals  # and at each turn: the wake-up may have been refused
        if self.standby.worker is not None:
            sources[self.standby.worker.socket.fileno()] = self.standby.on_message
        if self.upgrade and self.phase is Phase.UPGRADING:
            sources[self.upgrade.worker.socket.fileno()] = self._check_upgrade
        left = heartbeat.interval if self.standby.worker is not None else self.standby.attempt.left()
        ready = poll(sources, min(left, heartbeat.interval))
        return [handle for fd, handle in sources.items() if fd in ready]

    @property
    def _duties(self) -> tuple[Callable[[], None], ...]:
        """What is done at each turn, whatever there was to read."""
        return (
            self._handle_signals,
            self._ensure_commands,
            self._handle_commands,
            self._check_umount,
            self.service.notify_watchdog,
            self._check_probation,
            self.serving.ensure_published,
            self._try_log,
            reserve().refill,
        )

    def _ensure_commands(self) -> None:
        """Answer commands, once what that needs is loaded."""
        if self.commands is not None:
            self.commands.ensure()
        elif self.answering.due():
            try:
                # Here, where the mount is usable already: it loads msgspec, 15 to 20 ms of the 300 that mounting takes.
                from pkernfs.server.commands import Commands
            except Exception as error:  # of a package that is gone, or half replaced, it may be any
                self.answering.refused(f"{type(error).__name__}: {error}")
                return
            self.commands = Commands(self.serving.fds.commands, self.status, self.wakeup.wake, self.answering)

    @staticmethod
    def _try_log() -> None:
        """Write something when nothing could be written: what is logged next may come in a month."""
        if log_attempt.failures and log_attempt.due():
            log.info("the log is tried again")

    def _ensure_standby(self) -> None:
        self.standby.ensure(self.state.command)

    def _check_probation(self) -> None:
        """The time that an upgrade has; also of what it does before its probation."""
        if self.upgrade and self.phase is Phase.UPGRADING:
            self._act(self.upgrade, self.upgrade.check_deadline())
        elif self.upgrade and self.phase is Phase.PROBATION:
            self._act(self.upgrade, self.upgrade.check_probation(self.stats[BUGS]))

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
                self.life.enter(Phase.UNMOUNTING)
                self._check_umount()

    def _check_umount(self) -> None:
        """Start to unmount, if that is still to be done, and see what has come of it.

        When it is in use the mount ends all the same; where it is mounted in other mount namespaces it goes on.
        """
        if self.phase is not Phase.UNMOUNTING:
            return
        umount = self.umount
        if umount is None:
            if self.unmounting.due():
                try:
                    with asking("its thread"):
                        self.umount = Unmounting(self.state.device, self.state.region, self.wakeup.wake)
                except ResourceError as error:
                    self.unmounting.refused(error)
        elif umount.refused is not None:
            self.umount = None
            self.unmounting.refused(umount.refused)
        elif umount.problem:
            self._end(umount.problem)
        elif umount.settled() and not self.serving.has_ended():
            self.unmounting.succeeded()
            if umount.elsewhere:
                log.warning("%s: %s: it goes on", self.state.region, still_mounted(umount.elsewhere))
                self.umount = None
                self.life.enter(Phase.SERVING)
            else:
                self._end("what is open there outlived its last mount")

    def _end(self, why: str) -> None:
        """End a mount that is in use: the worker writes back what is dirty."""
        log.warning("%s is in use: what is open there fails from now on: %s", self.state.mountpoint, why)
        self.life.enter(Phase.ENDING)
        self.serving.ask_to_end()

    # -- takeover -------------------------------------------------------------------------------------------------

    def take_over(self, reason: str, then: Phase = Phase.SERVING) -> None:
        """Let another worker serve in place of one that has ended; ``then``: the phase to go on with."""
        self.life.enter(Phase.TAKING_OVER)
        try:
            self.standby.take_over(self.serving, reason, self._pause)
        except ConnectionAbortedError:
            log.info("%s has ended while nobody served it", self.state.mountpoint)
            self.life.enter(Phase.ENDED)
        except EndWantedError:
            # Nobody serves, so nothing can be written back: umount would wait for ever.
            stays = bool(self.service) and self.wakeup.signals() == [signal.SIGTERM]
            self.life.enter(Phase.HANDED_OVER if stays else Phase.ENDING)
        else:
            self.life.enter(then)

    def _pause(self, seconds: float) -> None:
        """Wait.  Raises EndWantedError when a signal says that the mount is to end, ConnectionAbortedError: it has."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.serving.has_ended():
                raise ConnectionAbortedError
            refusing = self.serving.refusing
            if refusing.serve(self.serving.device, self.wakeup, min(left, BEAT)):
                return
            self.wakeup.pause(AT_ONCE if refusing.why else min(left, BEAT))
            with self._enduring():
                self._ensure_commands()

    # -- commands -------------------------------------------------------------------------------------------------

    def _handle_commands(self) -> None:
        while self.commands is not None and (command := self.commands.next()) is not None:
            try:
                self.handlers()[type(command.request)](command, command.request)
            except PkernfsError as error:
                command.refuse(error)
            except REFUSALS as error:
                command.refuse(refusal("the keeper", error))

    def handlers(self) -> dict[type[api.Request[Any]], Callable[[Command, Any], None]]:
        """What handles each command; the status needs none, as nobody is to wait for it (commands.py)."""
        from pkernfs import api

        return {api.Upgrade: self._begin_upgrade, api.HandOver: self._hand_over, api.Share: self._share}

    def _share(self, command: Command, _: api.Share) -> None:
        """Let the mount be mounted once more: that takes the connection's descriptor.  Raises PkernfsError."""
        from pkernfs import api

        if self.serving.has_ended():
            raise RegionError("the mount has ended")
        options = self.state.options._asdict()
        command.answer(
            api.Shared(device=self.state.device, region=self.state.region, options=options), [self.serving.device.fd]
        )
        command.done.set()

    def _begin_upgrade(self, command: Command, request: api.Upgrade) -> None:
        """Start a worker of another program.  Raises PkernfsError."""
        self.life.check(Phase.UPGRADING, "upgrade")
        self.upgrade = Upgrade(command, request, self.wakeup.readable)
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
        except (PkernfsError, OSError, MemoryError) as error:
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

    def troubles(self) -> list[Trouble]:
        """What the host refuses at the moment."""
        parts = [self.standby.attempt, self.standby.takeover, self.exporter.attempt, self.answering]
        parts += [self.unmounting, self.serving.publishing, self.loop, log_attempt]
        return [trouble for part in parts if (trouble := part.trouble())]

    def status(self) -> api.Status:
        """What `pkernfs status` shows."""
        memory, host_free = host.memory_of(self.serving.fds.region)
        served = Served(self.state.device, self.state.commands_path)
        return self.state.status(
            mounts=served.here(),
            elsewhere=served.elsewhere(),
            standby=self.standby.pid,
            requests=requests(self.stats),
            failed_requests=self.stats[BUGS],
            awaiting=self.stats[AWAITING],
            dirty=dirty_bytes(self.state.device),
            pinned=pinned_bytes(self.serving.fds.region, self.state.worker),
            troubles=self.troubles(),
            memory=memory,
            host_free=host_free,
            refused=self.serving.refusing.why,
        )

    def close(self) -> None:
        """End the standby; and the mount, unless another keeper has it."""
        self.exporter.close()
        self.standby.kill()
        if self.upgrade is not None and self.upgrade.worker is not self.serving.worker:
            self.upgrade.worker.kill()
        if self.phase is Phase.HANDED_OVER:
            return
        with self._enduring():
            self.service.discard(STORED)
        if self.phase is Phase.ENDING:
            self.serving.umount_lazily()
        with self._enduring():
            self.serving.remove_sockets()
        if self.phase is not Phase.ENDED:
            self.life.enter(Phase.ENDED)
        log.info("%s: unmounted %s", self.state.region, self.state.mountpoint)
