"""The phases of a keeper, and what an upgrade decides, without a mount."""

from __future__ import annotations

import logging
import select
import sys
from typing import Any, cast

import pytest

from pkernfs import api
from pkernfs.errors import PkernfsError
from pkernfs.options import MountOptions
from pkernfs.server.commands import Command
from pkernfs.server.phase import NEXT, Life, Phase, PhaseError
from pkernfs.server.state import State
from pkernfs.server.upgrade import Action, Upgrade

OVER = {Phase.ENDED, Phase.HANDED_OVER}


def reachable(phase: Phase) -> set[Phase]:
    """The phases that can come after one, sooner or later."""
    found: set[Phase] = set()
    new = {phase}
    while new:
        new = {following for one in new for following in NEXT[one]} - found
        found |= new
    return found


def test_every_phase_is_entered_and_ends() -> None:
    assert set(NEXT) == set(Phase)
    assert reachable(Phase.STARTING) == set(Phase) - {Phase.STARTING}
    for phase in Phase:
        assert bool(NEXT[phase]) == (phase not in OVER)
        assert phase in OVER or OVER & reachable(phase)
        assert phase.value


def test_a_phase_that_cannot_follow(caplog: pytest.LogCaptureFixture) -> None:
    """The error names both; what happened is in the log."""
    life = Life("/mnt", Phase.STARTING)
    caplog.set_level(logging.INFO)
    life.enter(Phase.SERVING)
    life.enter(Phase.UPGRADING)
    with pytest.raises(PhaseError) as caught:
        life.enter(Phase.STARTING)
    assert life.phase is Phase.UPGRADING
    for phase in (Phase.UPGRADING, Phase.STARTING):
        assert f"{phase.value} ({phase.name})" in str(caught.value)
    assert [record.getMessage() for record in caplog.records] == [
        "keeper of /mnt: STARTING -> SERVING",
        "keeper of /mnt: SERVING -> UPGRADING",
    ]


class Client:
    """Stands in for a Command: what it was told."""

    def __init__(self) -> None:
        self.error: PkernfsError | None = None
        self.result: object = None

    def answer(self, result: object) -> None:
        """Done."""
        self.result = result

    def refuse(self, error: PkernfsError) -> None:
        """Not done."""
        self.error = error


def upgrade(client: Client, program: list[str], probation: float) -> Upgrade:
    request: Any = api.Upgrade(command=program, probation=probation)
    return Upgrade(cast(Command, client), request)


def test_decisions_about_a_worker_that_does_not_start() -> None:
    client = Client()
    one = upgrade(client, [sys.executable, "-c", ""], 1.0)
    assert select.select([one.worker.socket], [], [], 60)[0]
    decision = one.check_worker(State("/region", "/mnt", MountOptions(), []), -1)
    assert decision.action is Action.FALL_BACK
    assert "has ended" in decision.why
    one.worker.kill()
    one.fail(decision.why)
    assert "has ended" in str(client.error)
    assert client.result is None


def test_decisions_on_probation() -> None:
    """A bug before it served is not the new worker's; one after is; and it ends."""
    client = Client()
    one = upgrade(client, ["true"], 1000.0)
    one.begin("old", 3)
    one.start_probation(0.5)
    assert one.check_probation(3).action is Action.WAIT
    assert one.check_probation(4).action is Action.FALL_BACK
    one.probation = 0.0
    one.start_probation(0.5)
    assert one.check_probation(3).action is Action.COMMIT
    one.succeed(State("/region", "/mnt", MountOptions(), [], version="new"))
    assert isinstance(client.result, api.Upgraded)
    assert (client.result.before, client.result.after, client.result.longest_stall) == ("old", "new", 0.5)
    one.worker.kill()
