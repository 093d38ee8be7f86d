"""Neighbouring mappings as one where there are more than can be seen."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self, TypeVar

from pkernfs.format import Ino, Iova

OTHERS = Ino(0)  #: stands for their inode
#: How much more a merge costs that mixes files, adds to what is mixed, mixes rights.
MIXES_FILES, MIXES_MORE, MIXES_ACCESS = 64, 2, 4


class Mapping(NamedTuple):
    """A range of the address space that translates to a range of a file; bytes."""

    iova: Iova
    length: int
    ino: Ino
    offset: int
    access: str  #: "rw", "ro" or "wo"


class Span:
    """Neighbouring mappings that are drawn as one block; from ``start`` to ``end``, of which ``length`` is mapped."""

    def __init__(self, start: int, end: int, mappings: list[Mapping], ino: Ino) -> None:
        self.start = start
        self.end = end
        self.mappings = mappings
        self.ino = ino  #: the file's; OTHERS: of several
        self.length = sum(mapping.length for mapping in mappings)

    def joined(self, other: Self) -> Self:
        """Itself and the next one as one."""
        ino = self.ino if self.ino == other.ino else OTHERS
        both = type(self)(self.start, other.end, self.mappings + other.mappings, ino)
        both.length = self.length + other.length
        return both

    @property
    def access(self) -> str:
        """The rights that they have in common; "mixed": none."""
        found = {mapping.access for mapping in self.mappings}
        return found.pop() if len(found) == 1 else "mixed"


S = TypeVar("S", bound=Span)


def merge(spans: Sequence[S], most: int, *, across_files: bool = True) -> list[S]:
    """Join neighbours, those that cost least first, until at most ``most`` are left (or none of the same file)."""
    left = [n - 1 for n in range(len(spans))]
    right = [n + 1 for n in range(len(spans))]
    alive: list[S | None] = list(spans)
    version = [0] * len(spans)

    def cost(a: Span, b: Span) -> int:
        # The geometric mean: a small one goes to its large neighbour before two of middle size join, and a crowd of
        # small ones does not go to a very large one.
        much = math.isqrt((a.end - a.start) * (b.end - b.start)) + b.start - a.end
        files = 1 if a.ino == b.ino else MIXES_FILES if OTHERS not in (a.ino, b.ino) else MIXES_MORE
        access = 1 if a.access == b.access or "mixed" in (a.access, b.access) else MIXES_ACCESS
        return much * files * access

    def allowed(a: Span, b: Span) -> bool:
        return across_files or a.ino == b.ino

    def pairs(at: Iterable[int]) -> Iterable[tuple[int, int, int, int, int]]:
        for a in at:
            b = right[a] if a >= 0 else len(alive)
            one, other = (alive[a], alive[b]) if b < len(alive) else (None, None)
            if one is not None and other is not None and allowed(one, other):
                yield cost(one, other), a, b, version[a], version[b]

    queue = list(pairs(range(len(alive))))
    heapq.heapify(queue)
    count = len(alive)
    while count > most and queue:
        _, a, b, va, vb = heapq.heappop(queue)
        one, other = alive[a], alive[b]
        if one is None or other is None or version[a] != va or version[b] != vb:
            continue
        alive[a], alive[b] = one.joined(other), None
        version[a] += 1
        right[a] = right[b]
        if right[a] < len(alive):
            left[right[a]] = a
        count -= 1
        for pair in pairs((left[a], a)):
            heapq.heappush(queue, pair)
    return [one for one in alive if one is not None]
