"""Going to the background: the parent waits until the child is ready, and ends as the child says."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import Self

from pkernfs.errors import PkernfsError, RegionError, printable
from pkernfs.server.resources import reserve


class Daemon:
    """The child's end of the pipe to the waiting parent."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Let the parent end with 0, and let go of the terminal."""
        os.write(self._pipe, b"\0")
        os.close(self._pipe)
        self._pipe = -1
        let_go_of_terminal()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error before ``ready`` is told on the terminal and becomes the parent's exit code."""
        if error is None:
            return
        if self._pipe < 0:
            import logging

            logging.getLogger("pkernfs").critical("the server ends: %s", error, exc_info=error)
        elif isinstance(error, PkernfsError):
            print(f"mount.pkernfs: {printable(str(error))}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(32)


def let_go_of_terminal() -> None:
    """Nothing to read, and what is printed goes nowhere."""
    try:
        null = reserve().ask(lambda: os.open(os.devnull, os.O_RDWR))
    except OSError:  # it stays open, which is no harm to the mount
        return
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def daemonize() -> Daemon | None:
    """Fork: in the child, a new session and the Daemon to report with; in the parent None, once the child is ready.

    The parent exits with the child's code when the child ends before it is ready.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        reader, writer = os.pipe()
        child = os.fork()
    except OSError as error:
        raise RegionError(
            f"cannot go to the background: {error.strerror}", hint="--foreground stays in front"
        ) from None
    if child:
        os.close(writer)
        if os.read(reader, 1):
            return None
        _, status = os.waitpid(child, 0)
        # Without running this process's own exit handlers: the filesystem belongs to the child.
        os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 32)
    os.close(reader)
    os.setsid()
    os.chdir("/")
    return Daemon(writer)
