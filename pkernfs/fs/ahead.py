"""Making free blocks ready ahead of the transaction that takes them: zeroing many takes long, and others wait.

Memory on the host costs 0.2 to 1 s for each GiB (tmpfs allocates and clears, device DAX stores zeros), and while one
handler runs no other does: a guest of 100 GiB would stop the mount for so long that its keeper takes the worker for
lost.  So whoever can wait lets the allocation be refused, makes the blocks ready in steps, and asks again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pkernfs.errors import FsError, PkernfsError
from pkernfs.format import BLOCK, BlockNo
from pkernfs.fs.runs import joined_runs
from pkernfs.fs.space import Space

STEP = 8  #: blocks: 3 to 10 ms


class UnreadyError(PkernfsError):
    """More free blocks were to be allocated than can be made ready at once: nothing has been changed."""

    errno = errno.EAGAIN

    def __init__(self, runs: list[tuple[BlockNo, int]]) -> None:
        super().__init__(f"{sum(count for _, count in runs)} blocks are not ready")
        self.runs = runs


class Ahead:
    """Which free blocks are zero and have memory behind them; known to this process only."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.region = space.region
        self.ready: set[int] = set()
        self.stepping = False
        self.hurry = False  #: no steps: for who has tried often, and found what was made ready taken or given back
        self.users = 0  #: how many are making blocks ready

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """What would take longer than a step raises UnreadyError instead: to be tried again after ``prepare``."""
        self.stepping = not self.hurry
        try:
            yield
        finally:
            self.stepping = False

    def _unready(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        if not self.ready:
            return list(runs)
        return list(
            joined_runs((one, 1) for at, count in runs for one in range(at, at + count) if one not in self.ready)
        )

    def reserve(self, runs: list[tuple[BlockNo, int]]) -> None:
        """Reserve runs of free blocks, all or none, as Region.reserve does.  Raises FsError(ENOSPC), UnreadyError."""
        unready = self._unready(runs)
        if self.stepping and sum(count for _, count in unready) > STEP:
            raise UnreadyError(runs)
        for number, (at, count) in enumerate(unready):
            try:
                self.region.reserve(at * BLOCK, count * BLOCK)
            except FsError:
                for done, length in unready[:number]:
                    self.region.discard(done * BLOCK, length * BLOCK)
                raise
        for at, count in runs if self.ready else ():
            self.ready.difference_update(range(at, at + count))

    def prepare(self, runs: list[tuple[BlockNo, int]]) -> Iterator[None]:
        """Make blocks ready, as long as they are free; others may come in between the steps.

        Raises FsError(ENOSPC).  What was made ready and is not taken is for ``give_back``.
        """
        self.users += 1
        try:
            for first, length in runs:
                for at in range(first, first + length, STEP):
                    free = [(one, 1) for one in range(at, min(at + STEP, first + length)) if not self.space.table[one]]
                    for start, count in self._unready(joined_runs(free)):
                        self.region.reserve(start * BLOCK, count * BLOCK)
                        self.ready.update(range(start, start + count))
                    yield
        finally:
            self.users -= 1

    def give_back(self) -> None:
        """Give back to the host what is ready and was not taken, unless somebody is at it."""
        if self.ready and not self.users:
            for at, count in joined_runs((one, 1) for one in sorted(self.ready)):
                self.region.discard(at * BLOCK, count * BLOCK)
            self.ready.clear()
