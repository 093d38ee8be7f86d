"""What a commit's subject may be."""

from __future__ import annotations

import pytest

from tests.habits.commits import complaints

GOOD = [
    "fs: orphans are a part of their own",
    "fs, format: types for all ids\n\nWhy: 13 asserts.\n",
    "docs: a README of one page\n\nText.\n# a comment of git\n",
    "pyproject.toml: one more tool",
    "mount_helpers: install man pages",
    'Revert "fs: orphans"\n\nThis reverts commit 1.',
    "Merge branch 'main'",
]
BAD = {
    "no-room": ("Orphans are a part of their own", "room: what"),
    "capital-room": ("Fs: orphans", "room: what"),
    "full-stop": ("fs: orphans.", "full stop"),
    "nothing": ("fs: ", "room: what"),
    "empty": ("", "room: what"),
    "long": ("fs: " + "x" * 69, "at most 72 characters, found 73"),
    "no-blank-line": ("fs: orphans\nare a part", "blank line"),
}


@pytest.mark.parametrize("message", GOOD)
def test_good_subjects(message: str) -> None:
    assert complaints(message) == []


@pytest.mark.parametrize(("message", "what"), BAD.values(), ids=BAD)
def test_bad_subjects(message: str, what: str) -> None:
    (complaint,) = complaints(message)
    assert what in complaint
