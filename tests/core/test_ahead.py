"""Blocks that are made ready in steps, ahead of the transaction that takes them."""

from __future__ import annotations

import pytest

from pkernfs.fs.ahead import STEP, UnreadyError
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.region import MemoryRegion
from tests.core.support import ROOT, MiB, assert_sound, content, mkfile, new_fs, tree

LARGE = 2 * (STEP + 2) * MiB


def grow(fs: Filesystem, name: bytes, size: int) -> None:
    """As a handler does it."""
    with fs.volume.allocator.ahead.in_steps():
        fs.setattr(fs.lookup(ROOT, name), SetAttr(size=size))


@pytest.fixture
def fs() -> Filesystem:
    """With free memory that holds old bytes: this region gives nothing back to its host."""

    class Keeping(MemoryRegion):
        def discard(self, offset: int, length: int) -> None:
            pass

    fs = new_fs(kind=Keeping)
    mkfile(fs, b"junk", b"\xee" * LARGE)
    fs.unlink(ROOT, b"junk")
    mkfile(fs, b"ram")
    return fs


def test_a_large_file_is_made_in_steps(fs: Filesystem) -> None:
    ahead = fs.volume.allocator.ahead
    before = tree(fs)
    with pytest.raises(UnreadyError) as refused:
        grow(fs, b"ram", LARGE)
    assert tree(fs) == before
    steps = ahead.prepare(refused.value.runs)
    next(steps)
    # Somebody else takes, and writes to, some of what is ready, and gives back what is not.
    mkfile(fs, b"other", b"x" * (4 * MiB))
    fs.unlink(ROOT, b"other")
    for _ in steps:
        pass
    with pytest.raises(UnreadyError) as refused:
        grow(fs, b"ram", LARGE + 2 * STEP * MiB)
    for _ in ahead.prepare(refused.value.runs):
        pass
    grow(fs, b"ram", LARGE + 2 * STEP * MiB)
    assert ahead.ready == set()
    assert not any(content(fs, fs.lookup(ROOT, b"ram")))
    assert len(fs.content.extents(fs.lookup(ROOT, b"ram"))) == 1
    assert_sound(fs)


def test_a_small_file_is_made_at_once(fs: Filesystem) -> None:
    grow(fs, b"ram", 2 * STEP * MiB)
    assert not any(content(fs, fs.lookup(ROOT, b"ram")))


def test_in_a_hurry_there_are_no_steps(fs: Filesystem) -> None:
    fs.volume.allocator.ahead.hurry = True
    grow(fs, b"ram", LARGE)
    assert not any(content(fs, fs.lookup(ROOT, b"ram")))


def test_what_is_not_taken_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = new_fs()
    mkfile(fs, b"ram")
    with pytest.raises(UnreadyError) as refused:
        grow(fs, b"ram", LARGE)
    ahead = fs.volume.allocator.ahead
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(fs.region, "discard", lambda *run: given.append(run))
    steps = ahead.prepare(refused.value.runs)
    next(steps)
    ahead.give_back()
    assert given == []
    steps.close()  # type: ignore[attr-defined]
    ahead.give_back()
    assert given == [(refused.value.runs[0][0] * 2 * MiB, 2 * STEP * MiB)]
    assert ahead.ready == set()
