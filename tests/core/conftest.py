"""Fixtures of the core tests: every filesystem that a test made must be sound when the test ends."""

from collections.abc import Callable, Iterator

import pytest

from pkernfs.fs.filesystem import Filesystem
from tests.core.support import assert_sound, new_fs, open_fs


@pytest.fixture
def make_fs() -> Iterator[Callable[..., Filesystem]]:
    """Make filesystems: ``make_fs(mib)``."""
    made = []

    def make(mib: int = 64) -> Filesystem:
        made.append(new_fs(mib))
        return made[-1]

    yield make
    for fs in made:
        assert_sound(fs)
        # The same again from what is in the region only.
        again = open_fs(fs.region)
        assert_sound(again)


@pytest.fixture
def fs(make_fs: Callable[..., Filesystem]) -> Filesystem:
    """A filesystem of 64 MiB in memory."""
    return make_fs()
