"""The process that gives the metrics of a mount to Prometheus, where -o metrics= is set.

A process of its own: prometheus_client takes 14 MB and a thread, which a keeper is to do without.
"""

from __future__ import annotations

import subprocess
import time

from pkernfs.server.child import python_command
from pkernfs.server.resources import BACKOFF, REFUSALS, Attempt, refusal, reserve

PROVED = 2.0  #: seconds after which it has not failed to start
END = 5.0  #: seconds that it may take to end


class Exporter:
    """`pkernfs metrics` for a region, wherever it is mounted.

    ``where``: [ADDRESS:]PORT or an absolute path, "": nowhere.
    """

    def __init__(self, region: str, where: str) -> None:
        option = "--file" if where.startswith("/") else "--port"
        self._arguments = ["metrics", option, where, "--", region] if where else []
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self.attempt = Attempt("metrics")

    def ensure(self) -> None:
        """Start it when it does not run."""
        if not self._arguments:
            return
        if self._process is not None and (status := self._process.poll()) is not None:
            self._process = None
            # The last step at once: what it cannot do (a port that is taken) it could not do a moment later.
            self.attempt.refused(f"ended with status {status}: {' '.join(self._arguments)}", ahead=len(BACKOFF))
        elif self._process is not None:
            if time.monotonic() - self._started > PROVED:
                self.attempt.succeeded()
            return
        if self.attempt.due():
            # By the module's name, not the path of the script: that is not known to a keeper that a worker has started.
            command = python_command("pkernfs.cli", *self._arguments)
            self._started = time.monotonic()
            try:
                self._process = reserve().ask(lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd="/"))
            except REFUSALS as error:
                self.attempt.refused(refusal("its process", error))

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
