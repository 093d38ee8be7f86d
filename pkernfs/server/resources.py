"""What the host may refuse (processes, memory, descriptors, sockets, threads), and trying again.

A server keeps what it has when something is refused, says so once in the log and all the time in its status, and asks
again, less and less often.  What it will need in any case it holds from the start: poll(2) instead of a selector, as
epoll(7) wants a descriptor; some descriptors to give up when no other is to be had; one socket for all notifications.
"""

from __future__ import annotations

import codecs
import errno
import logging
import os
import resource
import select
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Final, NamedTuple, TypeVar

from pkernfs.errors import PkernfsError

log = logging.getLogger("pkernfs")

T = TypeVar("T")

# Loaded at its first use otherwise, when there may be no descriptor for that, or no Python any more.
codecs.lookup("ascii")

#: Seconds before the next try, by tries that failed one after the other.  The first comes at once: most workers die of
#: something that the next one does not meet, and everybody waits.  The last keeps a mount whose workers cannot start (a
#: package that is just being replaced) from taking a processor, and is short enough for somebody who waits for it.
BACKOFF: Final = (0.0, 0.02, 0.1, 0.5, 2.0, 10.0)
POLL_AGAIN: Final = 0.05  #: seconds before poll(2) is tried again when it is refused memory
#: What a socket says whose other end is gone; anything else is a refusal, and says nothing about the other end.
GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF, errno.ECONNREFUSED})
#: What somebody can do about a refusal that its text does not tell.
HINTS: Final = {
    errno.EMFILE: "raise its limit of open files (prlimit --nofile, LimitNOFILE=)",
    errno.ENFILE: "the host's limit of open files is reached (fs.file-max)",
    errno.EAGAIN: "a limit of processes is reached (pids.max, TasksMax=, ulimit -u)",
    errno.ENOMEM: "the host, a cgroup or a limit (ulimit -v) has no memory for it",
    errno.ENOSPC: "a filesystem is full",
}
#: What asking can raise: SubprocessError is Popen's when a child could not even say what it met.
REFUSALS: Final = (OSError, MemoryError, subprocess.SubprocessError)


class ResourceError(PkernfsError):
    """The host refuses something that a server needs, and will ask for again."""


def refusal(what: str, error: BaseException) -> ResourceError:
    """``what`` is refused: why, and what helps."""
    number = errno.EAGAIN if isinstance(error, RuntimeError) else errno.ENOMEM
    text = os.strerror(number)
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        text = error.strerror or str(error)
        if error.filename is not None:
            text = f"{text} ({os.fsdecode(error.filename)})"
    made = ResourceError(f"{what}: {text}", hint=HINTS.get(number, ""))
    made.errno = number
    return made


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Let what the host refuses be a ResourceError: of system calls, memory, programs and threads."""
    try:
        yield
    except REFUSALS as error:
        raise refusal(what, error) from None
    except RuntimeError as error:
        if "thread" not in str(error):  # "can't start new thread": Python has no class for it
            raise
        raise refusal(what, error) from None


def poll(fds: Iterable[int], seconds: float | None) -> set[int]:
    """Those of some descriptors that are readable, or at their end, within so many seconds; None: however long.

    poll(2): select(2) takes no descriptor above 1023, a selector is one more descriptor.  Refused memory is a poll that
    finds nothing.
    """
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if end is None else max(end - time.monotonic(), 0.0)
        try:
            waiting = select.poll()
            for fd in fds:
                waiting.register(fd, select.POLLIN)
            return {fd for fd, _ in waiting.poll(None if left is None else left * 1000)}
        except (OSError, MemoryError):
            time.sleep(POLL_AGAIN if left is None else min(left, POLL_AGAIN))
            if left is not None and left <= POLL_AGAIN:
                return set()


def readable(fd: int, seconds: float | None = None) -> bool:
    """Whether a descriptor is readable, or at its end, within so many seconds."""
    return bool(poll([fd], seconds))


def backoff(failures: int) -> float:
    """Seconds before the next try."""
    return BACKOFF[min(failures, len(BACKOFF) - 1)]


class Trouble(NamedTuple):
    """Something that is refused at the moment."""

    what: str
    why: str
    since: float  #: in seconds since the epoch
    next_try: float  #: in seconds from now


class Attempt:
    """Something that is tried until it works.

    ``what`` and what it ``cannot``: for log and status.  ``quiet``: nothing is logged.
    """

    def __init__(self, what: str, cannot: str = "cannot start", *, quiet: bool = False) -> None:
        self.what = what
        self.cannot = cannot
        self.quiet = quiet
        self.failures = 0
        self.why = ""  #: it did not work the last time; "": it did
        self._since = 0.0
        self._next = 0.0  #: on the monotonic clock

    def due(self) -> bool:
        """Whether it may be tried now."""
        return self.left() == 0

    def left(self) -> float:
        """Seconds until it may be tried."""
        return max(self._next - time.monotonic(), 0.0)

    def refused(self, why: object, *, ahead: int = 0, cannot: str = "") -> None:
        """It did not work; ``ahead``: steps of BACKOFF that are left out.  The same reason is logged once.

        ``cannot``: instead of the usual.
        """
        text = " ".join(f"{cannot or self.cannot}: {why}".split()).removesuffix(":")
        self.failures += 1
        wait = backoff(self.failures + ahead)
        self._next = time.monotonic() + wait
        self._since = self._since or time.time()
        if text != self.why:
            self.why = text
            if not self.quiet:
                log.error("%s: %s", self.what, text)

    def succeeded(self) -> None:
        """It works (again)."""
        if self.why and not self.quiet:
            log.info("%s: works again, after %d tries in %.1f s", self.what, self.failures, time.time() - self._since)
        self.failures, self.why, self._since, self._next = 0, "", 0.0, 0.0

    def trouble(self) -> Trouble | None:
        """What status shows; None: nothing is wrong."""
        why = self.why  # one look: another thread asks
        if not why:
            return None
        return Trouble(self.what, why, self._since, self.left())


class Reserve:
    """Descriptors that are held only to be given up where no other is to be had.

    Made before anything else is opened, so that their numbers are low: RLIMIT_NOFILE is not how many there may be, but
    the first number that a new one may not have (getrlimit(2)).
    """

    COUNT = 10  #: a start of a process takes seven: two sockets, Popen's pipe, /dev/null, the pidfd, and one of libc's

    def __init__(self) -> None:
        # Not so many that a process with few descriptors has none for what it must open.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.count = self.COUNT if limit == resource.RLIM_INFINITY else min(self.COUNT, limit // 8)
        self._fds: list[int] = []
        self.refill()

    def refill(self) -> None:
        """Take what is missing, as far as it can be had."""
        try:
            while len(self._fds) < self.count:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            pass

    def ask(self, call: Callable[[], T]) -> T:
        """``call``, once more with the reserve given up when it raises OSError for want of a descriptor."""
        try:
            return call()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
        try:
            return call()
        finally:
            self.refill()


@cache
def reserve() -> Reserve:
    """The one of this process; the first call makes it."""
    return Reserve()
