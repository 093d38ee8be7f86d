"""Whether the worker of a mount still answers: it is asked every second, and the mount itself is looked at."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import suppress
from typing import Any

from pkernfs.server.child import Child, WorkerGoneError
from pkernfs.server.device import Device

log = logging.getLogger("pkernfs")

BEAT = 1.0  #: seconds between two looks, at most
DUMP = 1.0  #: seconds that writing its stacks may take


class Heartbeat:
    """Of one worker."""

    patience = 4 * BEAT  #: seconds without an answer after which it is lost

    def __init__(self, worker: Child, device: Device) -> None:
        self.worker = worker
        self.device = device
        self.asked = self.answered = time.monotonic()
        self.begun = -1  #: requests that the worker has read so far
        self.waiting = (self.asked, -1)  #: since when a request waits to be read, and how many had been read then
        self.oldest = 0.0  #: seconds that a request has been at work

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(BEAT, self.patience / 4)

    def heard(self, message: dict[str, Any]) -> None:
        """The worker's answer."""
        self.answered = time.monotonic()
        self.begun = message["begun"]
        self.oldest = message["oldest"]

    def lost(self) -> str:
        """Ask again when it is time; "", or in what way the worker does not answer any more."""
        now = time.monotonic()
        if now - self.asked < self.interval:
            return ""
        with suppress(ConnectionAbortedError):
            if not self.device.readable() or self.waiting[1] != self.begun:
                self.waiting = (now, self.begun)
        if self.answered >= self.asked:
            self.asked = now
            with suppress(WorkerGoneError):
                self.worker.send({"verb": "beat"})
        for since, what in (
            (now - self.asked, "has not said anything"),
            (self.oldest, "has a request that it has not answered"),
            (now - self.waiting[0], "has not read a request that waits"),
        ):
            if since > self.patience:
                return f"{what} for {since:.1f} s"
        return ""


def end_stuck(worker: Child, why: str) -> None:
    """End a worker that serves no more, with its stacks in the log."""
    log.error("worker %d %s: it is ended", worker.pid, why)
    with suppress(OSError), open(f"/proc/{worker.pid}/stack", encoding="ascii", errors="replace") as file:
        log.error("worker %d in the kernel: %s", worker.pid, " < ".join(line.split()[-1] for line in file))
    # faulthandler writes Python's stacks there, if the process still runs at all.
    worker.signal(signal.SIGCONT)
    worker.signal(signal.SIGUSR1)
    with suppress(OSError), open(f"/proc/{worker.pid}/fd/{worker.facts.get('stacks', -1)}", encoding="utf-8") as file:
        end = time.monotonic() + DUMP
        while not (stacks := file.read()) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.01)
        log.error("worker %d in Python:\n%s", worker.pid, stacks + file.read())
    worker.signal(signal.SIGKILL)
