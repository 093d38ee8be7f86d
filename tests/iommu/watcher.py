"""A process that walks the tables in a region file all the time: `python -m tests.iommu.watcher`, facts on its input.

It counts its walks in a shared file, and ends at the first translation that is wrong or missing, or when it is told.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.iommu import walker
from tests.iommu.stamped import stamp_at
from tests.iommu.walker import READ, Memory, Translation

COUNT, STOP, READY = 0, 1, 2  #: words of the shared file


class Watcher:
    """The process, for as long as the block lasts.  ``stays``: (IOVA, stamp) pairs that are there all the time."""

    def __init__(
        self, shared: Path, region: Path, base: int, form: str, root: int, device: int, stays: list[tuple[int, int]]
    ) -> None:
        facts = {
            "shared": str(shared),
            "region": str(region),
            "base": base,
            "form": form,
            "root": root,
            "device": device,
            "stays": stays,
        }
        shared.write_bytes(bytes(4096))
        self.words = map_words(shared)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.iommu.watcher"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(facts))
        self.process.stdin.close()
        self.wait(1)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.words[STOP] = 1
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        self.process.stderr.close()
        assert self.process.wait() == 0, said

    @property
    def count(self) -> int:
        """Walks that have ended."""
        return self.words[COUNT]

    def wait(self, walks: int) -> None:
        """Until so many more walks have ended: then no walk goes on that began before."""
        end = self.count + walks
        while self.count < end:
            if self.process.poll() is not None:
                break
            os.sched_yield()


def map_words(path: Path) -> memoryview:
    """A file's memory, as words of 8 bytes."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")


def main() -> int:
    """Walk."""
    facts: dict[str, Any] = json.load(sys.stdin)
    words = map_words(Path(facts["shared"]))
    memory = Memory(map_words(Path(facts["region"])), facts["base"])
    kind = walker.Vtd if facts["form"] == "vtd" else walker.Amd
    hardware: walker.Vtd | walker.Amd = kind(memory, facts["root"])
    parent = os.getppid()
    while not words[STOP] and os.getppid() == parent:
        for iova, stamp in facts["stays"]:
            found = hardware.translate(facts["device"], iova, READ)
            if not isinstance(found, Translation) or stamp_at(memory, found) != stamp:
                print(f"walk {words[COUNT]}: IOVA {iova:#x}: {found}", file=sys.stderr)
                return 1
        words[COUNT] += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
