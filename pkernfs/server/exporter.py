"""The process that gives the metrics of a mount to Prometheus, where -o metrics= is set.

A process of its own: prometheus_client takes 14 MB and a thread, which a keeper is to do without.
"""

from __future__ import annotations

import logging
import subprocess
import time

from pkernfs.server.child import python_command

log = logging.getLogger("pkernfs")

AGAIN = 10.0  #: seconds before the next try


class Exporter:
    """`pkernfs metrics` for the mount at ``mountpoint``; ``where``: [ADDRESS:]PORT or an absolute path, "": nowhere."""

    def __init__(self, mountpoint: str, where: str) -> None:
        option = "--file" if where.startswith("/") else "--port"
        self._arguments = ["metrics", option, where, "--", mountpoint] if where else []
        self._process: subprocess.Popen[bytes] | None = None
        self._after = 0.0

    def ensure(self) -> None:
        """Start it when it does not run."""
        if not self._arguments or time.monotonic() < self._after:
            return
        if self._process is not None and (status := self._process.poll()) is not None:
            log.error("the metrics ended with status %d: %s", status, " ".join(self._arguments))
            self._process = None
            self._after = time.monotonic() + AGAIN
        elif self._process is None:
            # By the module's name, not the path of the script: that is not known to a keeper that a worker has started.
            command = python_command("pkernfs.cli", *self._arguments)
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd="/")

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
