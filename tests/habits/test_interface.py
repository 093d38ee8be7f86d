"""The version moves with every change of an interface."""

from __future__ import annotations

import pkernfs
from tests.habits.interface import RECORDED, interface


def numbers(version: str) -> list[int]:
    """A version as numbers that can be compared."""
    return list(map(int, version.split(".")))


def test_no_interface_changes_under_its_version() -> None:
    recorded, _, text = RECORDED.read_text().partition("\n")
    assert interface() == text, "raise __version__, then run python -m tests.habits.interface"
    assert numbers(pkernfs.__version__) >= numbers(recorded)
