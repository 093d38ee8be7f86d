"""Options of the measurements."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; pytest knows them when tests/bench is named on its command line, as tests/run --bench does."""
    group = parser.getgroup("bench", "measurements")
    group.addoption("--bench-rounds", type=int, default=3, metavar="N", help="figures are the medians of N rounds (3)")
    group.addoption("--bench-json", metavar="FILE", help="write every single figure to FILE as JSON")
