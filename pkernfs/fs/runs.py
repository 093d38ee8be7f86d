"""Joining what goes on: extents, pieces of memory, numbers in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def joined(pieces: Iterable[T], join: Callable[[T, T], T | None]) -> Iterator[T]:
    """``pieces`` in their order, neighbours made one where ``join`` makes one of the two; it gives None where not."""
    last: T | None = None
    for piece in pieces:
        both = None if last is None else join(last, piece)
        if both is None:
            if last is not None:
                yield last
            last = piece
        else:
            last = both
    if last is not None:
        yield last


def joined_runs(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs (first, count) in their order, with those that touch made one."""
    return joined(runs, _touching)


def _touching(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int] | None:
    return (one[0], one[1] + other[1]) if one[0] + one[1] == other[0] else None
