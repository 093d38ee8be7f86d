"""The long form: `python -m tests.core.fuzz --images N --seed S`."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from typing import Any

from tests.core.fuzz.run import OUTCOMES, try_many

STEP = 200


def main() -> int:
    """Try images, print the table; 1 when one did what must not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--structure", default="", help="the only one to mutate, as the table names it")
    arguments = parser.parse_args()
    counts: collections.Counter[Any] = collections.Counter()
    failures: list[str] = []
    start = time.monotonic()
    end = arguments.first + arguments.images
    for first in range(arguments.first, end, STEP):
        told = len(failures)
        counts += try_many(arguments.seed, first, min(STEP, end - first), failures, arguments.structure)
        for failure in failures[told:]:
            print(failure, flush=True)
    rows = sorted({structure for structure, _ in counts if structure})
    print(f"{'structure':<20} {'images':>8}" + "".join(f" {outcome:>9}" for outcome in OUTCOMES))
    for row in [*rows, "all"]:
        figures = [sum(counts[name, outcome] for name in (rows if row == "all" else [row])) for outcome in OUTCOMES]
        print(f"{row:<20} {sum(figures):>8}" + "".join(f" {figure:>9}" for figure in figures))
    print(
        f"seed {arguments.seed}: {arguments.images} images in {time.monotonic() - start:.0f} s, {len(failures)} failed"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
