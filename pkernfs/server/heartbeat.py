"""Whether the worker of a mount still answers: it gets a heartbeat every second, and requests must not wait."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import suppress

from pkernfs.errors import printable
from pkernfs.server.child import Child, WorkerGoneError
from pkernfs.server.device import Device
from pkernfs.server.messages import Pulse
from pkernfs.server.resources import ResourceError

log = logging.getLogger("pkernfs")

BEAT = 1.0  #: seconds between two checks, at most
DUMP = 1.0  #: seconds that writing its stacks may take


class Heartbeat:
    """Of one worker.  Three signs, since each alone is deceived.

    No answer to a heartbeat: nothing runs.  A request that is not answered: everything else runs, one handler waits for
    ever.  A request that is not read: pyfuse3's own tasks are gone, while the task that answers heartbeats is there.
    """

    patience = 4 * BEAT  #: seconds without an answer after which it is lost

    def __init__(self, worker: Child, device: Device) -> None:
        self.worker = worker
        self.device = device
        self._sent = self._received = time.monotonic()  #: the last heartbeat, and the last answer
        self._checked = self._sent
        self._begun = -1  #: requests that the worker has read so far
        self._waiting = (self._sent, -1)  #: since when a request waits to be read, and how many had been read then
        self._oldest = 0.0  #: seconds that a request has been at work

    @property
    def interval(self) -> float:
        """Seconds between two checks."""
        return min(BEAT, self.patience / 4)

    def on_answer(self, message: Pulse) -> None:
        """The worker's answer."""
        self._received = time.monotonic()
        self._begun = message["begun"]
        self._oldest = message["oldest"]

    def check(self) -> str:
        """Send the next heartbeat when it is time; "", or why the worker is lost."""
        now = time.monotonic()
        if now - self._checked > 2 * BEAT + self.interval:
            # The keeper itself stood still, or waited for something: nothing is known of the time in between.
            answered = self._received >= self._sent
            self._sent = now - self.interval
            self._received = self._sent if answered else self._received
            self._waiting = (now, self._begun)
            self._oldest = 0.0
        self._checked = now
        if now - self._sent < self.interval:
            return ""
        with suppress(OSError):  # the mount has ended, or nothing can be told now
            if not self.device.readable() or self._waiting[1] != self._begun:
                self._waiting = (now, self._begun)
        if self._received >= self._sent:
            self._sent = now
            try:
                self.worker.send({"verb": "beat"})
            except ResourceError:  # it was not asked, and need not answer
                self._received = now
            except WorkerGoneError:
                pass
        for since, what in (
            (now - self._sent, "it has not answered a heartbeat"),
            (self._oldest, "it has not answered a request"),
            (now - self._waiting[0], "it has not read a request that waits"),
        ):
            if since > self.patience:
                return f"{what} for {since:.1f} s"
        return ""


def kill_stuck(worker: Child, why: str) -> None:
    """Kill a worker that serves no more, and log where it stands."""
    log.error("killing worker %d: %s", worker.pid, why)
    with suppress(OSError), open(f"/proc/{worker.pid}/stack", "rb") as file:
        calls = [printable(line.rpartition(b" ")[2]) for line in file.read().split(b"\n") if line]
        log.error("worker %d in the kernel: %s", worker.pid, " < ".join(calls))
    # faulthandler writes Python's stacks, if the process still runs at all; into a memfd of the worker's own, since the
    # log's lock may be what it hangs on.
    worker.signal(signal.SIGCONT)
    worker.signal(signal.SIGUSR1)
    stacks_fd = worker.facts["stacks"] if worker.facts else -1
    with (
        suppress(OSError),
        open(f"/proc/{worker.pid}/fd/{stacks_fd}", encoding="utf-8", errors="backslashreplace") as file,
    ):
        end = time.monotonic() + DUMP
        while not (stacks := file.read()) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.01)
        log.error("worker %d in Python:\n%s", worker.pid, stacks + file.read())
    worker.signal(signal.SIGKILL)
