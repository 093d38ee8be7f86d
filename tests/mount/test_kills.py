"""kill -9 of the server at random moments under a mixed load: what had returned is there, and the region is sound.

The long form: tests/run -m slow -k kills --kills=200 --kill-seed=1

A round's seed decides the calls of every worker and the moment of the kill; a failure names it, and
``--kills=1 --kill-seed=SEED`` is that round alone.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pkernfs.fs.journal import Journal
from pkernfs.region import open_region, read_superblock
from tests.mount.load import Load
from tests.mount.model import KINDS, Call, Found, Model
from tests.mount.site import Site

WORKERS = 4


class Moment(NamedTuple):
    """When the server is killed.

    After so many calls, within a call of this kind ("": any), within a transaction that is committed and not
    checkpointed, or after a delay.
    """

    calls: int
    within: str
    committed: bool
    delay: float  #: seconds

    @classmethod
    def of(cls, seed: int) -> Moment:
        """The moment that belongs to a seed."""
        rng = random.Random(seed)
        calls = int(2 ** rng.uniform(5, 10.5))
        delay = rng.choice([0.0, rng.uniform(0, 300e-6), rng.uniform(0, 5e-3)])
        return cls(calls, rng.choice(["", *KINDS]), rng.random() < 0.25, delay)


class Rounds:
    """Rounds of load and kill on one region, each beside the tree that the round before left."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.before: Load | None = None
        self.calls = 0  #: that had returned and were found
        with open_region(str(site.region), readonly=True, locked=False) as region:
            at = Journal(region, read_superblock(region)).header_at
        with site.region.open("rb") as file:
            page = mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=at, prot=mmap.PROT_READ)
        self.commit_record = memoryview(page).cast("Q")
        self.replayed = 0  #: rounds that ended in a transaction which the next mount finished

    def stop_within_transaction(self, server: int) -> None:
        """Stop the server at random moments until a transaction is committed and not checkpointed.

        Each is so for microseconds only.
        """
        for _ in range(400):
            os.kill(server, signal.SIGSTOP)
            while Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                pass
            if self.commit_record[0] & 1:
                return
            os.kill(server, signal.SIGCONT)

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
            if moment.committed:
                self.stop_within_transaction(servers[-1])
            site.kill(servers)
            load.end()
        checked = site.run_ok("fsck.pkernfs", "-n", site.region)
        assert ": clean, " in checked, f"seed {seed}: {checked}"
        site.mount()
        self.replayed += "replayed the journal" in site.said
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
    for seed in range(5):
        rounds.round(seed)
    assert rounds.calls > 5 * 32


def test_a_seed_is_one_load() -> None:
    """The same seed gives the same calls and the same moment; another gives others."""

    def calls(seed: int) -> list[Call]:
        model, rng = Model(), random.Random(seed)
        made = []
        for _ in range(500):
            made.append(model.choose(rng))
            model.apply(made[-1])
        return made

    assert calls(1) == calls(1) != calls(2)
    assert Moment.of(1) == Moment.of(1) != Moment.of(2)
    assert {call[0] for seed in range(4) for call in calls(seed)} == set(KINDS)


@pytest.mark.parametrize(
    ("data", "fine"),
    [
        pytest.param(b"oldoldold", True, id="not-begun"),
        pytest.param(b"oldnewnew!", True, id="done"),
        pytest.param(b"oldnewold", True, id="beginning"),
        pytest.param(b"oldnldnew", True, id="any-mix"),
        pytest.param(b"oldnewnew", True, id="not-grown-yet"),
        pytest.param(b"oldnewxew", False, id="other-bytes"),
        pytest.param(b"newnewnew", False, id="elsewhere"),
        pytest.param(b"oldoldol", False, id="shorter"),
        pytest.param(b"oldoldold\0", False, id="grown-without-content"),
        pytest.param(b"oldnewnew!!", False, id="too-long"),
    ],
)
def test_what_a_write_that_did_not_return_may_leave(data: bytes, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.mount.model.content", lambda *_: b"newnew!")
    model = Model()
    model.apply(["create", "f", 0o644])
    model.nodes["f"].data[:] = b"oldoldold"
    found = Found()
    found.rows["f"] = {"mode": "0o100644", "xattrs": {}, "nlink": 1, "data": data}
    found.links = [["f"]]
    settled, troubles = found.settle(model, ["write", "f", 3, 7, 0])
    assert (troubles == []) == fine
    if fine:
        assert found.differences(settled) == []


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
    faulthandler.cancel_dump_traceback_later()  # that of one test of ordinary length
    first, kills = pytestconfig.getoption("--kill-seed"), pytestconfig.getoption("--kills")
    for seed in range(first, first + kills):
        rounds.round(seed)
    with capsys.disabled():
        print(
            f"\n{kills} kills survived from seed {first} on ({rounds.replayed} within a committed transaction); "
            f"{rounds.calls} calls that had returned were found"
        )
