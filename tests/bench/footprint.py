"""What a mount costs in memory while nobody uses it.

    python -m tests.bench.footprint        some seconds; --help

Of each process of the mount its share of the host's memory: what is its own, and of what it shares with others (pages
of libraries, and those that it has in common with the process that it was forked from) its part (Pss of
/proc/PID/smaps_rollup).  All of them together are what a mount costs, whoever else shares with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.bench.report import Report, machine
from tests.bench.systems import GiB, Pkernfs, discard_all
from tests.bench.takeover import activity, status, takeover, wait_for_standby

NOTES = """\
{cpu}, {cores} cores, kernel {kernel}, Python {python}.  MB; medians of {rounds} mounts (least-greatest).
"""

WHO: Final = ("keeper", "template", "worker", "standby")
SETTLED: Final = 1.5  #: seconds: what a worker loads when nobody has needed it yet is loaded by then


def share(pid: int) -> int:
    """Bytes of the host's memory that are a process's."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Pss"].split()[0]) * 1024


def settle(system: Pkernfs) -> dict[str, int]:
    """Wait until all processes of a mount have loaded everything; their ids."""
    wait_for_standby(system)
    facts = status(system)
    pids: dict[str, int] = {who: int(facts[who]) for who in WHO if who in facts}
    children = map(int, Path(f"/proc/{pids['keeper']}/task/{pids['keeper']}/children").read_text().split())
    pids["template"] = next(pid for pid in children if pid not in pids.values())
    time.sleep(SETTLED)
    before = dict.fromkeys(pids, ("", 0))
    while (now := {who: activity(pid) for who, pid in pids.items()}) != before:
        before = now
        time.sleep(0.1)
    return pids


def footprint(system: Pkernfs) -> dict[str, float]:
    """MB of each process of a mount, and of all."""
    shares = {who: share(pid) / 1e6 for who, pid in settle(system).items()}
    return {**shares, "all": sum(shares.values())}


def measure(rounds: int) -> str:
    """Notes and a table."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="pkernfs-bench-", dir="/dev/shm") as scratch:
        systems = [Pkernfs(Path(scratch) / str(number)) for number in range(4)]
        try:
            for system in systems:
                system.prepare(GiB)
            for _ in range(rounds):
                systems[0].mount()
                for who, size in footprint(systems[0]).items():
                    report.add(who, "MB", "a mount", size)
                takeover(systems[0], standby=True)
                for who, size in footprint(systems[0]).items():
                    report.add(who, "MB", "after a takeover", size)
                for system in systems[1:]:
                    system.mount()
                each = [footprint(system) for system in systems]
                for who in each[0]:
                    report.add(who, "MB", "each of four", statistics.mean(one[who] for one in each))
                for system in systems:
                    system.unmount()
        finally:
            discard_all(list(systems))
    return NOTES.format(rounds=rounds, **machine()) + "\n" + report.markdown()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.footprint")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="mounts of each kind (3)")
    print(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
