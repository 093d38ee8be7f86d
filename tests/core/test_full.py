"""Regions without room for pages, inodes, host memory or a transaction.

ENOSPC and no change, or it works; and deleting always works.
"""

from __future__ import annotations

import errno
import functools
import random
from contextlib import suppress

import pytest

from pkernfs.errors import FsError
from pkernfs.format import PAGE
from pkernfs.fs.filesystem import Filesystem, Statfs
from pkernfs.fs.mkfs import mkfs
from pkernfs.region import MemoryRegion
from tests.core.support import (
    ROOT,
    SEED,
    UUID,
    MiB,
    assert_sound,
    content,
    mkfile,
    new_fs,
    open_fs,
    remove_all,
    unchanged,
)
from tests.core.tight import FREES, OPERATIONS, STATES, handicap

SIZE = 16 * MiB


@functools.cache
def image_of(state: str) -> tuple[bytes, Statfs]:
    """A region in one of the states, and what it had free when it was new."""
    region = MemoryRegion(SIZE)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    fs = open_fs(region)
    empty = fs.statfs()
    STATES[state](fs)
    return bytes(region.view), empty


def in_state(state: str) -> Filesystem:
    """A filesystem in one of the states."""
    fs = open_fs(MemoryRegion(image=image_of(state)[0]))
    handicap(fs, state)
    return fs


@pytest.mark.parametrize("state", STATES)
def test_no_room(state: str) -> None:
    """What has no room fails with ENOSPC and changes nothing."""
    fs = in_state(state)
    for operation in OPERATIONS.values():
        if state in operation.fails.split():
            unchanged(fs, errno.ENOSPC, functools.partial(operation.run, fs, fs.resolve))
    assert_sound(open_fs(MemoryRegion(image=fs.region.view)))


@pytest.mark.parametrize("state", STATES)
def test_what_needs_no_room(state: str) -> None:
    """All else works as ever, removing above all."""
    for operation in OPERATIONS.values():
        if state not in operation.fails.split():
            fs = in_state(state)
            operation.run(fs, fs.resolve)
            assert_sound(fs)


@pytest.mark.parametrize("state", ["pages", "inodes", "host"])
def test_everything_can_be_deleted_and_used_again(state: str) -> None:
    fs = in_state(state)
    for operation in OPERATIONS.values():
        if operation.fails == FREES:
            with suppress(FsError):  # the file is gone already
                operation.run(fs, fs.resolve)
    assert_sound(fs)
    remove_all(fs, fs.resolve(b""))
    fs = open_fs(MemoryRegion(image=fs.region.view))
    assert_sound(fs)
    empty = image_of("pages")[1]
    assert fs.statfs() == empty
    ino = mkfile(fs, b"f")
    free = fs.statfs().free
    done = 0
    while done < free * PAGE:
        done += fs.write(ino, done, b"\x55" * min(MiB, free * PAGE - done))
    assert fs.statfs().free == 0
    assert content(fs, ino) == b"\x55" * done


@pytest.mark.parametrize("seed", range(4))
def test_all_free_pages_can_be_written(seed: int) -> None:
    """Also those of a fragmented region: each page that was free holds data now, or what is needed to find them."""
    rng = random.Random(seed)
    fs = new_fs(32)
    for n in range(150):
        mkfile(fs, b"%d" % n, b"x" * rng.choice([1, 5000, 30_000, 1_100_000 if n % 10 == 0 else 1]))
    for n in rng.sample(range(150), 100):
        fs.unlink(ROOT, b"%d" % n)
    ino = mkfile(fs, b"new")
    before, slabs = fs.statfs().free, len(fs.volume.space.slab_blocks())
    done = 0
    with suppress(FsError):
        while True:
            done += fs.write(ino, done, b"\x55" * rng.choice([1000, PAGE, 50_000, MiB]))
    headers = len(fs.volume.space.slab_blocks()) - slabs
    inode = fs.getattr(ino)
    left = fs.statfs().free
    # One page can be left where its data would need another one for a node.
    assert left <= 1
    assert before - left == inode.pages + headers
    assert inode.pages - -(-done // PAGE) < 8
    assert content(fs, ino) == b"\x55" * done
    assert_sound(fs)
