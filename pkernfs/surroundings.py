"""What a process has from whoever started it, and must not depend on.

Descriptors, signals, limits, umask, scheduling, PATH: a mount may be started by cron, by a shell script, by a daemon of
somebody else's or by systemd, and outlives all of them.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from typing import Final

#: Limits of a session that are not meant for a filesystem: they end it, or let its calls fail.
LIMITS: Final = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
DESCRIPTORS: Final = 1024  #: that a server must be able to have
PROGRAMS: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OTHER_CLASSES: Final = (os.SCHED_BATCH, os.SCHED_IDLE, os.SCHED_FIFO, os.SCHED_RR)


def open_standard_descriptors() -> None:
    """Let 0, 1 and 2 be open: what is opened next would get the number of one that is not, and its input and output.

    The kernel does so for set-user-ID programs only (and glibc, for the same).
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)


def raise_limits(*, ours: bool) -> None:
    """Let the soft limit of descriptors be the hard one, as systemd.exec(5) asks of programs that do not use select(2).

    ``ours``: limits were set for this very process, and not for the session that it was started from; otherwise those
    that could end it are lifted, too, as far as the host lets us.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _limit(resource.RLIMIT_NOFILE, max(hard, DESCRIPTORS) if hard != resource.RLIM_INFINITY else hard, hard)
    for kind in () if ours else LIMITS:
        _limit(kind, resource.RLIM_INFINITY, resource.getrlimit(kind)[1])


def _limit(kind: int, wanted: int, hard: int) -> None:
    """Raise soft and hard limit, or only the soft one where the hard one may not be raised."""
    for value in (wanted, hard):
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))
            return


def settle(*, ours: bool, foreground: bool) -> None:
    """For a process that is to serve a mount.  ``ours``: it was started to be nothing else (by systemd).

    In the foreground SIGHUP stays ignored where it is: nohup(1) wants that.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # Ignored, it lets waitpid(2) find no child; Python itself sees to SIGPIPE and SIGXFSZ.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not foreground:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.umask(0o022)
    raise_limits(ours=ours)
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{path}:{PROGRAMS}" if path else PROGRAMS
    if ours:
        return
    # Whoever uses the mount would wait for a server that runs when nothing else does, or would not run beside one that
    # goes first.  Affinity stays: it may have been set for the mount.
    with suppress(OSError):
        if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK in OTHER_CLASSES:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
