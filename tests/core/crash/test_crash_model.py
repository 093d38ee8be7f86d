"""Random programs with a crash after most calls: the model goes on from before or after, whichever was found."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from pkernfs.errors import FsError
from pkernfs.fs.filesystem import Filesystem
from pkernfs.region import FLUSH, Store
from tests.core.crash.proof import chosen_of
from tests.core.crash.scratch import Mark, Scratch, some_words
from tests.core.support import content, new_fs, open_fs
from tests.core.test_model import Machine, Node, run_machine

Model = tuple[Node, dict[int, Node]]


@functools.cache
def empty_image() -> bytes:
    return bytes(new_fs(14).region.view)


class Armed:
    """A call that is to be cut: what was there before it."""

    def __init__(self, model: Model, mark: Mark, *, content: bool) -> None:
        self.model = model
        self.mark = mark
        self.content = content


class CrashMachine(Machine):
    """After three calls of four the server is killed at a random store of the call, which may be torn."""

    volatile: ClassVar[bool] = False

    def made(self) -> Filesystem:
        self.region = Scratch(empty_image())
        self.region.reset(volatile=self.volatile)
        self.rng = random.Random(0)
        self.armed: Armed | None = None
        return open_fs(self.region)

    @initialize(seed=st.integers(0, 1 << 32))
    def begin_randomly(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def expect(self, number: int, operation: Callable[[], Any], *, content: bool = False, last: bool = True) -> Any:
        self.armed = None
        if last and self.rng.random() < 0.75:
            self.region.undo.clear()
            self.region.log.clear()
            model = copy.deepcopy((self.root, self.orphans))
            self.armed = Armed(model, self.region.mark(), content=content)
        return super().expect(number, operation, content=content, last=last)

    @invariant()
    def crash(self) -> None:
        armed, self.armed = self.armed, None
        if armed is None or not self.region.log:
            return
        log = list(self.region.log)
        self.region.take_back(armed.mark)
        self.region.apply(self.left_of(log))
        before, after = armed.model, (self.root, self.orphans)
        self.fs = open_fs(self.region)
        self.fs.reclaimer.in_background = self.lazy
        if not self.goes_on(after, before, armed) and not self.goes_on(before, after, armed):
            self.compare()

    def left_of(self, log: list[Store]) -> list[Store]:
        """What a crash leaves of these stores."""
        cut = self.rng.randrange(len(log) + 1)
        return log[:cut] + (some_words(log[cut], self.rng) if cut < len(log) and not log[cut].word else [])

    def goes_on(self, model: Model, other: Model, armed: Armed) -> bool:
        """Whether this is the model of what was found; it is the machine's from now on."""
        self.root, self.orphans = other
        others = {node.ino: node.data for node in self.nodes()}
        self.root, self.orphans = model
        self.close_all()
        try:
            if armed.content:
                for node in self.nodes():
                    if not node.is_dir and node.data != others.get(node.ino, node.data):
                        found = content(self.fs, node.ino)
                        assert len(found) == len(node.data)
                        assert is_mixed(found, bytes(node.data), bytes(others[node.ino]))
                        node.data[:] = found
            self.compare()
        except (AssertionError, FsError):
            return False
        return True


def is_mixed(found: bytes, one: bytes, other: bytes) -> bool:
    """Every byte is that of one or of the other; beyond their ends those are zeros."""
    size = len(found)
    sides = one[:size].ljust(size, b"\0"), other[:size].ljust(size, b"\0")
    for at in range(0, size, 4096):
        part, *parts = (side[at : at + 4096] for side in (found, *sides))
        if part not in parts and any(byte not in choice for byte, *choice in zip(part, *parts, strict=True)):
            return False
    return True


class PowerMachine(CrashMachine):
    """After three calls of four the power is cut: any subset of what was not flushed may have landed."""

    volatile = True

    def left_of(self, log: list[Store]) -> list[Store]:
        cut = self.rng.randrange(len(log)) + 1
        flushed = max((n for n in range(cut) if log[n] is FLUSH), default=0)
        pending = [store for store in log[flushed:cut] if store is not FLUSH]
        landed = self.rng.choice(list(chosen_of(pending, self.rng, 2))) if pending else []
        return [store for store in log[:flushed] if store is not FLUSH] + landed


@pytest.mark.parametrize("machine", [CrashMachine, PowerMachine])
def test_random_programs_with_crashes(machine: type[Machine]) -> None:
    run_machine(8, 40, machine)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("machine", [CrashMachine, PowerMachine])
def test_many_random_programs_with_crashes(machine: type[Machine]) -> None:
    run_machine(150, 80, machine)
