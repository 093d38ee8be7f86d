"""What the parts of a repair share: one round's findings, and the notes of what was done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from pkernfs.fs.volume import Volume
    from pkernfs.fsck.check import Checker

#: Pages or inodes that one transaction changes at most: less than the smallest journal holds, with its headers.
BATCH = 100
T = TypeVar("T")


class Repair(NamedTuple):
    """One thing that was repaired."""

    code: str  #: short name of the invariant that holds now
    text: str  #: one line: what was done
    ino: int = 0  #: the inode concerned, or 0
    offset: int = 0  #: region offset in bytes, or 0


class Work:
    """One round: a volume, what a check of it found, and the notes.  A stage that changes anything ends the round."""

    def __init__(self, volume: Volume, checker: Checker) -> None:
        self.volume = volume
        volume.charges = False
        self.checker = checker
        self.ledger = checker.ledger
        self.repairs: list[Repair] = []

    def note(self, code: str, text: str, *, ino: int = 0, offset: int = 0) -> None:
        """Note what was repaired."""
        self.repairs.append(Repair(code, text, ino, offset))


def batches(items: Iterable[T], most: int = BATCH) -> Iterator[list[T]]:
    """Lists of ``most`` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, most)):
        yield batch
