"""How long nobody answers when a worker is killed, and what that costs those who read and write.

    python -m tests.bench.takeover        all of it, in about 10 minutes; --help

Seen from outside: by a client of the mount, with the mount's own options.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from pkernfs import client
from pkernfs.api import to_builtins
from tests.bench import mounting
from tests.bench.report import Report, machine
from tests.bench.systems import GiB, Pkernfs, discard_all, run

MiB: Final = 1 << 20

NOTES = """\
{cpu}, {cores} cores, kernel {kernel}, Python {python}.

- takeover: milliseconds from kill -9 of the worker to the first answer of another one, to a client that waits for it;
  of {kills} each.  without: its standby was killed before, so that the keeper starts a worker.
- fio: O_DIRECT, one thread, crc32c of every block written, then read and verified; a kill -9 of the worker every
  second, or none, in turns; medians of {rounds} rounds (least-greatest).
- upgrade: `pkernfs upgrade` while fio writes 4 KiB; of {rounds} runs.
"""

#: Directories and files; the second as many as a mount holds references to.
CASES: Final = [mounting.Case(GiB, 100), mounting.Case(2 * GiB, 100_000)]
#: Seconds without processor time after which a standby has imported everything: longer than the pause that a worker
#: makes before it takes itself for a standby and imports the verbs too (IDLE in server/worker.py).  Killed within that
#: import, of 15 to 50 ms, one takeover in twenty took as much longer.
QUIET: Final = 0.3
KILLS: Final = 100  #: takeovers of each kind
EVERY: Final = 1.0  #: seconds between kills
PATIENCE: Final = 60.0


class Job(NamedTuple):
    """Writes of fio, which are verified."""

    label: str
    block: int
    loops: int
    unit: str
    size: int


JOBS: Final = [
    Job("4 KiB random", 4096, 1, "k/s", GiB // 2),
    Job("1 MiB random", MiB, 6, "MB/s", GiB),
]


def status(system: Pkernfs) -> dict[str, Any]:
    """What `pkernfs status --json` tells."""
    found: dict[str, Any] = to_builtins(client.status(str(system.mnt)))
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll.  Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.005)


def activity(pid: int) -> tuple[str, int]:
    """State and processor time of a process, in clock ticks: proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def wait_for_standby(system: Pkernfs) -> int:
    """Wait until a standby has imported everything and waits; its process id."""
    until(lambda: status(system)["standby"] > 0, "a standby")
    pid: int = status(system)["standby"]
    before = ("", 0)
    while (now := activity(pid)) != before or now[0] != "S":
        before = now
        time.sleep(QUIET)
    return pid


def answering(system: Pkernfs) -> int:
    """Process id of the worker that answers: one request."""
    return int(os.getxattr(system.mnt, "user.pkernfs.pid"))


def takeover(system: Pkernfs, *, standby: bool) -> float:
    """Kill the worker; milliseconds until another one answers."""
    spare = wait_for_standby(system)
    if not standby:
        os.kill(spare, signal.SIGKILL)
        # The keeper waits a moment before it starts the next one.
        until(lambda: status(system)["standby"] == 0, "the end of the standby")
    worker = answering(system)
    begin = time.perf_counter()
    os.kill(worker, signal.SIGKILL)
    while answering(system) == worker:
        pass
    return (time.perf_counter() - begin) * 1e3


