"""File handles: the inode number, with what the next worker must know of how the file was opened.

No table of open files stands behind them, so that a worker which takes over can serve them at once.
"""

from __future__ import annotations

import os
from typing import Any, Final

from pkernfs.format import Ino

KILL_PRIV: Final = 1 << 62  #: the opener may not keep set-user-ID bits when it writes
NOATIME: Final = 1 << 61  #: reading through it stores no access time
#: Mask: the inode number.  Of type Any, so that ``fh & INO`` is an Ino without a call in each read and write.
INO: Final[Any] = NOATIME - 1


def handle(ino: Ino, flags: int, uid: int) -> int:
    """The handle of a file that ``uid`` opens with ``flags`` of open(2)."""
    # What writes back reads, to complete a page, from files that are open for writing only.
    no_reader = flags & (os.O_NOATIME | os.O_WRONLY)
    return ino | (KILL_PRIV if uid else 0) | (NOATIME if no_reader else 0)
