"""The measurements themselves; see the package's docstring.  They need root, and 6 GiB in /dev/shm."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.bench import fio, loops, mounting
from tests.bench.report import Report, machine
from tests.bench.systems import Bindfs, Pkernfs, PkernfsWriteback, System, Tmpfs, discard_all, present

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting and dropping caches need root"),
]

NOTES = """\
Medians of {rounds} rounds (least-greatest); in each, every system takes its turn at every line.  {cpu}, {cores} cores,
kernel {kernel}, Python {python}.  All three keep their data in tmpfs memory.  One thread, one call at a time.

- direct: O_DIRECT, every call is a request to the server.  buffered: page cache dropped before, fsync within the time:
  each byte reaches the server once, in requests of the kernel's choice.  held: as buffered, without the fsync.
  reopened: all was in the page cache before the file was opened anew.  cached: read again by the same descriptor, the
  page cache alone answers (a Python loop).
- create, stat, unlink: a Python loop; caches dropped before stat.
- mapped: a Python loop increments random 8-byte words of a 512 MiB shared mapping, first with no page in memory, then
  the same words again; synced: both passes and the final msync.
- mount: mount command and first listing, of a filesystem that was unmounted before; the command's files are cached.
"""


@pytest.fixture(scope="module")
def rounds(pytestconfig: pytest.Config) -> range:
    """One number for each round."""
    return range(pytestconfig.getoption("--bench-rounds"))


@pytest.fixture(scope="module")
def report(pytestconfig: pytest.Config, rounds: range) -> Iterator[Report]:
    """Collect the figures; print them when all measurements are done."""
    report = Report()
    yield report
    print("\n\n" + NOTES.format(rounds=len(rounds), **machine()))
    print(report.markdown(), end="\n\n")
    if path := pytestconfig.getoption("--bench-json"):
        Path(path).write_text(report.json() + "\n")


@pytest.fixture
def systems(request: pytest.FixtureRequest) -> Iterator[list[System]]:
    """Systems that can be measured here, of which nothing is left afterwards; a parameter adds others."""
    kinds = (Pkernfs, *getattr(request, "param", ()), Tmpfs, Bindfs)
    with tempfile.TemporaryDirectory(prefix="pkernfs-bench-", dir="/dev/shm") as scratch:
        systems, absent = present(Path(scratch), kinds)
        print("", *absent, sep="\n")
        try:
            yield systems
        finally:
            discard_all(systems)


def mount_all(systems: list[System], lay_out: Callable[[System], None] | None = None) -> None:
    """Prepare and mount every system, and put into it what is needed."""
    for system in systems:
        system.prepare()
        system.mount()
        if lay_out:
            lay_out(system)


def run_jobs(jobs: Sequence[fio.Job], systems: list[System], rounds: range, report: Report) -> None:
    """Measure each job with every system in turn, in each round."""
    mount_all(systems, fio.lay_out)
    for _ in rounds:
        for job in jobs:
            for system in systems:
                report.add(job.label, job.unit, system.name, fio.measure(system, job))


@pytest.mark.skipif(bool(fio.missing()), reason="found no fio")
def test_reads_and_writes(systems: list[System], rounds: range, report: Report) -> None:
    run_jobs(fio.JOBS, systems, rounds, report)


@pytest.mark.skipif(bool(fio.missing()), reason="found no fio")
@pytest.mark.parametrize("systems", [(PkernfsWriteback,)], indirect=True, ids=["writeback"])
def test_writeback(systems: list[System], rounds: range, report: Report) -> None:
    run_jobs(fio.WRITEBACK_JOBS, systems, rounds, report)


def test_metadata(systems: list[System], rounds: range, report: Report) -> None:
    mount_all(systems)
    for _ in rounds:
        for system in systems:
            for what, value in loops.metadata(system)._asdict().items():
                report.add(f"{what} a file", "us", system.name, value)


def test_cached_and_mapped(systems: list[System], rounds: range, report: Report) -> None:
    mount_all(systems, loops.lay_out)
    for _ in rounds:
        for system in systems:
            large, small = loops.cached(system)
            report.add("1 MiB sequential read, cached", "MB/s", system.name, large)
            report.add("4 KiB random read, cached", "k/s", system.name, small)
        for system in systems:
            for what, value in loops.mapped(system)._asdict().items():
                report.add(f"mapped random words, {what}", "k/s", system.name, value)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in mounting.CASES])
def test_mount(systems: list[System], rounds: range, report: Report, case: mounting.Case) -> None:
    for system in systems:
        mounting.fill(system, case)
    for _ in rounds:
        for system in systems:
            # Its memory is the mount itself: there is nothing to mount again.
            if system.name != "tmpfs":
                report.add(case.label, "ms", system.name, mounting.measure(system))
