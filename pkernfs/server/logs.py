"""The log of a mount: a file, the journal, or the terminal.

It ends nothing and holds up nothing: what cannot be written is counted, shown in the status, and told when it can be
again.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import socket
import sys
from typing import Final

from pkernfs.errors import RegionError, printable
from pkernfs.options import MountOptions
from pkernfs.server.resources import Attempt, reserve

PATIENCE: Final = 0.5  #: seconds that the journal may take for a line

#: Of this process.  It logs nothing of itself.
log_attempt = Attempt("log", "cannot be written", quiet=True)


class Lines(logging.Formatter):
    """Lines in which nothing is left that a terminal, or the log's encoding, takes for something else."""

    def format(self, record: logging.LogRecord) -> str:
        """Names of files and of processes may stand there, which anybody chooses."""
        return "\n".join(map(printable, super().format(record).split("\n")))


class LogFile(logging.Handler):
    """A file that is opened anew when it was moved away (logrotate) or could not be opened.

    Not logging's own: its stream keeps what a full device refused, and opening anew raises where something is logged.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.fd = -1
        self._lost = 0  #: lines
        self._torn = False  #: the last line has no end

    def open(self) -> None:
        """Have the file that has the name now.  Raises OSError."""
        try:
            found = os.stat(self.path)
            if self.fd >= 0 and os.path.samestat(os.fstat(self.fd), found):
                return
        except FileNotFoundError:
            pass
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = reserve().ask(lambda: os.open(self.path, flags, 0o640))
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, and how many could not be written before it."""
        try:
            lost = f"{self._lost} lines before this one {log_attempt.why}\n" if self._lost else ""
            text = "\n" * self._torn + lost + self.format(record) + "\n"
            try:
                self.open()
            except OSError:
                if self.fd < 0:
                    raise
            self._write(text.encode(errors="backslashreplace"))
        except Exception as error:
            self._lost += 1
            log_attempt.refused(getattr(error, "strerror", None) or error)
        else:
            self._lost = 0
            log_attempt.succeeded()

    def _write(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.write(self.fd, data[done:])
        finally:
            self._torn = 0 < done < len(data) or (self._torn and not done)


class Journal(logging.handlers.SysLogHandler):
    """The journal's socket: one that takes nothing is not waited for."""

    socket: socket.socket  #: logging's own, which its types leave out
    _failed = False

    def __init__(self) -> None:
        super().__init__("/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        self.socket.settimeout(PATIENCE)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line."""
        self._failed = False
        super().emit(record)
        if not self._failed:
            log_attempt.succeeded()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802, RUF100  # logging's own name
        """It could not be sent."""
        self._failed = True
        log_attempt.refused(sys.exc_info()[1])
        self.socket.settimeout(PATIENCE)  # it may be another one now


def start_logging(options: MountOptions, *, strict: bool = True) -> None:
    """Log to a file, or to the journal (syslog's socket); warnings of Python itself too.

    Raises RegionError when that is refused, with ``strict``: before anything is mounted.
    """
    handler: logging.Handler
    logging.raiseExceptions = False  # a traceback on the terminal that has become /dev/null tells nobody
    path = options.log
    if path:
        handler = LogFile(path)
        try:
            handler.open()
        except OSError as error:
            if strict:
                raise RegionError(f"{path}: cannot write the log: {error.strerror}") from None
        handler.setFormatter(Lines("%(asctime)s pkernfs[%(process)d]: %(levelname)s: %(message)s"))
    elif os.path.exists("/dev/log") and not options.foreground:
        handler = _journal(strict)
        handler.setFormatter(Lines("pkernfs[%(process)d]: %(levelname)s: %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Lines("pkernfs: %(levelname)s: %(message)s"))
        if not options.foreground:
            # The terminal of a command that prints nothing when all is well, until that is let go of.
            handler.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.captureWarnings(True)


def _journal(strict: bool) -> logging.Handler:
    try:
        return Journal()
    except OSError as error:
        if strict:
            raise RegionError(f"/dev/log: cannot log there: {error.strerror}", hint="-o log=FILE") from None
        return logging.StreamHandler(sys.stderr)
