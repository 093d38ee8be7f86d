"""Run an operation, cut it, recover, judge what is found.

A proof fails with CrashFailure when what a mount finds after a crash is not one of the states that it may be, when the
full check finds anything, when the filesystem does not work on, or when the mount is refused.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pkernfs.errors import FsError, PkernfsError
from pkernfs.format import PAGE
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import FLUSH, Region, Store
from tests.core.crash.look import State, assert_works, look, metadata_key, mixed
from tests.core.crash.operations import OPERATIONS, Operation, Run, setattr_
from tests.core.crash.scratch import Scratch, all_but_a_word, copy_of, scratch_of, some_words, torn
from tests.core.crash.states import empty_space, image_of
from tests.core.support import check, open_fs


class CrashFailure(AssertionError):
    """A crash that hurts: where the cut was, and what was found."""


class Tally:
    """How much was proven."""

    def __init__(self) -> None:
        self.cases = 0
        self.stores = 0  #: cuts after a store
        self.torn = 0  #: cuts in a store
        self.recovery = 0  #: cuts while recovering
        self.power = 0  #: power cuts: subsets of what was not flushed
        self.images = 0  #: different regions after recovery, each checked and looked at

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


#: Regions that were used to their end, by metadata_key: what that meets is metadata, and old bytes in free memory.
WORKS: set[int] = set()


class Recording(NamedTuple):
    """What was done, and the states that may be found: before, after each call."""

    region: Scratch  #: as it was before
    log: list[Store]
    states: list[State]


def state_of(region: Region) -> State:
    """Mount, check, look."""
    fs = open_fs(region)
    assert check(fs.volume) == []
    return look(fs)


def record(image: bytes, runs: Sequence[Run], *, volatile: bool = False) -> Recording:
    """Mount and make the calls; one that fails for lack of space changes nothing."""
    states = [state_of(copy_of(image))]
    region = scratch_of(image)
    region.reset(volatile=volatile)
    fs = open_fs(region)
    fs.times.policy = "noatime"
    for run in runs:
        try:
            run(fs)
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
        states.append(state_of(copy_of(region.view)))
    log = list(region.log)
    region.reset(volatile=volatile)
    return Recording(region, log, states)


class Proof:
    """Crashes of one recording, to be proven once.  ``refusal``: a mount that is refused with one line will do too."""

    def __init__(self, recording: Recording, operation: Operation, *, refusal: bool = False) -> None:
        self.recording = recording
        self.content = operation.content
        self.refusal = refusal
        self.last = len(recording.states) - 1
        self.region = recording.region
        self.tally = Tally()
        self.tally.cases = 1
        self._judged: dict[tuple[int, int], int] = {}
        self._verdicts: dict[int, int] = {}
        self._cut_again: set[tuple[int, tuple[int, int]]] = set()

    # -- judging ----------------------------------------------------------------------------------------------------

    def judge(self, where: str) -> int:
        """Mount what the region holds: which of the states it is.  Leaves it as it was."""
        region = self.region
        key = region.keys()
        if key not in self._judged:
            mark = region.mark()
            try:
                open_filesystem(region)
                rest = region.keys()[1]
                if rest not in self._verdicts:
                    self._verdicts[rest] = self._verdict()
                self._judged[key] = self._verdicts[rest]
            except PkernfsError as error:
                if not self.refusal:
                    raise CrashFailure(f"{where}: {error}") from error
                self._judged[key] = self.last
            except Exception as error:
                raise CrashFailure(f"{where}: {error!r}") from error
            finally:
                region.take_back(mark)
        return self._judged[key]

    def recovery(self) -> list[Store]:
        """What recovery stores.  Made anew each time: to keep all of them would take more memory than there is."""
        mark = self.region.mark()
        self.region.log.clear()
        try:
            open_filesystem(self.region)
            return list(self.region.log)
        except PkernfsError:
            return []
        finally:
            self.region.take_back(mark)

    def _verdict(self) -> int:
        self.tally.images += 1
        twin = copy_of(self.region.view)
        fs = open_fs(twin)
        problems = check(fs.volume)
        assert problems == [], f"the check finds {problems[:3]}"
        found = self._which(look(fs))
        key = metadata_key(fs)
        if key not in WORKS:
            assert_works(twin, empty_space())
            WORKS.add(key)
        return found

    def _which(self, found: State) -> int:
        states = self.recording.states
        for n in reversed(range(len(states))):
            if found == states[n]:
                return n
        for n, state in enumerate(states):
            if self.content and self._is_written(found, state):
                return n
        paths = set(found.facts) ^ set(states[-1].facts)
        differ = {path for path, facts in states[-1].facts.items() if found.facts.get(path) != facts}
        raise AssertionError(f"neither before nor after: names {sorted(paths)}, inodes {sorted(differ)}")

    def _is_written(self, found: State, state: State) -> bool:
        """All but times is that of ``state``; content may be there in part."""
        first, last = self.recording.states[0].content, self.recording.states[-1].content
        return (found.facts, found.space) == (state.facts, state.space) and all(
            content in (first[path], last[path]) or mixed(content, first[path], last[path])
            for path, content in found.content.items()
        )

    # -- the server, the mount or the kernel ends: any prefix -------------------------------------------------------

    def prefixes(self, *, ways: int, depth: int = 0) -> None:
        """Cut at every store, torn in ``ways`` ways; and ``depth`` times again while recovering."""
        rng = random.Random(1)
        log = self.recording.log
        reached = self._crash([], "before the first store", depth, rng)
        for n, store in enumerate(log):
            where = f"store {n} of {len(log)} at {store.offset:#x}"
            for pieces in torn(store, ways, rng):
                self.tally.torn += 1
                self._crash(pieces, f"in {where}", depth, rng)
            self.region.apply([store])
            self.tally.stores += 1
            index = self._crash([], f"after {where}", depth, rng)
            if index < reached:
                raise CrashFailure(f"after {where}: state {reached} had been there")
            reached = index
        if reached != self.last:
            raise CrashFailure("after the last store: what was done is not there")

    def _crash(self, pieces: list[Store], where: str, depth: int, rng: random.Random) -> int:
        region = self.region
        mark = region.mark()
        region.apply(pieces)
        index = self.judge(where)
        key = depth, region.keys()
        if depth and key not in self._cut_again:
            self._cut_again.add(key)
            log = self.recovery()
            for n, store in enumerate(log):
                again = f"{where}, then while recovering at store {n} of {len(log)}"
                for torn_pieces in torn(store, 1, rng):
                    self.tally.recovery += 1
                    self._crash(torn_pieces, again, depth - 1, rng)
                region.apply([store])
                self.tally.recovery += 1
                self._crash([], again, depth - 1, rng)
        region.take_back(mark)
        return index

    # -- the machine ends: any subset of what was not flushed -------------------------------------------------------

    def power_cuts(self, *, subsets: int, depth: int = 0) -> None:
        """Cut the power at every store.

        ``subsets``: random ones, beside none, all, only the last, all but a store, all but a word.

        ``depth``: again while recovering, and while recovering after a mere kill.
        """
        self._cut_power(self.recording.log, [], "", random.Random(2), subsets, depth)
        # What has returned is there, and what only stores content is after a flush.
        log = self.recording.log
        flushes = [n for n, store in enumerate(log) if store is FLUSH]
        unflushed = log[flushes[-1] if flushes else 0 :]
        if not self.content and self.judge("after the last store, none of the unflushed") != self.last:
            raise CrashFailure("after the last store: what was done is not on the medium")
        self.region.apply(unflushed)
        if self.judge("after a last flush") != self.last:
            raise CrashFailure("after a last flush: what was done is not there")

    def committed_in_part(self, *, subsets: int) -> None:
        """Cut the power at the first commit record, on a medium that orders nothing."""
        log = self.recording.log
        commit = next(n for n, store in enumerate(log) if store.word and store.offset == self.region.journal[0] * PAGE)
        rng = random.Random(3)
        for chosen in [some for _ in range(subsets) for some in chosen_of(log[: commit + 1], rng, 1)]:
            self.tally.power += 1
            mark = self.region.mark()
            self.region.apply(chosen)
            self.judge("the power is cut at the commit")
            self.region.take_back(mark)

    def _cut_power(
        self, log: list[Store], pending: list[Store], where: str, rng: random.Random, subsets: int, depth: int
    ) -> None:
        """The region holds what is on the medium; afterwards it holds all that ``log`` flushed."""
        region = self.region
        for n, store in enumerate(log):
            if store is FLUSH:
                region.apply(pending)
                pending = []
                continue
            pending = [*pending, store]
            here = f"{where}the power is cut at store {n} of {len(log)} at {store.offset:#x}"
            for chosen in chosen_of(pending, rng, subsets):
                self.tally.power += 1
                mark = region.mark()
                region.apply(chosen)
                self.judge(here)
                self._again([], f"{here}, then ", rng, subsets, depth)
                region.take_back(mark)
            if depth:
                self._again(pending, f"{where}killed at store {n} of {len(log)}, then ", rng, subsets, depth)

    def _again(self, pending: list[Store], where: str, rng: random.Random, subsets: int, depth: int) -> None:
        """Cut the power while recovering; ``pending``: what a mere kill before has left unflushed."""
        key = depth, self.region.keys()
        if not depth or (not pending and key in self._cut_again):
            return
        mark = self.region.mark()
        self.region.apply(pending)
        recovery = self.recovery()
        self.region.take_back(mark)
        if not recovery:
            return
        if not pending:
            self._cut_again.add(key)
        self._cut_power(recovery, pending, where, rng, subsets, depth - 1)
        self.region.take_back(mark)


def chosen_of(pending: list[Store], rng: random.Random, subsets: int) -> Iterator[list[Store]]:
    """What of ``pending`` may have landed when the power is cut at its last store."""
    at = rng.randrange(len(pending))
    if len(pending) == 1:
        yield []
    else:
        yield [pending[-1]]
        yield [*pending[:at], *pending[at + 1 :]]
    yield [*pending[:at], *all_but_a_word(pending[at], rng), *pending[at + 1 :]]
    yield pending
    for _ in range(subsets):
        yield [piece for store in pending for piece in some_words(store, rng)]


#: Ahead of the operation in media mode, so that its first body goes over a transaction just checkpointed.
PROLOGUE = setattr_(b"", uid=7)


def prove_prefixes(state: str, name: str, *, ways: int, depth: int = 0) -> Tally:
    """The proof for crashes of everything but the machine.  Raises CrashFailure."""
    operation = OPERATIONS[name]
    proof = Proof(record(image_of(state), [operation.run]), operation)
    proof.prefixes(ways=ways, depth=depth)
    return proof.tally


def prove_power_cuts(state: str, name: str, *, subsets: int, depth: int = 0) -> Tally:
    """The proof for power cuts.  Raises CrashFailure."""
    operation = OPERATIONS[name]
    recording = record(image_of(state), [PROLOGUE, operation.run], volatile=True)
    proof = Proof(recording, operation)
    proof.power_cuts(subsets=subsets, depth=depth)
    return proof.tally
