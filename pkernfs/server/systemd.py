"""systemd's side of a keeper: sd_notify(3), the watchdog, and the store that keeps descriptors while it restarts.

$NOTIFY_SOCKET does not say that a process is a service: all that a service starts inherits it, and a mount that a
daemon makes is not that daemon.  $SYSTEMD_EXEC_PID does: "the PID of the unit process (e.g. process invoked by
ExecStart=)", for a process to find out whether the service manager has started it, or another process of the service
(systemd.exec(5), version 248 and later; sd_listen_fds(3) has $LISTEN_PID for the same).
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache

PATIENCE = 1.0  #: seconds that the service manager may take to have room for a message
FIRST = 3  #: SD_LISTEN_FDS_START


class Service:
    """The service that this process is the main process of, or none."""

    def __init__(self) -> None:
        ours = str(os.getpid())
        # Taken away in any case: nothing that is started from here is that service.
        address, main, watched, allowed = (
            os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "SYSTEMD_EXEC_PID", "WATCHDOG_PID", "WATCHDOG_USEC")
        )
        self.address = address if main == ours else ""
        #: seconds between two notifications, half of what is allowed; 0: none are wanted
        self.watchdog = int(allowed) / 2e6 if self.address and allowed.isdigit() and watched in ("", ours) else 0.0
        self._notified = 0.0
        self._socket: socket.socket | None = None  #: one for all: there may be no descriptor for another later

    def __bool__(self) -> bool:
        return bool(self.address)

    def notify(self, *lines: str, fds: tuple[int, ...] = ()) -> None:
        """Send lines to the service manager, which may be gone.  Raises OSError when the host refuses it."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.settimeout(PATIENCE)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with suppress(FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            self._socket.sendmsg(["\n".join(lines).encode()], rights, 0, address)

    def store(self, fds: Mapping[str, int]) -> None:
        """Keep these descriptors for the next process, in place of older ones of the same names.  Raises OSError."""
        self.discard(fds)
        for name, fd in fds.items():  # one message each: FDNAME is the name of all that come with it
            self.notify("FDSTORE=1", f"FDNAME={name}", fds=(fd,))

    def discard(self, names: Iterable[str]) -> None:
        """Close these descriptors: what they keep open ends.  Raises OSError."""
        for name in names:
            # Several descriptors may have one name (sd_notify(3)): an older one would stay beside the new one.
            self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def notify_watchdog(self) -> None:
        """To be called all the time: it sends something when that is due."""
        if self.watchdog and time.monotonic() - self._notified >= self.watchdog:
            self._notified = time.monotonic()
            with suppress(OSError):  # the next one comes in time: it is sent twice as often as it must be
                self.notify("WATCHDOG=1")


@cache
def service() -> Service:
    """The one of this process."""
    return Service()


def stored() -> dict[str, int]:
    """The descriptors that were kept for this process, by name: sd_listen_fds_with_names(3)."""
    pid, count, names_ = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    number = int(count)
    names = names_.split(":")
    fds = range(FIRST, FIRST + number)
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(names, fds, strict=False))
