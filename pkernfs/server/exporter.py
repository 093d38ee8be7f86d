"""The process that gives the metrics of a mount to Prometheus, where the mount asks for it (-o metrics=)."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

log = logging.getLogger("pkernfs")

AGAIN = 10.0  #: seconds before the next try


class Exporter:
    """`pkernfs metrics` for the mount at ``mountpoint``; ``where``: [ADDRESS:]PORT or an absolute path, "": nowhere."""

    def __init__(self, mountpoint: str, where: str) -> None:
        option = "--file" if where.startswith("/") else "--port"
        code = "import sys; from pkernfs.cli import main; sys.exit(main())"
        self.command = [sys.executable, "-P", "-c", code, "metrics", option, where, "--", mountpoint] if where else []
        self.process: subprocess.Popen[bytes] | None = None
        self.after = 0.0

    def look_after(self) -> None:
        """Start it when it does not run."""
        if not self.command or time.monotonic() < self.after:
            return
        if self.process is not None and (status := self.process.poll()) is not None:
            log.error("the metrics ended with status %d: %s", status, " ".join(self.command[4:]))
            self.process = None
            self.after = time.monotonic() + AGAIN
        elif self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, cwd="/")

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
