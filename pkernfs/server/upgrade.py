"""Another program for the workers of a mount: started, checked, on probation, and given up if it fails."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from pkernfs.errors import PkernfsError, UsageError
from pkernfs.server.child import Child
from pkernfs.server.commands import Command
from pkernfs.server.stats import BUGS

if TYPE_CHECKING:
    from pkernfs.server.keeper import Keeper

log = logging.getLogger("pkernfs")

CHECK = 20.0  #: seconds that the new worker may take to look at the region
PROBATION = 5.0  #: seconds


class UpgradeError(PkernfsError):
    """The new version cannot serve."""


class Upgrade:
    """One upgrade.  ``command``: with "command", and "probation" in seconds if that is not the usual time."""

    def __init__(self, keeper: Keeper, command: Command) -> None:
        program, probation = command.request.get("command"), command.request.get("probation", PROBATION)
        if not isinstance(program, list) or not program or not all(isinstance(word, str) for word in program):
            raise UsageError(f'"command": expected a list of words, found {program!r}')
        if not isinstance(probation, (int, float)) or not 0 <= probation <= 3600:
            raise UsageError(f'"probation": expected seconds, found {probation!r}')
        self.keeper = keeper
        self.command = command
        self.program = program
        self.probation = float(probation)
        self.worker = Child(program)
        self.until = 0.0  #: end of the probation; 0.0: it does not serve yet
        self.bugs = 0
        self.before: dict[str, Any] = {}
        log.info("upgrade: starting %s", " ".join(program))

    @property
    def serving(self) -> bool:
        """Whether the new worker serves."""
        return self.until > 0

    def spoke(self) -> None:
        """The new worker is up, or has ended: let it serve if it can read the region."""
        keeper, state = self.keeper, self.keeper.state
        try:
            self.worker.up(0)
            self.worker.send({"verb": "check", "state": state.to_json()}, [keeper.fds.region])
            self.worker.receive(CHECK)
        except PkernfsError as error:
            self.worker.kill()
            self.fail(str(error))
            return
        begin = time.monotonic()
        self.bugs = keeper.stats[BUGS]
        self.before = {"version": state.version, "longest_stall": state.longest_stall}
        state.longest_stall = 0.0
        state.last_reason = "upgrade"
        keeper.drain()
        try:
            keeper.let_serve(self.worker, begin)
        except ConnectionAbortedError:
            keeper.worker = self.worker  # which sees the end of the mount too
        except (PkernfsError, OSError) as error:
            self.worker.kill()
            self.fail(str(error))
            keeper.take_over(f"an upgrade that failed: {error}")
            return
        self.until = time.monotonic() + self.probation

    def look(self) -> None:
        """How the new worker is doing; at the end, its program is that of those to come."""
        keeper, state = self.keeper, self.keeper.state
        if keeper.stats[BUGS] != self.bugs:
            self.fail("the new worker could not answer a request, see the log")
            keeper.drain()
            keeper.take_over("an upgrade that failed")
        elif time.monotonic() >= self.until:
            state.command = self.program
            stall = state.longest_stall
            state.longest_stall = max(stall, self.before["longest_stall"])
            keeper.upgrade = None
            keeper.standby.kill()
            keeper.tell()
            log.info("upgrade: version %s serves in place of %s", state.version, self.before["version"])
            self.command.answer(
                {"from": self.before["version"], "to": state.version, "worker": state.worker, "longest_stall": stall}
            )

    def fail(self, why: str) -> None:
        """Tell that the version of before goes on."""
        self.keeper.upgrade = None
        log.error("upgrade: %s: the version of before goes on", why)
        self.command.refuse(UpgradeError(f"{why}: the version of before goes on"))
