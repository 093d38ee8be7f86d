"""systemd's side of a keeper: sd_notify(3), the watchdog, and the store that keeps descriptors while it restarts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache

FIRST = 3  #: SD_LISTEN_FDS_START


class Service:
    """The service that this process is the main process of, or none."""

    def __init__(self) -> None:
        self.address = os.environ.pop("NOTIFY_SOCKET", "")
        ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        #: seconds between two notifications, half of what is allowed; 0: none are wanted
        self.watchdog = int(os.environ.pop("WATCHDOG_USEC", "0")) / 2e6 if ours else 0.0
        self._notified = 0.0

    def __bool__(self) -> bool:
        return bool(self.address)

    def notify(self, *lines: str, fds: tuple[int, ...] = ()) -> None:
        """Send lines to the service manager, which may be gone."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection, suppress(OSError):
            connection.connect(address)
            socket.send_fds(connection, ["\n".join(lines).encode()], list(fds))

    def store(self, fds: Mapping[str, int]) -> None:
        """Keep these descriptors for the next process, in place of older ones of the same names."""
        self.discard(fds)
        for name, fd in fds.items():  # one message each: FDNAME is the name of all that come with it
            self.notify("FDSTORE=1", f"FDNAME={name}", fds=(fd,))

    def discard(self, names: Iterable[str]) -> None:
        """Close these descriptors: what they keep open ends."""
        for name in names:
            # Several descriptors may have one name (sd_notify(3)): an older one would stay beside the new one.
            self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def notify_watchdog(self) -> None:
        """To be called all the time: it sends something when that is due."""
        if self.watchdog and time.monotonic() - self._notified >= self.watchdog:
            self._notified = time.monotonic()
            self.notify("WATCHDOG=1")


@cache
def service() -> Service:
    """The one of this process."""
    return Service()


def stored() -> dict[str, int]:
    """The descriptors that were kept for this process, by name: sd_listen_fds_with_names(3)."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return {}
    number = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    fds = range(FIRST, FIRST + number)
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(names, fds, strict=False))
