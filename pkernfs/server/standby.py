"""The worker that waits: it has imported everything, so that a takeover costs milliseconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from pkernfs.errors import PkernfsError
from pkernfs.server.child import Child, WorkerStuckError
from pkernfs.server.heartbeat import kill_stuck
from pkernfs.server.messages import Pulse
from pkernfs.server.serving import Serving

log = logging.getLogger("pkernfs")

#: Seconds before the next try, by tries that failed one after the other.  The first comes at once: most workers die of
#: something that the next one does not meet, and everybody waits.  The last keeps a mount whose workers cannot start (a
#: package that is just being replaced) from taking a processor, and is short enough for somebody who waits for it.
BACKOFF = (0.0, 0.02, 0.1, 0.5, 2.0, 10.0)


def backoff(failures: int) -> float:
    """Seconds before the next try."""
    return BACKOFF[min(failures, len(BACKOFF) - 1)]


class Standby:
    """The standby of one mount, if there is one at the moment."""

    def __init__(self) -> None:
        self.worker: Child | None = None
        self._failures = 0
        self._after = 0.0  #: when the next one may be started

    @property
    def pid(self) -> int:
        """Its process id; 0: there is none."""
        return self.worker.pid if self.worker is not None else 0

    def ensure(self, command: Sequence[str]) -> None:
        """Start one if there is none."""
        if self.worker is None and time.monotonic() >= self._after:
            self.worker = Child(command)

    def on_message(self) -> None:
        """It is up, or has ended: when it ends again and again, the next one is not started at once."""
        worker = self.worker
        if worker is None:  # a takeover, in the same turn of the keeper's loop, has taken it
            return
        try:
            if worker.facts:  # nothing more comes from it: it has ended
                worker.receive(Pulse, 0)
            worker.wait_until_up(0)
            self._failures = 0
        except PkernfsError as error:
            log.error("standby: %s", error)
            self.kill()
            self._failures += 1
            # One step behind those of a takeover, where somebody waits.
            self._after = time.monotonic() + backoff(self._failures + 1)

    def take_over(self, serving: Serving, reason: str, pause: Callable[[float], bool]) -> bool:
        """Let the standby serve in place of a worker that has ended; where there is none, or it fails, new ones.

        ``pause`` waits for some seconds; it gives False when nobody is to serve any more, and so does this.
        """
        state = serving.state
        begin = time.monotonic()
        state.last_reason = reason
        log.warning("worker %d ended with %s: another one takes over", state.worker, reason)
        failures = 0
        while pause(backoff(failures)):
            worker = self._take(state.command)
            try:
                stall = serving.let_serve(worker, begin)
                log.info("worker %d serves after %.1f ms", worker.pid, stall * 1000)
                return True
            except ConnectionAbortedError:
                serving.worker = worker  # which sees the end of the mount too
                return True
            except (PkernfsError, OSError) as error:
                failures += 1
                log.error("the takeover failed: %s", error)
                if isinstance(error, WorkerStuckError):
                    kill_stuck(worker, "it did not answer")
                worker.kill()
        return False

    def _take(self, command: Sequence[str]) -> Child:
        """The standby, which is none any more; a new worker where there is none."""
        worker, self.worker = self.worker, None
        return worker or Child(command)

    def kill(self) -> None:
        """End it."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None
