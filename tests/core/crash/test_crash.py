"""Every operation, in every state where it does something else, is cut at every store: it happened or it did not."""

import pytest

from tests.core.crash.operations import EVERY
from tests.core.crash.proof import prove_prefixes

CASES = pytest.mark.parametrize(("state", "name"), [pytest.param(*case, id="-".join(case)) for case in EVERY])


@CASES
def test_every_operation_happens_or_not(state: str, name: str) -> None:
    prove_prefixes(state, name, ways=1)


@pytest.mark.slow
@CASES
def test_every_operation_happens_or_not_torn_in_many_ways(state: str, name: str) -> None:
    prove_prefixes(state, name, ways=8)
