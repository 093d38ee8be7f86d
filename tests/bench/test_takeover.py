"""How long nobody answers when a worker is killed; tests/bench/takeover.py is the command."""

from __future__ import annotations

import os

import pytest

from tests.bench import fio, takeover


@pytest.mark.bench
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting and dropping caches need root")
@pytest.mark.skipif(bool(fio.missing()), reason="found no fio")
def test_takeovers(pytestconfig: pytest.Config) -> None:
    print("\n\n" + takeover.measure(takeover.KILLS, pytestconfig.getoption("--bench-rounds")), end="\n\n")
