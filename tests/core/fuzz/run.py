"""One hostile image, and many."""

from __future__ import annotations

import collections
import contextlib
import logging
import random
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.core.fuzz.catalogue import catalogue_of
from tests.core.fuzz.images import NAMES, view_of
from tests.core.fuzz.mutate import mutate
from tests.core.fuzz.oracle import Steps, Violation, WatchedRegion, little_memory
from tests.core.fuzz.readers import Use, make_anew, repair, tools

HANG = 60.0  #: seconds of CPU time for one image: a safety net, steps are what counts
OUTCOMES = ("refused", "damaged", "harmless")


class Tried(NamedTuple):
    """One image.  ``outcome``: the mount was refused; some calls told of damage; or neither."""

    image: str
    structure: str
    what: str
    outcome: str


class Failure(AssertionError):
    """An image that brought about what must not be; its text says how to see it again."""


def hostile(seed: int, n: int, only: str = "") -> tuple[str, WatchedRegion, str, str]:
    """Image ``n`` of a seed: name of the sound one, a fresh view of the mutated one, structure, what was done.

    ``only``: the structure to mutate; "": any.
    """
    rng = random.Random(f"{seed}/{n}")
    name = rng.choice([name for name in NAMES if not only or only in catalogue_of(name).fields])
    region = view_of(name, WatchedRegion)
    assert isinstance(region, WatchedRegion)
    structure, what = mutate(rng, region, catalogue_of(name), only)
    return name, region, structure, what


def try_one(seed: int, n: int, only: str = "") -> Tried:
    """Let everything loose on one image.  Raises Failure."""
    rng = random.Random(f"{seed}/{n}/use")
    name = stage = structure = what = ""
    try:
        stage = "use"
        name, region, structure, what = hostile(seed, n, only)
        with region:
            use = Use(region, rng)
            if use.refused is None:
                places = use.walk()
                use.change(places, 12)
                use.end()
        outcome = "refused" if use.refused else "damaged" if use.damaged else "harmless"
        stage = "tools"
        with hostile(seed, n, only)[1] as region:
            region.readonly = True
            tools(region, rng)
        stage = "repair"
        with hostile(seed, n, only)[1] as region:
            repair(region)
        if n % 20 == 0:
            stage = "mkfs"
            with hostile(seed, n, only)[1] as region:
                make_anew(region)
    except Violation as error:
        again = f"python -m tests.core.fuzz --seed {seed} --first {n} --images 1"
        again += f" --structure {only!r}" if only else ""
        raise Failure(f"{stage} of {name}, {what}\n    {error}\n    again: {again}") from error
    return Tried(name, structure, what, outcome)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Steps are counted, memory is limited, the log is silent, and a hang ends."""

    def hang(*_: Any) -> None:
        raise Violation(f"more than {HANG} s of CPU time")

    logger = logging.getLogger("pkernfs")
    was, logger.disabled = logger.disabled, True
    for name in NAMES:
        catalogue_of(name)
    old = signal.signal(signal.SIGVTALRM, hang)
    try:
        with Steps.counted(), little_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
        logger.disabled = was


def try_many(
    seed: int, first: int, count: int, failures: list[str] | None = None, only: str = ""
) -> collections.Counter[Any]:
    """Counts of (structure, outcome).  Raises Failure, or collects them."""
    counts: collections.Counter[Any] = collections.Counter()
    with prepared():
        for n in range(first, first + count):
            signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
            try:
                tried = try_one(seed, n, only)
            except Failure as failure:
                if failures is None:
                    raise
                failures.append(str(failure))
                counts["", "failed"] += 1
                continue
            counts[tried.structure, tried.outcome] += 1
    return counts
