"""Hostile images: the short form of the fuzzer, and that it sees what it is there to see."""

from collections.abc import Callable

import pytest

from pkernfs.fs import cache
from pkernfs.fs.damage import Damage
from pkernfs.fs.journal import Journal
from pkernfs.fs.space import Space
from tests.core.fuzz.run import Failure, try_many

SEED = 1
EACH = 100


@pytest.mark.parametrize("first", range(0, 10 * EACH, EACH))
def test_hostile_images(first: int) -> None:
    """`python -m tests.core.fuzz` does the same with as many as wanted."""
    counts = try_many(SEED, first, EACH)
    outcomes = {outcome: sum(n for (_, how), n in counts.items() if how == outcome) for _, outcome in counts}
    assert sum(outcomes.values()) == EACH
    assert min(outcomes.values()) > EACH // 20, f"images of one kind only: {outcomes}"


# -- readers that believe what they read ------------------------------------------------------------------------------


Blind = Callable[[pytest.MonkeyPatch], None]
#: What is not looked at -> the structure whose mutants show it, and the patch.
BLIND: dict[str, tuple[str, Blind]] = {
    "extents": ("extent", lambda patch: patch.setattr(Space, "is_data", lambda *_: True)),
    "inodes": ("inode", lambda patch: patch.setattr(cache, "check_inode", lambda *_: None)),
    "kinds-of-pages": ("inode", lambda patch: patch.setattr(Space, "check_page_kind", lambda *_: None)),
    "journal-records": ("journal record", lambda patch: patch.setattr(Journal, "_is_possible", lambda *_: True)),
    "what-was-found": ("inode", lambda patch: patch.setattr(Damage, "check_changeable", lambda *_: None)),
}


@pytest.mark.parametrize(("structure", "blind"), BLIND.values(), ids=BLIND)
def test_a_reader_that_believes_what_it_reads_is_found_out(
    monkeypatch: pytest.MonkeyPatch, structure: str, blind: Blind
) -> None:
    blind(monkeypatch)
    with pytest.raises(Failure, match="again: python -m"):
        try_many(SEED, 0, 300, only=structure)
