"""File handles: the inode number, with what the next worker must know of how the file was opened.

No table of open files stands behind them, so that a worker which takes over can serve them at once.
"""

from __future__ import annotations

import os
from typing import Final

KILL_PRIV: Final = 1 << 62  #: the opener may not keep set-user-ID bits when it writes
NOATIME: Final = 1 << 61  #: reading through it stores no access time
INO: Final = NOATIME - 1  #: mask: the inode number


def handle(ino: int, flags: int, uid: int) -> int:
    """The handle of a file that ``uid`` opens with ``flags`` of open(2)."""
    # What writes back reads, to complete a page, from files that are open for writing only.
    no_reader = flags & (os.O_NOATIME | os.O_WRONLY)
    return ino | (KILL_PRIV if uid else 0) | (NOATIME if no_reader else 0)
