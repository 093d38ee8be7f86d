"""What wakes a keeper: signals, and threads that have something for it; as bytes in a socket that it can poll."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pkernfs.errors import PkernfsError
from pkernfs.server.resources import POLL_AGAIN, poll

#: Signals that end the mount.
END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
TICK: Final = 0.5  #: seconds between two looks at everything else, at most
#: Seconds that what is waited for may take when a signal says that the mount is to end: a takeover takes milliseconds,
#: and then all that is dirty is written back; without a worker it is lost.
LET_FINISH: Final = 3.0


class EndWantedError(PkernfsError):
    """A signal says that the mount is to end."""


class Wakeup:
    """Both ends of the socket.  One for each process: signals of the whole process come there.

    set_wakeup_fd and not handlers that do something: those run between any two bytecodes, also in the middle of a hand-
    over.  Not signalfd(2) either: the signals would have to be blocked, and programs that are started inherit that.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        for one in (self._reader, self._writer):
            one.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._pending: set[int] = set()
        self.tick: Callable[[], object] = lambda: None  #: what is done while something is waited for
        for number in (*END, signal.SIGCHLD):
            # nohup(1) has it ignored; in the background it is not any more (surroundings.py).
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        """All that a handler does: the byte in the socket may have been refused."""
        if number in END:
            self._pending.add(number)

    def fileno(self) -> int:
        """Readable when there is something."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Wake whoever selects, from any thread."""
        with suppress(OSError):  # the next turn of the loop comes anyway
            self._writer.send(b"\0")

    def pause(self, seconds: float) -> None:
        """Wait so long, or until a signal of END comes.  Raises EndWantedError."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            poll([self.fileno()], min(left, TICK))
            self._pass(0.0)

    def readable(self, fd: int, seconds: float | None = None) -> bool:
        """As resources.readable, with all that a keeper must do meanwhile.

        Raises EndWantedError when a signal of END has come and it is not so within LET_FINISH seconds.
        """
        begin = time.monotonic()
        while True:
            passed = time.monotonic() - begin
            left = TICK if seconds is None else min(seconds - passed, TICK)
            if fd in poll([fd, self.fileno()], max(left, 0.0)):
                return True
            if left <= 0:
                return False
            self._pass(LET_FINISH - passed)

    def _pass(self, left: float) -> None:
        self.tick()
        self._collect()
        if self._pending and left <= 0:
            raise EndWantedError("the mount is being unmounted")

    def _collect(self) -> None:
        try:
            while self._reader.recv(100):
                pass
        except BlockingIOError:
            pass
        except OSError:
            time.sleep(POLL_AGAIN)  # refused, and still there: whoever polls would do nothing else

    def signals(self) -> list[signal.Signals]:
        """The signals of END that have come since the last call, each once.

        SIGINT before SIGTERM: systemd's ExecStop sends SIGINT, and systemd itself SIGTERM after that.
        """
        self._collect()
        found = self._pending & END
        self._pending -= found
        return sorted(signal.Signals(number) for number in found)
