"""What the stages of a repair share: the findings that they are given, and the notes of what was done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from pkernfs.format import Ino
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import Check
from pkernfs.fsck.findings import NO_INO
from pkernfs.fsck.problems import PROBLEMS, Code, Stage

#: Pages or inodes that one transaction changes at most: less than the smallest journal holds, with its headers.
BATCH = 100
T = TypeVar("T")


class Repair(NamedTuple):
    """One thing that was repaired."""

    code: Code  #: the invariant that holds now
    text: str  #: one line: what was done
    ino: Ino = NO_INO  #: the inode concerned, or 0
    offset: int = 0  #: region offset in bytes, or 0


class Work:
    """One stage in one round: a volume, the findings of its codes, and the notes.

    What was checked is data: ``memory`` and ``reached`` are those of the check.  The region is read and changed through
    ``volume`` only, for it may have been opened anew since.
    """

    def __init__(self, stage: Stage, volume: Volume, check: Check) -> None:
        self.stage = stage
        self.volume = volume
        volume.charges = False
        self.memory = check.memory
        self.reached = check.reached
        self.findings = list(check.findings.of(stage))
        self.repairs: list[Repair] = []

    def found(self, kind: type[T]) -> Iterator[tuple[Code, T]]:
        """The findings with this kind of data."""
        for finding in self.findings:
            if isinstance(finding.data, kind):
                yield finding.code, finding.data

    def note(self, code: Code, text: str, *, ino: Ino = NO_INO, offset: int = 0) -> None:
        """Note what was repaired: a finding of this code, which names the stage."""
        assert self.stage in PROBLEMS[code].mended_by, (self.stage, code)
        self.repairs.append(Repair(code, text, ino, offset))


def batches(items: Iterable[T], most: int = BATCH) -> Iterator[list[T]]:
    """Lists of ``most`` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, most)):
        yield batch
