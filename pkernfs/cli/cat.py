"""pkernfs cat: print files of a region, without a mount."""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

from pkernfs.cli.arguments import region_and_path
from pkernfs.cli.parsers import Verb
from pkernfs.errors import FsError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import Filesystem

DESCRIPTION = """\
Print files of a region that need not be mounted.  Nothing is written; what its journal still holds is replayed in
memory.

  pkernfs cat /dev/shm/pkernfs.img:/vms/7/state >state
"""
CHUNK = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """REGION:PATH, several."""
    parser.add_argument("targets", metavar="REGION:PATH", nargs="+", help="files of a region")


def run(arguments: argparse.Namespace) -> int:
    """Copy each file to standard output.  Raises PkernfsError."""
    from pkernfs.cli.offline import with_filesystem

    for target in arguments.targets:
        region, path = region_and_path(target)
        with_filesystem(region, lambda fs, path=path: _print(fs, path))  # type: ignore[misc]
    return 0


def _print(fs: Filesystem, path: str) -> None:
    ino = fs.resolve(os.fsencode(path))
    inode = fs.getattr(ino)
    if not stat.S_ISREG(inode.mode):
        raise FsError(errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL, path)
    out = sys.stdout.buffer
    for offset in range(0, inode.size, CHUNK):
        with memoryview(fs.read(ino, offset, CHUNK)) as part:
            out.write(part)
    out.flush()


VERBS = {"cat": Verb(DESCRIPTION, add_arguments, run)}
