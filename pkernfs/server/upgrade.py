"""Another program for the workers of a mount: checked, on probation, and given up if it fails.

An upgrade only decides; the keeper acts (keeper.py), which alone knows who serves at the moment.
"""

from __future__ import annotations

import enum
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import PkernfsError
from pkernfs.server.child import START, Child, Readable, WorkerStuckError
from pkernfs.server.messages import Checked
from pkernfs.server.resources import ResourceError, readable
from pkernfs.server.state import State

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.server.commands import Command

log = logging.getLogger("pkernfs")

CHECK = 20.0  #: seconds that the new worker may take to read the region


class UpgradeError(PkernfsError):
    """The new version cannot serve."""


class Action(enum.Enum):
    """What a keeper is to do for an upgrade; the value is the sentence for its reader."""

    WAIT = "nothing yet"
    SERVE = "drain the worker that serves, and let the new one serve"
    FALL_BACK = "end the new worker, and let one of the previous version serve"
    COMMIT = "start workers of the new version from now on"


class Decision(NamedTuple):
    """``why``: the reason for FALL_BACK."""

    action: Action
    why: str = ""


class Upgrade:
    """One upgrade, as ``request`` has it.  ``command`` is answered at its end.

    ``readable``: how workers are waited for.  Raises ResourceError when the new worker cannot be started.
    """

    def __init__(self, command: Command, request: api.Upgrade, readable: Readable = readable) -> None:
        self.command = command
        self.program = request.command
        self.probation = request.probation
        self._previous = ""  #: version that the new one takes the place of
        self._stall = 0.0  #: seconds in which nobody served
        self._end = 0.0  #: of the probation
        self._bugs = 0  #: requests that had failed in a bug before it served
        self._checking = False  #: it is up, and was asked whether it can read the region
        self.worker = Child(request.command, readable=readable)
        self._deadline = time.monotonic() + START  #: of what it does before it serves
        log.info("upgrade: starting %s", " ".join(request.command))

    def check_worker(self, state: State, region_fd: int) -> Decision:
        """To be called when the new worker has sent something, or has ended: whether it can read the region."""
        try:
            if self._checking:
                self.worker.receive(Checked, 0)
                return Decision(Action.SERVE)
            self.worker.wait_until_up(0)
            self.worker.send({"verb": "check", "state": state.to_json()}, [region_fd])
        except (WorkerStuckError, ResourceError):  # nothing could be read or sent now
            return Decision(Action.WAIT)
        except PkernfsError as error:
            return Decision(Action.FALL_BACK, str(error))
        self._checking = True
        self._deadline = time.monotonic() + CHECK
        return Decision(Action.WAIT)

    def check_deadline(self) -> Decision:
        """To be called all the time until it serves: it may hang."""
        if time.monotonic() < self._deadline:
            return Decision(Action.WAIT)
        what = f"read the region within {CHECK:g} s" if self._checking else f"start within {START:g} s"
        return Decision(Action.FALL_BACK, f"the new worker {self.worker.pid} did not {what}")

    def begin(self, version: str, bugs: int) -> None:
        """It is about to serve in place of a version; so many requests have failed in a bug by now."""
        self._previous, self._bugs = version, bugs

    def start_probation(self, stall: float) -> None:
        """It serves, after nobody did for ``stall`` seconds."""
        self._stall = stall
        self._end = time.monotonic() + self.probation

    def check_probation(self, bugs: int) -> Decision:
        """How the new worker is doing; ``bugs``: how many requests have failed in a bug by now."""
        if bugs != self._bugs:
            return Decision(Action.FALL_BACK, "the new worker could not answer a request, see the log")
        return Decision(Action.COMMIT if time.monotonic() >= self._end else Action.WAIT)

    def succeed(self, state: State) -> None:
        """Answer the client: the new version serves."""
        from pkernfs import api

        log.info("upgrade: version %s serves in place of %s", state.version, self._previous)
        self.command.answer(
            api.Upgraded(before=self._previous, after=state.version, worker=state.worker, longest_stall=self._stall)
        )

    def fail(self, why: str) -> None:
        """Answer the client: the new version does not serve."""
        log.error("upgrade: %s", why)
        self.command.refuse(UpgradeError(why))
