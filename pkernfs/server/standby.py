"""The worker that waits: it has imported everything, so that a takeover costs milliseconds.

Workers are forked from a process that never serves, their template: one that was started for itself has its own copy of
all that it imports, 20 MB, takes 0.3 s, and needs the installation to be there.  The first process that is up is the
template; when it ends, the next one is started from the program again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence

from pkernfs.errors import PkernfsError
from pkernfs.server.child import START, Child, Readable, WorkerError, WorkerGoneError, WorkerStuckError
from pkernfs.server.heartbeat import kill_stuck
from pkernfs.server.messages import Pulse
from pkernfs.server.resources import Attempt, ResourceError, backoff, refusal
from pkernfs.server.serving import Serving
from pkernfs.server.signals import EndWantedError

log = logging.getLogger("pkernfs")

#: Why no process can be forked from another: not because there is no room for one, but because clone3(2) is not there
#: (before Linux 5.3) or not allowed (in a container with a filter that does not know it).
NO_SIBLINGS = (errno.ENOSYS, errno.EPERM, errno.EINVAL)


class Standby:
    """The standby of one mount, if there is one at the moment.

    ``readable``: how workers are waited for.  ``foreground``: they print, all the time, and not only what keeps the
    mount from being made.
    """

    def __init__(self, readable: Readable, *, foreground: bool = False) -> None:
        self.worker: Child | None = None
        self.template: Child | None = None
        self._forks = True  #: whether templates can be had
        self.attempt = Attempt("standby")
        self.takeover = Attempt("worker", "takeover failed, nobody serves")
        self._readable = readable
        self._foreground = foreground

    @property
    def pid(self) -> int:
        """Its process id; 0: there is none."""
        worker = self.worker
        return worker.pid if worker is not None else 0

    def ensure(self, command: Sequence[str]) -> None:
        """Start one if there is none, and it may be tried; give one up that does not get up."""
        if self.worker is None:
            if self.attempt.due():
                try:
                    self.worker = self._make(command)
                except ResourceError as error:
                    self.attempt.refused(error)
        elif not self.worker.facts and time.monotonic() - self.worker.started > START:
            kill_stuck(self.worker, f"it is not up after {START:g} s")
            self._end()
            self.attempt.refused(f"it was not up after {START:g} s")

    def first(self, command: Sequence[str]) -> Child:
        """The first worker of the mount.  Raises PkernfsError."""
        worker = Child(command, readable=self._readable)
        try:
            worker.wait_until_up(START)
        except BaseException:
            worker.kill()
            raise
        return self._make(command, prints=True) if self._is_template(worker) else worker

    def _is_template(self, worker: Child) -> bool:
        """Let a worker that is up be the template, where there is none and it can be."""
        if self.template is None and self._forks and worker.facts and worker.facts.get("forks"):
            self.template = worker
        return self.template is worker

    def _make(self, command: Sequence[str], *, prints: bool = False) -> Child:
        """A new worker: of the template, or of the program where there is none.  Raises ResourceError.

        Unless it ``prints`` the template lets go of the terminal first, where whoever mounts may wait for its end.
        """
        template = self.template
        if template is not None:
            try:
                return Child(template=template, prints=prints or self._foreground, readable=self._readable)
            except WorkerGoneError as error:  # or it does not answer
                log.info("template: %s", error)
                self._end_template()
            except WorkerError as error:
                if error.errno not in NO_SIBLINGS:
                    raise refusal("a process for a worker", OSError(error.errno, error.text)) from None
                self._forks, self.template = False, None
                return template
        return Child(command, readable=self._readable)

    def on_message(self) -> None:
        """It is up, or has ended: when it ends again and again, the next one is not started at once."""
        worker = self.worker
        if worker is None:  # a takeover, in the same turn of the keeper's loop, has taken it
            return
        try:
            if worker.facts:  # nothing more comes from it: it has ended
                worker.receive(Pulse, 0)
            worker.wait_until_up(0)
            self.attempt.succeeded()
            if self._is_template(worker):
                self.worker = None
        except (WorkerStuckError, ResourceError):  # nothing could be read: it is still there
            pass
        except WorkerGoneError as error:
            self._lost(*("", "has ended") if worker.facts else (error,))
        except PkernfsError as error:
            self._lost(error)

    def _lost(self, why: object, cannot: str = "") -> None:
        self.kill()
        # One step behind those of a takeover, where somebody waits.
        self.attempt.refused(why, ahead=1, cannot=cannot)

    def take_over(self, serving: Serving, reason: str, pause: Callable[[float], None]) -> None:
        """Let the standby serve in place of a worker that has ended; where there is none, or it fails, new ones.

        ``pause`` waits for some seconds.  It raises EndWantedError when nobody is to serve any more, and
        ConnectionAbortedError when the mount has ended, and so does this.
        """
        state = serving.state
        begin = time.monotonic()
        state.last_reason = reason
        log.warning("worker %d ended with %s: another one takes over", state.worker, reason)
        failures, refusing = 0, serving.refusing
        while True:
            pause(backoff(failures))
            worker: Child | None = None
            try:
                worker = self._take(state.command)
                stall = serving.let_serve(worker, begin)
                refusing.end()
                log.info("worker %d serves after %.1f ms", worker.pid, stall * 1000)
                break
            except ConnectionAbortedError:
                serving.worker = worker  # which sees the end of the mount too
                break
            except EndWantedError:
                if worker is not None:
                    worker.kill()
                raise
            except (PkernfsError, OSError, MemoryError) as error:
                failures += 1
                self.takeover.refused(error)
                refusing.note(error, serving.device)
                self._give_up(worker, error)
        self.takeover.succeeded()

    def _take(self, command: Sequence[str]) -> Child:
        """The standby, which is none any more; a new worker where there is none.  Raises ResourceError."""
        worker, self.worker = self.worker, None
        return worker or self._make(command)

    def _give_up(self, worker: Child | None, error: Exception) -> None:
        """End a worker that could not take over; what was told nothing yet is still a standby."""
        if worker is None:
            return
        if isinstance(error, ResourceError) and not worker.told and self.worker is None:
            self.worker = worker
            return
        if isinstance(error, WorkerStuckError):
            kill_stuck(worker, "it did not answer")
        worker.kill()

    def kill(self) -> None:
        """End it, and its template."""
        self._end()
        self._end_template()

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker = None

    def _end_template(self) -> None:
        if self.template is not None:
            self.template.kill()
            self.template = None
