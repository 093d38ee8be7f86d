"""Fork, for a process that others are made of: the child is its parent's."""

from __future__ import annotations

import ctypes
import gc
import os
from typing import Final

CLONE3: Final = 435  #: asm-generic/unistd.h; Linux 5.3
CLONE_PARENT: Final = 0x8000  #: linux/sched.h
WORDS: Final = 8  #: of struct clone_args as it was first; flags come first


def fork_sibling() -> int:
    """A fork: 0 in the child, whose parent is this process's; its process id here.  Raises OSError.

    Only for a process with one thread.  As os.fork() does it: Python's own state is told before and after.
    """
    python, libc = ctypes.pythonapi, ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_uint64 * WORDS)(CLONE_PARENT)
    gc.freeze()  # what is here now is never garbage, and where the collector does not look it does not write
    python.PyOS_BeforeFork()
    pid = int(libc.syscall(ctypes.c_long(CLONE3), arguments, ctypes.c_size_t(ctypes.sizeof(arguments))))
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number))
    return pid
