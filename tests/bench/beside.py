"""Two versions beside each other: small requests through a mount of each, in turns of a second.

    python -m tests.bench.beside TREE [--rounds 8]

TREE is a checkout of the version before, with its own .venv.  What a noisy machine does to one version it does to the
other a second later, so the ratios of the rounds say what two runs one after the other cannot: those differed by a
third where nothing had changed.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.bench.report import cell
from tests.bench.systems import run

MiB: Final = 1 << 20
PAGE: Final = 4096
SIZE: Final = 64 * MiB  #: of the file that is read and written
SLICE: Final = 1.0  #: seconds


@contextlib.contextmanager
def mounted(tree: Path, scratch: Path) -> Iterator[Path]:
    """A new region, mounted by the commands of a checkout, with a file in it."""
    commands = tree / ".venv/bin"
    region, mnt = scratch / "region", scratch / "mnt"
    mnt.mkdir(parents=True)
    run(commands / "mkfs.pkernfs", "--size", "256M", region)
    run(commands / "mount.pkernfs", region, mnt)
    try:
        (mnt / "file").write_bytes(os.urandom(SIZE))
        yield mnt
    finally:
        run("umount", mnt)


def count(act: Callable[[], object]) -> float:
    """How often ``act`` can be done in a second."""
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SLICE:
        for _ in range(20):
            act()
        done += 20
    return done / passed


def direct(mnt: Path, flags: int, call: Callable[[int, list[mmap.mmap], int], int]) -> float:
    """4 KiB at random, past the page cache."""
    fd, buffer = os.open(mnt / "file", flags | os.O_DIRECT), mmap.mmap(-1, PAGE)
    try:
        return count(lambda: call(fd, [buffer], random.randrange(SIZE // PAGE) * PAGE))
    finally:
        os.close(fd)


def create(mnt: Path) -> float:
    """Empty files, which are removed behind the clock."""
    with tempfile.TemporaryDirectory(dir=mnt) as folder:
        names = (f"{folder}/{number}" for number in range(1 << 30))
        return count(lambda: os.close(os.open(next(names), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)))


KINDS: Final[dict[str, Callable[[Path], float]]] = {
    "4 KiB random read, direct, per second": lambda mnt: direct(mnt, os.O_RDONLY, os.preadv),
    "4 KiB random write, direct, per second": lambda mnt: direct(mnt, os.O_WRONLY, os.pwritev),
    "create, per second": create,
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beside", description=__doc__.partition("\n")[0])
    parser.add_argument("tree", type=Path, metavar="TREE", help="checkout of the version before, with its .venv")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="turns of each (8)")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parents[2]
    with (
        tempfile.TemporaryDirectory(prefix="pkernfs-bench-", dir="/dev/shm") as scratch,
        mounted(arguments.tree.resolve(), Path(scratch, "before")) as before,
        mounted(here, Path(scratch, "now")) as now,
    ):
        print("| | before | now | ratio |\n|---|---:|---:|---:|")
        for label, kind in KINDS.items():
            pairs = []
            for number in range(arguments.rounds):
                # Each goes first in every other round: the second finds a processor that is awake.
                order = (before, now) if number % 2 else (now, before)
                figures = {mnt: kind(mnt) for mnt in order}
                pairs.append((figures[before], figures[now]))
            old, new = (list(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"| {label} | {cell(old)} | {cell(new)} | {ratio:.2f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
