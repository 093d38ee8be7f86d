"""The worker that waits: it has imported everything, so that a takeover costs milliseconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from pkernfs.errors import PkernfsError
from pkernfs.server.child import Child

log = logging.getLogger("pkernfs")

#: Seconds before the next try, by tries that failed one after the other.
BACKOFF = (0.0, 0.02, 0.1, 0.5, 2.0, 10.0)


def backoff(failures: int) -> float:
    """Seconds before the next try."""
    return BACKOFF[min(failures, len(BACKOFF) - 1)]


class Standby:
    """The standby of one mount, if there is one at the moment."""

    def __init__(self) -> None:
        self.worker: Child | None = None
        self.failures = 0
        self.after = 0.0  #: when the next one may be started

    @property
    def pid(self) -> int:
        """Its process id; 0: there is none."""
        return self.worker.pid if self.worker is not None else 0

    def look_after(self, command: Sequence[str]) -> None:
        """See to it that there is one."""
        if self.worker is None and time.monotonic() >= self.after:
            self.worker = Child(command)

    def spoke(self) -> None:
        """It is up, or has ended."""
        assert self.worker is not None
        try:
            if self.worker.facts:  # it has nothing more to say: it has ended
                self.worker.receive(0)
            self.worker.up(0)
            self.failures = 0
        except PkernfsError as error:
            log.error("standby: %s", error)
            self.kill()
            self.failures += 1
            self.after = time.monotonic() + backoff(self.failures + 1)

    def take(self, command: Sequence[str]) -> Child:
        """The standby, which is none any more; a new worker where there is none."""
        worker, self.worker = self.worker, None
        return worker or Child(command)

    def kill(self) -> None:
        """End it."""
        if self.worker is not None:
            self.worker.kill()
            self.worker = None
