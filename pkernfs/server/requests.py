"""A request from its delivery to its reply: counted, known when it comes again, patient, its errors as errnos."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import trio
from pyfuse3 import FUSEError

from pkernfs.errors import CorruptError, MappedError, PkernfsError, quoted
from pkernfs.fs.filesystem import Filesystem
from pkernfs.server.handles import INO
from pkernfs.server.housekeeping import Housekeeping
from pkernfs.server.replay import COUNTING, KEYED, Replay
from pkernfs.server.space import may_wait, wait_for_space
from pkernfs.server.stats import BUGS, INDEX, SIZE

log = logging.getLogger("pkernfs")

R = TypeVar("R")


class Requests:
    """The requests of one worker.  ``counters``: see stats.py; by default private ones."""

    def __init__(self, counters: memoryview | None = None) -> None:
        self.counters = counters or memoryview(bytearray(SIZE)).cast("Q")
        self.begun = 0  #: so far
        self._told = ""  #: what to do to have more space, as it was logged
        self.at_work: dict[int, float] = {}  #: those that wait: their numbers, and when they were first seen waiting

    def tell_what_is_kept(self, how: str) -> None:
        """A request has found no space: log, once, what is to be done so that there is some.  "": there is nothing."""
        if how and how != self._told:
            log.warning("no space is left, and %s", how)
            self._told = how

    @contextmanager
    def waiting(self) -> Iterator[Callable[[], None]]:
        """The request that has begun last waits for something, with others in between.

        What it gets is to be called whenever it has come further.
        """
        number = self.begun

        def progress() -> None:
            self.at_work[number] = 0.0

        progress()
        try:
            yield progress
        finally:
            del self.at_work[number]

    def oldest(self) -> float:
        """For how many seconds, from one call to another, a request has been at work; 0.0: none was before."""
        now = trio.current_time()
        for begun, seen in self.at_work.items():
            self.at_work[begun] = seen or now
        return now - min(self.at_work.values(), default=now)


class Server(Protocol):
    """What handlers are methods of."""

    fs: Filesystem
    requests: Requests
    replay: Replay
    housekeeping: Housekeeping


def subject(args: tuple[Any, ...]) -> str:
    """What a request is about, for the log: its inode, and the name in it; nothing of its data, which is a guest's."""
    if not args or not isinstance(args[0], int):
        return "the filesystem"
    name = f", name {quoted(args[1])}" if len(args) > 1 and isinstance(args[1], bytes) else ""
    return f"inode {args[0] & INO}{name}"


def handler(function: Callable[..., R]) -> Callable[..., Coroutine[Any, Any, R]]:
    """Make a FUSE handler of a plain method, which raises PkernfsError.

    Errors become errnos, a bug becomes EIO and a traceback in the log.

    It runs without an await from its delivery to its reply, so that at most one request is executed and not answered;
    but for one that has found no space, and changed nothing.  Numbers of inodes come as Ino: pyfuse3 has int.
    """
    name = function.__name__
    keyed, index = name in KEYED, INDEX[name]
    once = keyed and name not in COUNTING

    async def call(self: Server, /, *args: Any, **kwargs: Any) -> R:
        requests, fs = self.requests, self.fs
        requests.begun += 1
        requests.counters[index] += 1
        try:
            if keyed and self.replay.begin(name, args):
                return self.replay.reply(name, args)  # type: ignore[no-any-return]
            try:
                return function(self, *args, **kwargs)
            except PkernfsError as error:
                if not may_wait(error):
                    raise
                refused = error
            with requests.waiting() as progress:
                return await wait_for_space(fs, refused, lambda: function(self, *args, **kwargs), progress)
        except PkernfsError as error:
            if isinstance(error, CorruptError):
                fs.volume.damage.note(error)
            elif error.errno == errno.ENOSPC:
                requests.tell_what_is_kept(fs.guard.how_to_release())
            elif isinstance(error, MappedError):  # an errno does not say who
                log.info("%s of %s refused: %s", name, subject(args), error)
            raise FUSEError(error.errno) from None
        except Exception:
            log.exception("a bug: %s of %s failed", name, subject(args))
            requests.counters[BUGS] += 1
            raise FUSEError(errno.EIO) from None
        finally:
            if once:
                self.replay.replies.end()
            if fs.reclaimer.pending:
                self.housekeeping.wake()

    call.__name__ = name
    call.__doc__ = function.__doc__
    return call
