"""Damaged regions: operations give a result or an error that names the damage; none hangs, none is a bug."""

import stat
from collections.abc import Callable
from typing import Any

import pytest

from pkernfs.errors import PkernfsError
from pkernfs.fs.filesystem import Filesystem, SetAttr
from pkernfs.fs.names import RENAME_EXCHANGE
from tests.core.support import ME, ROOT, open_fs
from tests.core.test_check import damaged_regions


def attempt(operation: Callable[..., Any], *args: Any) -> Any:
    """The result; None instead of an error that a user may see."""
    try:
        return operation(*args)
    except PkernfsError:
        return None


def read_everything(fs: Filesystem) -> None:
    """Read all that can be reached."""
    todo = [int(ROOT)]
    seen: set[int] = set()
    while todo and len(seen) < 2000:
        ino = todo.pop()
        if ino in seen or attempt(fs.getattr, ino) is None:
            continue
        seen.add(ino)
        for name in attempt(fs.listxattr, ino) or ():
            attempt(fs.getxattr, ino, name)
        entries = attempt(lambda number: list(fs.readdir(number)), ino) or ()
        todo += [entry.ino for entry in entries]
        attempt(fs.read, ino, 0, 300_000)
        attempt(fs.readlink, ino)
        attempt(fs.extents, ino)
    attempt(fs.statfs)
    attempt(fs.orphans)


def change_everything(fs: Filesystem) -> None:
    """Call every operation that changes something."""
    names = [b"g", b"big", b"sparse", b"link", b"empty", b"d", b"name1"]
    for name in names:
        ino = attempt(fs.lookup, ROOT, name)
        if ino:
            attempt(fs.setxattr, ino, b"user.new", b"v" * 3000)
            attempt(fs.removexattr, ino, b"user.large")
            attempt(fs.write, ino, 5000, b"x" * 200_000)
            attempt(fs.setattr, ino, SetAttr(size=3 << 20))
            attempt(fs.setattr, ino, SetAttr(size=5000))
            attempt(fs.link, ino, ROOT, name + b"2")
        attempt(fs.create, ROOT, b"new" + name, stat.S_IFREG, ME)
        attempt(fs.rename, ROOT, name, ROOT, b"empty", RENAME_EXCHANGE)
        attempt(fs.rename, ROOT, b"new" + name, ROOT, name)
    for name in names:
        attempt(fs.unlink, ROOT, name)
        attempt(fs.rmdir, ROOT, name)
    for ino in attempt(fs.orphans) or ():
        attempt(fs.forget, ino, 1)


@pytest.mark.parametrize("seed", range(10))
def test_damaged_regions_can_be_used(seed: int) -> None:
    for region in damaged_regions(seed, 40):
        damaged = attempt(open_fs, region)
        if damaged:
            read_everything(damaged)
            change_everything(damaged)
            assert damaged.volume.tx is None
