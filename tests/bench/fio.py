"""Reads and writes of one file with fio's psync engine: one thread, one pread or pwrite at a time.

Four ways, and what each says:

    direct      O_DIRECT.  Every call is one request to the server (tmpfs: one copy), nothing is cached.
    buffered    through a page cache that was dropped before and is written back (fsync) within the measured time: every
                byte reaches the server once, but the kernel may read ahead and put writes together.
    held        buffered writes, and no waiting until they are written back: what a filesystem that holds them back
                gains for as long as they need not be.
    reopened    buffered reads by a new open of a file of which every page was cached before: what is left of the cache
                is the filesystem's choice (FOPEN_KEEP_CACHE).

Reads that the page cache answers for certain are in `loops.cached`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Final, NamedTuple

from tests.bench.systems import System, drop_caches, run

MiB: Final = 1 << 20

#: Size of the file; it fits into the region and into memory several times.
FILE_SIZE: Final = 512 * MiB


class Job(NamedTuple):
    """One measurement with fio."""

    rw: str  #: fio's word: read, write, randread, randwrite
    block: int  #: bytes a call
    way: str  #: direct, buffered, held or reopened; see above
    total: int  #: bytes in all; with a cache no more than the file has, so that no byte comes twice

    @property
    def label(self) -> str:
        """First column of the table."""
        order = "random" if self.rw.startswith("rand") else "sequential"
        verb = "read" if self.rw.endswith("read") else "write"
        size = "1 MiB" if self.block == MiB else f"{self.block >> 10} KiB"
        return f"{size} {order} {verb}, {self.way}"

    @property
    def unit(self) -> str:
        """MB/s for large calls, thousands of calls a second for small ones."""
        return "MB/s" if self.block == MiB else "k/s"


JOBS: Final = [
    *(Job(order + verb, MiB, "direct", 4 * FILE_SIZE) for order in ("", "rand") for verb in ("read", "write")),
    *(Job(order + verb, MiB, "buffered", FILE_SIZE) for order in ("", "rand") for verb in ("read", "write")),
    Job("read", MiB, "reopened", FILE_SIZE),
    *(Job(order + verb, 4096, "direct", 128 * MiB) for order in ("", "rand") for verb in ("read", "write")),
    *(Job(order + verb, 4096, "buffered", 128 * MiB) for order in ("", "rand") for verb in ("read", "write")),
]

#: What -o writeback is for.
WRITEBACK_JOBS: Final = [
    Job("randwrite", 4096, "held", 128 * MiB),
    Job("randwrite", 4096, "buffered", 128 * MiB),
    Job("write", 4096, "buffered", 128 * MiB),
]


def missing() -> str:
    """Say what is missing to measure; empty if nothing."""
    return "" if shutil.which("fio") else "fio"


def lay_out(system: System) -> None:
    """Write the file once, so that no job allocates."""
    run("dd", "if=/dev/urandom", f"of={system.mnt / 'fio'}", "bs=1M", f"count={FILE_SIZE // MiB}", "conv=fsync")


def measure(system: System, job: Job) -> float:
    """Run one job on a mounted system; return its rate in the job's unit."""
    file = system.mnt / "fio"
    drop_caches()
    if job.way == "reopened":
        with file.open("rb", buffering=0) as stream:
            while stream.read(MiB):
                pass
    command = [
        "fio",
        "--name=job",
        "--thread",
        "--ioengine=psync",
        "--output-format=json",
        f"--filename={file}",
        f"--size={FILE_SIZE}",
        f"--io_size={job.total}",
        f"--rw={job.rw}",
        f"--bs={job.block}",
        f"--direct={int(job.way == 'direct')}",
        f"--invalidate={int(job.way != 'reopened')}",
        f"--end_fsync={int(job.rw.endswith('write') and job.way != 'held')}",
        "--randseed=1",
        "--overwrite=1",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: exit code {done.returncode}: {done.stdout[-1000:]}{done.stderr[-1000:]}"
        )
    return rate(done.stdout, job)


def rate(output: str, job: Job) -> float:
    """Take the rate of `job` from fio's JSON, before which it may print notes."""
    side = json.loads(output[output.index("{") :])["jobs"][0]["read" if job.rw.endswith("read") else "write"]
    # runtime is in whole ms, and includes the fsync at the end.
    seconds = max(side["runtime"], 1) / 1000
    return float(side["io_bytes"] / seconds / 1e6 if job.unit == "MB/s" else side["total_ios"] / seconds / 1e3)
