"""Another program for the workers of a mount: started, checked, on probation, and given up if it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from pkernfs.errors import PkernfsError, UsageError
from pkernfs.server.child import Child
from pkernfs.server.orders import Order
from pkernfs.server.state import State

log = logging.getLogger("pkernfs")

CHECK = 20.0  #: seconds that the new worker may take to look at the region
PROBATION = 5.0  #: seconds


class UpgradeError(PkernfsError):
    """The new version cannot serve."""


class Upgrade:
    """One upgrade.  ``order``: with "command", and "probation" in seconds if that is not the usual time."""

    def __init__(self, order: Order, old: Sequence[str]) -> None:
        command, probation = order.request.get("command"), order.request.get("probation", PROBATION)
        if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
            raise UsageError(f'"command": expected a list of words, found {command!r}')
        if not isinstance(probation, (int, float)) or not 0 <= probation <= 3600:
            raise UsageError(f'"probation": expected seconds, found {probation!r}')
        self.order = order
        self.command = command
        self.probation = float(probation)
        self.worker = Child(command)
        self.until = 0.0  #: end of the probation; 0.0: it does not serve yet
        self.bugs = 0
        self.before: dict[str, Any] = {}
        log.info("upgrade: starting %s", " ".join(command))

    @property
    def serving(self) -> bool:
        """Whether the new worker serves."""
        return self.until > 0

    def check(self, state: State, region_fd: int) -> None:
        """Whether the new worker, which has said that it is up, can read the region.  Raises PkernfsError."""
        self.worker.up(0)
        self.worker.send({"verb": "check", "state": state.to_json()}, [region_fd])
        self.worker.receive(CHECK)

    def begin(self, state: State, bugs: int) -> None:
        """From now on the new worker serves."""
        self.until = time.monotonic() + self.probation
        self.bugs = bugs
        self.before = {"version": state.version, "worker": state.worker, "longest_stall": state.longest_stall}
        state.longest_stall = 0.0

    def fail(self, why: str) -> None:
        """Tell that the worker of before goes on."""
        log.error("upgrade: %s: the version of before goes on", why)
        self.order.refuse(UpgradeError(f"{why}: the version of before goes on"))

    def succeed(self, state: State) -> None:
        """Tell that the new version serves."""
        stall = state.longest_stall
        state.longest_stall = max(stall, self.before["longest_stall"])
        log.info("upgrade: version %s serves in place of %s", state.version, self.before["version"])
        self.order.answer(
            {"from": self.before["version"], "to": state.version, "worker": state.worker, "longest_stall": stall}
        )
