"""Running out of space (ENOSPC, or EDQUOT in a directory with a quota): what is tried, in order, before a caller hears.

Memory is promised when it is allocated, so a change that finds none is undone: a transaction that fails leaves nothing.
Each level begins when the one before has given up, and stands around it:

1. **Without compaction** (``Volume.compacting``).  A file gets a block of 2 MiB where pages would do, and pages are
   moved together into one: that can take more than is asked for.  The same transaction is run again without it, and
   takes just what it needs.  So it is for every change of size, and for changes of page tables.
2. **Half of it** (``Content.write``).  A write may be done in part, and stores the longest of its halves, quarters ...
   that fits, down to one page.
3. **The rest of it** (``ShortWrites.rest``).  As a caller of write(2) would, we ask for the rest, until nothing fits:
   the count is the reply, and why it ended is kept for fsync(2).  With that a region can be filled to the last page.
4. **Waiting** (``wait_for_space``).  What was removed may be just what is missing, and is freed with the kernel's
   FORGET, which is sent behind the reply to unlink(2), and can come behind the request that needs the memory.  Nothing
   of this request has been changed, so others may come in between: it waits up to four times, 75 ms in all, as long as
   there are removed files that are still referred to, and frees what has come.

In the same way a request waits whose blocks are to be zeroed first, where those are many (fs/ahead.py).

Freeing takes no part in this: without compaction it allocates nothing (but for the middle of an extent), and what it
cannot do it leaves listed, see fs/reclaim.py.  Tools on an unmounted region and fsck have level 1 and 2 only, as no
kernel refers to anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from pkernfs.errors import PkernfsError
from pkernfs.format import Ino
from pkernfs.fs.ahead import UnreadyError
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.volume import OUT_OF_SPACE

R = TypeVar("R")

#: Seconds to wait, one after the other, for the kernel's FORGET of removed files when the space has run out.
FORGETS = (0.001, 0.004, 0.02, 0.05)
#: How often blocks are made ready for one request, of which others may take some.
STEPS = 4


class ShortWrites:
    """Where writes have ended before their data.

    ``strict``: the kernel writes back what close(2) is to tell about, which it does of errors only.
    """

    def __init__(self, fs: Filesystem, *, strict: bool = False) -> None:
        self.fs = fs
        self.strict = strict
        self.ends: dict[Ino, tuple[int, PkernfsError]] = {}  #: by inode: the offset, and why

    def retried(self, ino: Ino, offset: int) -> None:
        """A write begins at ``offset``: if it is there that the last one ended, its own reply tells why."""
        if self.ends.get(ino, (-1,))[0] == offset:
            del self.ends[ino]

    def rest(self, ino: Ino, offset: int, data: bytes, done: int) -> int:
        """Write what is left of ``data`` behind ``done`` bytes of it; how many are done in all.

        A caller of write(2) sees the count and asks again for the rest.  The kernel, when it writes back pages that
        were changed through a mapping, does not look at it: fsync and msync tell.
        """
        while done < len(data):
            try:
                done += self.fs.write(ino, offset + done, data[done:])
            except PkernfsError as error:
                if self.strict:
                    raise
                self.ends[ino] = (offset + done, error)
                break
        return done

    def raise_reason(self, ino: Ino) -> None:
        """Raise, once, why a write of this file has ended too soon."""
        if ino in self.ends:
            raise self.ends.pop(ino)[1]

    def drop(self, ino: Ino) -> None:
        """Nobody can ask any more."""
        self.ends.pop(ino, None)


def may_wait(error: PkernfsError) -> bool:
    """Whether ``wait_for_space`` is for this: nothing has been changed, and there may be space later."""
    return error.errno in OUT_OF_SPACE or isinstance(error, UnreadyError)


async def wait_for_space(fs: Filesystem, error: PkernfsError, call: Callable[[], R], progress: Callable[[], None]) -> R:
    """Run ``call`` again, which has raised ``error``, out of space, and changed nothing; as often as that makes sense.

    When it has raised UnreadyError its blocks are made ready, with others in between; ``progress`` is called meanwhile.
    Raises PkernfsError, of the last time.
    """
    ahead = fs.volume.allocator.ahead
    forgets = iter(FORGETS)
    steps = 0
    try:
        while True:
            seconds = 0.0 if isinstance(error, UnreadyError) else next(forgets, None)
            if seconds is None or (seconds and not fs.reclaimer.awaits_forget()):
                raise error
            with fs.volume.replies.suspended():
                if isinstance(error, UnreadyError):
                    steps += 1
                    for _ in ahead.prepare(error.runs):
                        progress()
                        await trio.lowlevel.checkpoint()
                else:
                    await trio.sleep(seconds)
                    fs.reclaimer.settle()
            try:
                ahead.hurry = steps > STEPS
                return call()
            except PkernfsError as once_more:
                if not may_wait(once_more):
                    raise
                error = once_more
            finally:
                ahead.hurry = False
    finally:
        ahead.give_back()
