"""kill -9 of the server at random moments under a mixed load: what had returned is there, and the region is sound.

The long form: tests/run -m slow -k kills --kills=200 --kill-seed=1

A round's seed decides the calls of every worker and the moment of the kill; a failure names it, and
``--kills=1 --kill-seed=SEED`` is that round alone.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.mount.load import Load
from tests.mount.model import KINDS
from tests.mount.site import Site

WORKERS = 4


class Moment(NamedTuple):
    """When the server is killed: after so many calls, within a call of this kind ("": any), after a delay."""

    calls: int
    within: str
    delay: float  #: seconds

    @classmethod
    def of(cls, seed: int) -> Moment:
        """The moment that belongs to a seed."""
        rng = random.Random(seed)
        calls = int(2 ** rng.uniform(5, 10.5))
        return cls(calls, rng.choice(["", *KINDS]), rng.choice([0.0, rng.uniform(0, 300e-6), rng.uniform(0, 5e-3)]))


class Rounds:
    """Rounds of load and kill on one region, each beside the tree that the round before left."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.before: Load | None = None
        self.calls = 0  #: that had returned and were found

    def round(self, seed: int) -> None:
        """Load the mount, kill its server, check the region, mount, compare."""
        site = self.site
        moment = Moment.of(seed)
        servers = site.servers()
        assert servers
        with Load(site.mnt / f"round{seed}", seed, site.shm / f"journals{seed}", WORKERS) as load:
            load.wait_for(moment.calls, moment.within)
            end = time.perf_counter() + moment.delay
            while time.perf_counter() < end:
                pass
            site.kill(servers)
            load.end()
        checked = site.run_ok("fsck.pkernfs", "-n", site.region)
        assert ": clean, " in checked, f"seed {seed}: {checked}"
        site.mount()
        self.calls += load.verify()
        if self.before is not None:
            self.before.verify_again()
            shutil.rmtree(self.before.grounds[0].top)
        site.verify()
        shutil.rmtree(load.journals)
        self.before = load


@pytest.fixture
def rounds() -> Iterator[Rounds]:
    """A region of 512 MiB, mounted."""
    site = Site(size="512M")
    try:
        site.mount()
        yield Rounds(site)
    finally:
        site.close()


def test_killed_under_load(rounds: Rounds) -> None:
    """A few rounds."""
    for seed in range(6):
        rounds.round(seed)
    assert rounds.calls > 6 * 32


def test_a_server_that_answers_before_it_commits_is_found_out(unmounted: Site) -> None:
    """The verifier's own test: of a region that is sound but behind, it says which calls are lost."""
    unmounted.mount_faulty("late-commit")
    with Load(unmounted.mnt / "load", 1, unmounted.shm / "journals", WORKERS) as load:
        load.wait_for(500)
        unmounted.crash()
        load.end()
    unmounted.mount()
    unmounted.verify()
    with pytest.raises(AssertionError, match=r"seed 1: after \d+ calls:\nworker"):
        load.verify()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_kills(rounds: Rounds, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """As many rounds as --kills says."""
    first, kills = pytestconfig.getoption("--kill-seed"), pytestconfig.getoption("--kills")
    for seed in range(first, first + kills):
        rounds.round(seed)
    with capsys.disabled():
        print(f"\n{kills} kills survived from seed {first} on, {rounds.calls} calls that had returned were found")
