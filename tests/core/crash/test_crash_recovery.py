"""A crash while recovering: the recovery after it finds what the first one would have."""

import pytest

from tests.core.crash.operations import EVERY
from tests.core.crash.proof import prove_prefixes

#: Transactions of all shapes, and orphans whose freeing takes several of them.
SHORT = [
    ("small", "create"),
    ("small", "unlink-big"),
    ("small", "unlink-open"),
    ("small", "rename-over-directory"),
    ("small", "cut-sparse-0"),
    ("tight", "xattr-large-by-large"),
    ("no-pages", "hole"),
    ("last-page", "last-page-goes"),
]
TWICE = [("small", "unlink-open"), ("tight", "rename-over-open-sparse"), ("removed", "mount")]


def ids(cases: list[tuple[str, str]]) -> list[str]:
    return ["-".join(case) for case in cases]


@pytest.mark.parametrize(("state", "name"), SHORT, ids=ids(SHORT))
def test_a_crash_while_recovering(state: str, name: str) -> None:
    assert prove_prefixes(state, name, ways=0, depth=1).recovery


@pytest.mark.slow
@pytest.mark.parametrize(("state", "name"), EVERY, ids=ids(EVERY))
def test_a_crash_at_every_store_of_every_recovery(state: str, name: str) -> None:
    prove_prefixes(state, name, ways=1, depth=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("state", "name"), TWICE, ids=ids(TWICE))
def test_a_crash_in_the_recovery_after_a_crash_while_recovering(state: str, name: str) -> None:
    prove_prefixes(state, name, ways=1, depth=2)
