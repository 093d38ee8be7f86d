"""What wakes a keeper: signals, and threads that have something for it; as bytes in a socket that it can select on."""

from __future__ import annotations

import select
import signal
import socket
from contextlib import suppress

#: Signals that end the mount.
END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


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
        for number in (*END, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def fileno(self) -> int:
        """Readable when there is something."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Wake whoever selects, from any thread."""
        with suppress(BlockingIOError):
            self._writer.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Wait until there is something, or so long."""
        select.select([self], [], [], seconds)

    def signals(self) -> list[signal.Signals]:
        """The signals of END that have come since the last call, each once.

        SIGINT before SIGTERM: systemd's ExecStop sends SIGINT, and systemd itself SIGTERM after that; of two that wait,
        Python runs the handler of the later one first.
        """
        try:
            numbers = self._reader.recv(100)
        except BlockingIOError:
            return []
        return [number for number in sorted(END) if number in numbers]