@contextmanager
def kills(system: Pkernfs) -> Iterator[None]:
    """Kill the worker every second."""
    done = threading.Event()
    before = status(system)["takeovers"]

    def kill() -> None:
        while not done.wait(EVERY):
            os.kill(status(system)["worker"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if status(system)["takeovers"] == before:
        raise RuntimeError("expected kills while fio ran, found none: let it write more")


def fio(system: Pkernfs, job: Job, **options: object) -> subprocess.Popen[str]:
    """Begin to write and verify."""
    words = {
        "name": "job",
        "filename": system.mnt / "fio",
        "ioengine": "psync",
        "output-format": "json",
        "rw": "randwrite",
        "bs": job.block,
        "size": job.size,
        "loops": job.loops,
        "direct": 1,
        "verify": "crc32c",
        "verify_fatal": 1,
        "verify_state_save": 0,
        "randseed": 1,
        **options,
    }
    command = ["fio", "--thread", *(f"--{name}={value}" for name, value in words.items())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What fio has measured.  Raises RuntimeError when it has met an error."""
    output, _ = process.communicate()
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    if process.returncode or job["error"]:
        raise RuntimeError(f"fio: exit code {process.returncode}: {output[-2000:]}")
    return job


def rate(side: dict[str, Any], job: Job) -> float:
    """Of what fio tells about reads or writes, the figure in the job's unit."""
    seconds = max(side["runtime"], 1) / 1000
    return float(side["io_bytes"] / seconds / 1e6 if job.unit == "MB/s" else side["total_ios"] / seconds / 1e3)


def measure_takeovers(system: Pkernfs, report: Report, case: mounting.Case, count: int) -> None:
    """Time ``count`` takeovers with a standby and as many without, in turns."""
    mounting.fill(system, case)
    times: dict[str, list[float]] = {"with standby": [], "without": []}
    for _ in range(count):
        for column, samples in times.items():
            samples.append(takeover(system, standby=column == "with standby"))
    for column, samples in times.items():
        label = f"takeover, {case.files:,} files"
        report.add(f"{label}, median", "ms", column, statistics.median(samples))
        report.add(f"{label}, p99", "ms", column, sorted(samples)[-(-99 * count // 100) - 1])


def measure_fio(system: Pkernfs, report: Report, rounds: int) -> None:
    """Rates with kills and without."""
    system.prepare()
    system.mount()
    run("dd", "if=/dev/zero", f"of={system.mnt / 'fio'}", "bs=1M", f"count={GiB // MiB}", "conv=fsync")
    for _ in range(rounds):
        for job in JOBS:
            for column in ("no kills", "a kill every second"):
                if column == "no kills":
                    done = results(fio(system, job))
                else:
                    with kills(system):
                        done = results(fio(system, job))
                report.add(f"{job.label} write", job.unit, column, rate(done["write"], job))
                report.add(f"{job.label} read and verify", job.unit, column, rate(done["read"], job))


def written(system: Pkernfs) -> int:
    """Requests to write, so far."""
    count: int = status(system)["requests"].get("write", 0)
    return count


def measure_upgrade(system: Pkernfs, report: Report, rounds: int) -> None:
    """How long `pkernfs upgrade` lets fio wait."""
    system.prepare()
    system.mount()
    command = str(system.command("pkernfs"))
    for _ in range(rounds):
        wait_for_standby(system)
        process = fio(system, JOBS[0], time_based=1, runtime=4, do_verify=0)
        wanted = written(system) + 1000
        until(lambda wanted=wanted: written(system) > wanted, "writes")  # type: ignore[misc]
        told = subprocess.run(
            [command, "upgrade", "--json", "--probation", "1", system.mnt], stdout=subprocess.PIPE, check=True
        )
        done = results(process)
        report.add("upgrade, longest stall as told", "ms", "upgrade", json.loads(told.stdout)["longest_stall"] * 1e3)
        report.add("upgrade, longest write of fio", "ms", "upgrade", done["write"]["clat_ns"]["max"] / 1e6)


def measure(count: int, rounds: int) -> str:
    """Everything: notes and tables.  ``count``: takeovers of each kind."""
    reports = [Report() for _ in range(3)]
    with tempfile.TemporaryDirectory(prefix="pkernfs-bench-", dir="/dev/shm") as scratch:
        system = Pkernfs(Path(scratch))
        try:
            for case in CASES:
                measure_takeovers(system, reports[0], case, count)
                discard_all([system])
            measure_fio(system, reports[1], rounds)
            discard_all([system])
            measure_upgrade(system, reports[2], rounds)
        finally:
            discard_all([system])
    notes = NOTES.format(rounds=rounds, kills=count, **machine())
    return "\n\n".join([notes.rstrip(), *(report.markdown() for report in reports)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.takeover")
    parser.add_argument("--kills", type=int, default=KILLS, metavar="N", help="takeovers of each kind (100)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of fio and of upgrades (5)")
    arguments = parser.parse_args()
    print(measure(arguments.kills, arguments.rounds))


if __name__ == "__main__":
    main()
