"""From inodes back to their names: no inode says where it is named, so directories are read."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection, Iterator
from itertools import islice

from pkernfs.errors import PkernfsError
from pkernfs.format import ROOT_INO, Ino
from pkernfs.fs.directory import Directory, Entry
from pkernfs.fs.pages import read_inode
from pkernfs.fs.volume import Volume

STEP = 500  #: names that are read between two looks at anything else: 1 to 2 ms


def search(volume: Volume, inos: Collection[int], found: dict[int, list[bytes]]) -> Iterator[None]:
    """Put all paths of each inode, from the root on ("/a/b"), into ``found``, in steps of STEP names.

    Between two steps the filesystem may change: what is renamed meanwhile may be missed, or found by the name that it
    had.  Who needs one path of each stops when ``found`` has them all.  A damaged directory hides what is below it;
    nothing raises.
    """
    if ROOT_INO in inos:
        found[ROOT_INO] = [b"/"]
    todo = [(b"/", Ino(ROOT_INO))]
    seen = set()
    while todo:
        path, ino = todo.pop()
        if ino in seen:
            continue
        seen.add(ino)
        for entries in _portions(volume, ino):
            for entry in entries:
                if entry.ino in inos:
                    found.setdefault(entry.ino, []).append(path + entry.name)
                if stat.S_ISDIR(entry.mode):
                    todo.append((path + entry.name + b"/", entry.ino))
            yield


def _portions(volume: Volume, ino: Ino) -> Iterator[list[Entry]]:
    """The entries of a directory, STEP at a time; the directory is looked at anew for each."""
    first = 0
    while first >= 0:
        entries: list[Entry] = []
        try:
            for entry in islice(Directory(volume, ino, read_inode(volume.region, ino)).scan(first), STEP):
                entries.append(entry)
            first = entries[-1].key + 1 if len(entries) == STEP else -1
        except (PkernfsError, struct.error):
            first = -1
        yield entries


def paths_of(volume: Volume, inos: Collection[int]) -> dict[Ino, list[bytes]]:
    """All paths of each inode, sorted; inodes without a name are missing.  One walk over the region as it stands."""
    found: dict[int, list[bytes]] = {}
    for _ in search(volume, inos, found):
        pass
    return {Ino(ino): sorted(paths) for ino, paths in found.items()}


def a_path_of(volume: Volume, inos: Collection[int]) -> dict[Ino, str]:
    """The first path of each inode that has one."""
    return {ino: os.fsdecode(paths[0]) for ino, paths in paths_of(volume, inos).items()}
