"""A guest goes on while the processes of the mount that its memory lies on are killed below it."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from live_update import MODES, LiveUpdate, Report

from pkernfs import client
from pkernfs.api import to_builtins
from pkernfs.qemu.console import CHUNKS, parse
from tests.mount.site import Site, run, wait_for
from tests.mount.site import site as made_site

pytestmark = [
    pytest.mark.guest,
    pytest.mark.mount,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting without fusermount3 needs root"),
]

MIB = 1 << 20
KILLS = 20
MEMORY = 192 * MIB
BUFFER = 32  #: MiB that the guest writes over and over
ROUND = re.compile(r"^PKERNFS-GUEST boot_id=\S+ round=(\d+) sum=", re.MULTILINE)
TAKEOVER = re.compile("takes over|takeover failed|keeper of .* was gone")


class Ticks(threading.Thread):
    """Notes when each tick of the guest was first seen."""

    def __init__(self, update: LiveUpdate) -> None:
        super().__init__(daemon=True)
        self.console = update.guest.console
        self.seen: list[float] = []
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.002):
            now = time.monotonic()
            self.seen += [now] * (self.console.text().count(" count=") - len(self.seen))

    def gaps(self, since: float) -> list[float]:
        """Seconds between ticks, of those after the time ``since``."""
        return [late - early for early, late in pairwise(self.seen) if late >= since]


class Sync(threading.Thread):
    """One fsync of a file, by another thread."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file = file
        self.begun = threading.Event()
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        fd = os.open(self.file, os.O_RDONLY)
        self.begun.set()
        try:
            os.fsync(fd)
        except OSError as error:
            self.error = error
        finally:
            os.close(fd)


@pytest.fixture
def site(images: Path) -> Iterator[Site]:  # noqa: ARG001  # it skips
    """A mounted region; after the test it is unmounted, checked and deleted."""
    with made_site(size="512M") as made:
        made.expected = TAKEOVER
        made.mount()
        yield made


@pytest.fixture
def update(site: Site, images: Path, mode: str) -> Iterator[LiveUpdate]:
    """A guest that counts and that writes and verifies its buffer."""
    update = LiveUpdate(site, mode, MEMORY, images, Report())
    machine = update.guest.machine
    update.guest.machine = machine._replace(append=f"{machine.append} pkernfs_buffer={BUFFER}")
    try:
        update.boot()
        yield update
    finally:
        update.close()


def status(site: Site) -> dict[str, Any]:
    """What `pkernfs status --json` shows, without the processor time of a command that the guest would miss."""
    found: dict[str, Any] = to_builtins(client.status(str(site.mnt)))
    return found


def tick(update: LiveUpdate) -> int:
    beat = update.guest.console.last()
    assert beat is not None
    return beat.tick


def rounds(update: LiveUpdate) -> int:
    """How often the guest has verified its buffer."""
    return max(map(int, ROUND.findall(update.guest.console.text())), default=0)


def kill_worker(site: Site, update: LiveUpdate, rng: random.Random) -> bool:
    """kill -9 while the guest's memory is written back; whether that had not ended."""
    before = status(site)
    sync = Sync(update.ram)
    sync.begun.wait()
    time.sleep(rng.uniform(0, 0.002))
    os.kill(before["worker"], signal.SIGKILL)
    under_way = sync.is_alive()
    sync.join()
    assert sync.error is None
    wait_for(lambda: status(site)["takeovers"] > before["takeovers"], "a takeover")
    return under_way


def kill_keeper(site: Site) -> None:
    """kill -9 of the keeper alone; the worker starts another one."""
    before = status(site)
    os.kill(before["keeper"], signal.SIGKILL)
    wait_for(lambda: status(site)["keepers"] > before["keepers"], "another keeper")
    assert status(site)["worker"] == before["worker"]


@pytest.mark.parametrize("mode", MODES)
def test_guest_goes_on_through_kills(
    mode: str, site: Site, update: LiveUpdate, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers 20 times, and once their keeper; with the direct map everything at last."""
    rng = random.Random(mode)
    ticks = Ticks(update)
    guest = update.guest
    guest.wait(tick(update) + 2 * CHUNKS)
    killing = time.monotonic()
    calm = ticks.gaps(0)
    under_way = 0
    for kill in range(KILLS):
        if kill == KILLS // 2:
            kill_keeper(site)
        guest.wait(tick(update) + rng.randrange(1, 3))
        under_way += kill_worker(site, update, rng)
    guest.wait(tick(update) + CHUNKS)
    facts = status(site)
    assert facts["takeovers"] == KILLS
    assert facts["keepers"] == 2
    if mode == "path":
        assert under_way > KILLS // 2
    else:
        site.crash()
        # More than it had under way: nobody is there who could end a stall.
        guest.wait(tick(update) + 2 * CHUNKS)
        verified = rounds(update)
        wait_for(lambda: rounds(update) > verified, "a round with no server")
        assert site.servers() == []
        site.detach()
        site.mount()
        guest.wait(tick(update) + CHUNKS)
    gaps = ticks.gaps(killing)
    ticks.done.set()

    # What was written back by all of these workers is what another QEMU finds.
    update.restart()
    verified = rounds(update)
    wait_for(lambda: rounds(update) > verified, "another round")
    verified = rounds(update)
    beats = list(parse(guest.console.text()))
    assert len({beat.boot_id for beat in beats}) == 1
    assert [beat.tick for beat in beats] == list(range(1, len(beats) + 1))
    update.close()
    site.umount()
    checked = run("fsck.pkernfs", "-n", site.region)
    assert checked.returncode == 0, checked

    with capsys.disabled():
        print(
            f"\n{mode}: ticks every {median(calm):.3f} s ({max(calm):.3f} at most) before, "
            f"{median(gaps):.3f} ({max(gaps):.3f} at most) through {KILLS} kills, {under_way} within an fsync; "
            f"longest stall of the mount {facts['longest_stall']:.3f} s; buffer verified {verified} times"
        )
