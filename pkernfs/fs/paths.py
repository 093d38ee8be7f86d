"""From inodes back to their names: no inode says where it is named, so directories are read."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection

from pkernfs.errors import PkernfsError
from pkernfs.format import ROOT_INO
from pkernfs.fs.directory import Directory
from pkernfs.fs.pages import read_inode
from pkernfs.fs.volume import Volume


def paths_of(volume: Volume, inos: Collection[int]) -> dict[int, list[bytes]]:
    """All paths of each inode from the root on ("/a/b"), sorted; inodes without a name are missing.

    One walk over the region as it stands.  A damaged directory hides what is below it; nothing raises.
    """
    found: dict[int, list[bytes]] = {int(ROOT_INO): [b"/"]} if ROOT_INO in inos else {}
    todo = [(b"/", int(ROOT_INO))]
    seen = set()
    while todo:
        path, ino = todo.pop()
        if ino in seen:
            continue
        seen.add(ino)
        try:
            for entry in Directory(volume, ino, read_inode(volume.region, ino)).scan():
                if entry.ino in inos:
                    found.setdefault(entry.ino, []).append(path + entry.name)
                if stat.S_ISDIR(entry.mode):
                    todo.append((path + entry.name + b"/", entry.ino))
        except (PkernfsError, struct.error):
            continue
    return {ino: sorted(paths) for ino, paths in found.items()}


def a_path_of(volume: Volume, inos: Collection[int]) -> dict[int, str]:
    """The first path of each inode that has one."""
    return {ino: os.fsdecode(paths[0]) for ino, paths in paths_of(volume, inos).items()}
