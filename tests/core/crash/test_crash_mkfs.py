"""A crash while a filesystem is made over an old one: what is half made is not taken for a region."""

import itertools
import random
from contextlib import suppress

import pytest

from pkernfs.errors import FormatError, PkernfsError
from pkernfs.fs import mkfs as making
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import FLUSH, Store
from tests.core.crash.look import look
from tests.core.crash.proof import CrashFailure, chosen_of, state_of
from tests.core.crash.scratch import Scratch, copy_of, torn
from tests.core.crash.states import image_of
from tests.core.support import SEED, UUID


class Making:
    """mkfs over a region with files, cut."""

    def __init__(self, *, volatile: bool) -> None:
        image = image_of("small")
        self.region = Scratch(image)
        self.beginning = self.region.mark()
        self.region.reset(volatile=volatile)
        self.region.barriers = False  # commits flush nothing here: what mkfs does itself is enough
        making.mkfs(self.region, uuid=UUID, hash_seed=SEED)
        self.log = list(self.region.log)
        self.states = [state_of(copy_of(image)), state_of(copy_of(self.region.view))]
        self.region.reset(volatile=volatile)

    def judge(self, pieces: list[Store], where: str) -> int | None:
        """What is there when these stores were made, too: the old filesystem, the new one, or (None) nothing."""
        mark = self.region.mark()
        self.region.apply(pieces)
        try:
            with suppress(FormatError):
                found = look(open_filesystem(self.region))
                if found.facts not in [state.facts for state in self.states]:
                    raise CrashFailure(f"{where}: neither the old filesystem nor the new one")
                return self.states[0].facts != found.facts
        except PkernfsError as error:
            raise CrashFailure(f"{where}: {error}") from error
        finally:
            self.region.take_back(mark)
        return None

    def prefixes(self) -> None:
        rng = random.Random(1)
        found = [self.judge([], "before the first store")]
        for n, store in enumerate(self.log):
            for pieces in torn(store, 2, rng):
                assert self.judge(pieces, f"in store {n}") is None
            self.region.apply([store])
            found.append(self.judge([], f"after store {n}"))
        assert found == [0, *[None] * (len(self.log) - 1), 1]

    def power_cuts(self) -> None:
        """What may land before a flush is any subset of what was stored since the one before."""
        rng = random.Random(1)
        pending: list[Store] = []
        for n, store in enumerate([*self.log, FLUSH]):
            if store is not FLUSH:
                pending.append(store)
                continue
            all_but_one = [pending[:at] + pending[at + 1 :] for at in range(len(pending))]
            alone = [[one] for one in pending]
            for pieces in [*chosen_of(pending, rng, 4), *alone, *all_but_one] if pending else ():
                self.judge(pieces, f"the power is cut ahead of flush {n}")
            self.region.apply(pending)
            pending = []
        self.region.take_back(self.beginning)
        last = len(self.log) - 1 - self.log[::-1].index(FLUSH)
        self.region.apply(self.log[:last])
        assert self.judge([], "when mkfs has returned") == 1


def test_what_is_half_made_is_no_region() -> None:
    Making(volatile=False).prefixes()


def test_what_is_half_made_is_no_region_after_a_power_cut() -> None:
    Making(volatile=True).power_cuts()


@pytest.mark.parametrize("count", [1, 2, 3], ids=["behind the magic that goes", "before the magic", "behind it"])
def test_a_missing_flush_is_reported(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)

    def flush(region: Scratch) -> None:
        if next(calls) != count:
            region.log.append(FLUSH)

    monkeypatch.setattr(Scratch, "flush", flush)
    made = Making(volatile=True)
    with pytest.raises((CrashFailure, AssertionError)):
        made.power_cuts()
