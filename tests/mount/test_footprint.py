"""What a mount costs in memory while nobody uses it; tests/bench/footprint.py measures it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from tests.mount.site import MiB, Site, wait_for

#: A mount was above 70 MiB, where each of its processes had memory of its own for all that it imports.
MOST = 60 * MiB
LOADED = 1.5  #: seconds: what a worker loads when nobody has needed it yet is loaded by then


def processes(site: Site) -> list[int]:
    """The keeper, and all that it has."""
    keeper = site.keeper()
    return [keeper, *map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())]


def shares(site: Site) -> dict[int, int]:
    """What each process of a mount has of the host's memory, and of what it shares with others its part; bytes."""
    found = {}
    for pid in processes(site):
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        found[pid] = int(rows["Pss"].split()[0]) * 1024
    return found


def test_an_idle_mount_is_small(site: Site) -> None:
    """Also after takeovers; its standby included."""
    site.expected = re.compile("another one takes over")
    for number in range(3):
        wait_for(lambda: site.status()["standby"], "a standby")
        time.sleep(LOADED)
        found = shares(site)
        assert sum(found.values()) < MOST, found
        if number < 2:
            site.kill([site.worker()])
            site.wait_for_takeovers(number + 1)


def test_nobody_keeps_the_terminal(site: Site) -> None:
    """Whoever reads what mount(8) prints, to its end, waits for all that could print."""
    wait_for(lambda: site.status()["standby"], "a standby")
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for pid in processes(site) for fd in (1, 2)} == {"/dev/null"}


def test_the_template_ends(site: Site) -> None:
    """Another process takes its place; until then there is a standby, and afterwards."""
    site.expected = re.compile("standby: has ended|another one takes over")
    wait_for(lambda: site.status()["standby"], "a standby")
    status = site.status()
    (template,) = {*processes(site)} - {status["keeper"], status["worker"], status["standby"]}
    site.kill([template, status["standby"]])
    wait_for(lambda: site.status()["standby"] not in (0, status["standby"]), "another standby")
    site.kill([status["worker"]])
    site.wait_for_takeovers(1)
    assert (site.mnt / "iommu").is_dir()
