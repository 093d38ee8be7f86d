"""Prints how much is proven: python -m tests.core.crash.report [--short].

The long form is every case with every torn way and every recovery of the tests marked slow; minutes on two processors.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tests.core.crash import test_crash_power, test_crash_recovery
from tests.core.crash.operations import ATTRIBUTES, EVERY, NAMES, SIZES, WRITES
from tests.core.crash.proof import Tally, prove_power_cuts, prove_prefixes

Case = tuple[str, str]


class Row(NamedTuple):
    """One kind of proof for a list of cases."""

    title: str
    prove: Callable[[str, str], Tally]
    cases: list[Case]


def rows(*, short: bool) -> list[Row]:
    """What is to be proven."""
    kinds = {"names": NAMES, "attributes": ATTRIBUTES, "truncate": SIZES, "write": WRITES}
    kind_of = {name: kind for kind, names in kinds.items() for name in names}
    found = [
        Row(
            f"crash: {kind}",
            partial(prove_prefixes, ways=1 if short else 8),
            [case for case in EVERY if kind_of.get(case[1], "other") == kind],
        )
        for kind in (*kinds, "other")
    ]
    power, recovery = test_crash_power, test_crash_recovery
    if short:
        return [
            *found,
            Row("crash in recovery", partial(prove_prefixes, ways=0, depth=1), recovery.SHORT),
            Row("power cut", partial(prove_power_cuts, subsets=1), power.SHORT),
            Row("power cut in recovery", partial(prove_power_cuts, subsets=0, depth=1), power.WHILE_RECOVERING),
        ]
    return [
        *found,
        Row("crash in recovery", partial(prove_prefixes, ways=1, depth=1), EVERY),
        Row("crash in second recovery", partial(prove_prefixes, ways=1, depth=2), recovery.TWICE),
        Row("power cut", partial(prove_power_cuts, subsets=8), EVERY),
        Row("power cut in recovery", partial(prove_power_cuts, subsets=1, depth=1), EVERY),
    ]


def prove(row: Row, case: Case) -> Tally:
    return row.prove(*case)


def main() -> None:
    """Prove, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.core.crash.report", description=__doc__)
    parser.add_argument("--short", action="store_true", help="what the normal suite proves")
    short = parser.parse_args().short
    total = Tally()
    columns = list(vars(total))
    print(f"{'':24}" + "".join(f"{name:>12}" for name in columns) + f"{'seconds':>10}")
    begin = time.monotonic()
    with multiprocessing.Pool() as pool:
        for row in rows(short=short):
            start = time.monotonic()
            tally = Tally()
            for one in pool.imap_unordered(partial(prove, row), row.cases, chunksize=4):
                tally.add(one)
            total.add(tally)
            print(_line(row.title, tally, time.monotonic() - start), flush=True)
    print(_line("all", total, time.monotonic() - begin))


def _line(title: str, tally: Tally, seconds: float) -> str:
    return f"{title:24}" + "".join(f"{value:12,}" for value in vars(tally).values()) + f"{seconds:10.1f}"


if __name__ == "__main__":
    main()
