"""How fast page tables are made, taken away and checked.

    python -m tests.bench.iommu --rounds 3        some seconds a round

In one process, over a sparse region: files are as large as their names say, and nobody touches their memory.
"""

from __future__ import annotations

import argparse
import mmap
import os
import stat
import time
from array import array
from collections.abc import Callable
from typing import Final

from pkernfs.format import BLOCK, DOMAIN, DOMAIN_KEY, PAGE, ROOT_INO, GiB, Ino, MiB, TiB, geometry
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.names import Caller
from pkernfs.iommu import domain, mapping, replace, views
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.records import Records
from pkernfs.region import Region
from tests.bench.report import Report, machine

NOTES = """\
Medians of {rounds} rounds (least-greatest).  {cpu}, {cores} cores, kernel {kernel}, Python {python}.

- entries: leaves that a call stores, clears or checks, with all that belongs to it: records, pins, bitmaps, journal.
  64 GiB is one mapping of one file; one by one: only the stores of as many leaves as 1 GiB has, in a Python loop.
- 1 TiB: one mapping, and the check that it is there (--live-update), which is what follows a restart.
"""
GUEST: Final = 64 * GiB
LEAVES: Final = {1: "4 KiB leaves", 2: "2 MiB leaves", 3: "1 GiB leaves"}


class SparseRegion(Region):
    """Zeros that take memory where something is stored."""

    def __init__(self, size: int) -> None:
        descriptor = os.memfd_create("pkernfs-bench")
        os.ftruncate(descriptor, size)
        super().__init__(memoryview(mmap.mmap(descriptor, size)))
        os.close(descriptor)

    def reserve(self, offset: int, length: int) -> None:
        """Nothing was ever stored in blocks that are handed out here."""


def filesystem(size: int, kind: type[SparseRegion] = SparseRegion) -> tuple[Filesystem, Ino]:
    """A filesystem with one file of ``size`` bytes, which begins at 1 GiB; its inode."""
    region = kind(size + 4 * GiB)
    mkfs(region, phys_base=GiB - geometry(region.size // BLOCK).first_block * BLOCK)
    fs = open_filesystem(region)
    ino = fs.create(ROOT_INO, b"guest-ram", stat.S_IFREG | 0o600, Caller(0, 0))
    fs.setattr(ino, SetAttr(size=size))
    return fs, ino


def new_domain(fs: Filesystem, leaf: int) -> Ino:
    """A domain with leaves of up to level ``leaf``."""
    ino = domain.create(fs, f"dom-{leaf}".encode(), "vtd", 4, Caller(0, 0))
    replace.replace(fs, ino, leaf)
    return ino


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure_guest(report: Report) -> None:
    """64 GiB: map, audit, replace, unmap."""
    for leaf in (1, 2):
        fs, guest = filesystem(GUEST)
        ino = new_domain(fs, leaf)
        entries = GUEST // (PAGE << 9 * (leaf - 1))
        assert DOMAIN.unpack(Records(fs.volume, ino).get(DOMAIN_KEY) or b"").leaf == leaf
        calls: dict[str, Callable[[], object]] = {
            "map": lambda fs=fs, ino=ino, guest=guest: mapping.map_file(fs, ino, 4 * GiB, guest),  # type: ignore[misc]
            "audit": lambda fs=fs: views.audit(fs),  # type: ignore[misc]
            "replace": lambda fs=fs, ino=ino: replace.replace(fs, ino),  # type: ignore[misc]
            "unmap": lambda fs=fs, ino=ino: mapping.unmap(fs, ino, 4 * GiB, GUEST),  # type: ignore[misc]
        }
        for name, call in calls.items():
            report.add(f"{name} 64 GiB", "million entries/s", LEAVES[leaf], entries / seconds(call) / 1e6)
        assert views.audit(fs).problems == []


def measure_loop(report: Report) -> None:
    """The same stores one by one."""
    region = SparseRegion(2 * MiB)
    entries = array("Q", range(3, GiB, PAGE))

    def loop() -> None:
        for at, entry in enumerate(entries):
            region.store_word(8 * at, entry)

    report.add("map 64 GiB", "million entries/s", "one by one", len(entries) / seconds(loop) / 1e6)


def measure_terabyte(report: Report) -> None:
    """1 TiB: tables are all that is touched."""
    for leaf in (2, 3):
        fs, guest = filesystem(TiB)
        ino = new_domain(fs, leaf)
        took = seconds(lambda fs=fs, ino=ino, guest=guest: mapping.map_file(fs, ino, TiB, guest))  # type: ignore[misc]
        report.add("map 1 TiB", "ms", LEAVES[leaf], 1e3 * took)

        def check(fs: Filesystem = fs, ino: Ino = ino, guest: Ino = guest) -> None:
            mapping.map_file(fs, ino, TiB, guest, live_update=True)

        report.add("find 1 TiB there again", "ms", LEAVES[leaf], 1e3 * seconds(check))


def measure(rounds: int) -> str:
    """All of it; the table as Markdown."""
    report = Report()
    for _ in range(rounds):
        measure_guest(report)
        measure_loop(report)
        measure_terabyte(report)
    return NOTES.format(rounds=rounds, **machine()) + "\n" + report.markdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    print(measure(parser.parse_args().rounds))
