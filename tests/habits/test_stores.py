"""Nothing packs into the region."""

from __future__ import annotations

from tests.habits.commits import ROOT


def test_no_pack_into() -> None:
    """Of ruff's rule (TID251) a method of a struct.Struct, or of a Layout, is not a case."""
    sources = (ROOT / "pkernfs").rglob("*.py")
    assert [path.name for path in sources if ".pack_into(" in path.read_text()] == []
