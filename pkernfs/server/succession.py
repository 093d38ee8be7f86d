"""How a mount goes from one keeper to the next: handed on, kept by systemd, or from the worker of one that was killed.

python -m pkernfs.server.succession FD: the keeper that a worker starts; FD is the socket between them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from contextlib import suppress

from pkernfs.errors import PkernfsError
from pkernfs.server.child import Child, receive
from pkernfs.server.device import Device, mount_again
from pkernfs.server.keeper import Keeper
from pkernfs.server.logs import start_logging
from pkernfs.server.mountpoint import check_mountpoint
from pkernfs.server.resources import reserve
from pkernfs.server.state import FD_NAMES, STORED, Descriptors, State
from pkernfs.server.systemd import service, stored
from pkernfs.surroundings import open_standard_descriptors, settle

log = logging.getLogger("pkernfs")


def adopt(state: State, fds: list[int]) -> Keeper:
    """A keeper of a mount that is there.  ``fds``: Descriptors, and the socket to the worker."""
    *rest, connection = fds
    worker = Child(connection=socket.socket(fileno=connection), pid=state.worker)
    state.keepers += 1
    log.info("%s: keeping %s from now on", state.region, state.mountpoint)
    return Keeper(state, Descriptors(*rest), worker)


def taken(connection: socket.socket, data: bytes, fds: list[int]) -> Keeper:
    """The keeper of what another one hands on: the first part of its reply was read.  Raises RefusedError."""
    from pkernfs.api import HandOver
    from pkernfs.codec import decode_reply

    while not data.endswith(b"\n") and (more := connection.recv(1 << 16)):
        data += more
    state = State.from_json(decode_reply(data, HandOver()))
    start_logging(state.options, strict=False)
    return adopt(state, fds)


def resumed(region: str, mountpoint: str) -> Keeper | None:
    """The keeper of a mount that systemd has kept while this service was restarted, if it still lives."""
    fds = stored()
    if not fds:
        return None
    state = None
    if set(FD_NAMES) <= fds.keys() and "state" in fds:
        with open(fds.pop("state"), encoding="utf-8") as file:
            state = State.from_json(json.load(file))
    if state is None or Device(fds["device"]).has_ended() or state.region != region:
        # Nothing is left of it: the region's lock for one must not be held any more, or mounting anew would fail.
        service().discard(STORED)
        for fd in fds.values():
            os.close(fd)
        return None
    connection = fds.get("worker", -1)
    if connection < 0:  # it has ended: systemd has closed the socket
        connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].detach()
    start_logging(state.options, strict=False)
    if state.mountpoint != mountpoint:  # the unit has another one by now; it may be in use where it is, and stays there
        with suppress(PkernfsError, OSError):
            mount_again(region, check_mountpoint(mountpoint), state.options, fds["device"])
            state.mountpoint = mountpoint
    return adopt(state, [*(fds[name] for name in FD_NAMES), connection])


def main() -> None:
    """The keeper after one that is gone."""
    open_standard_descriptors()
    settle(ours=False, foreground=False)
    reserve()
    connection = socket.socket(fileno=int(sys.argv[1]))
    if os.fork():
        os._exit(0)  # its parent is not the worker then, which may end before it
    os.setsid()
    message, fds = receive(connection)
    state = State.from_json(message["state"])
    start_logging(state.options, strict=False)
    log.warning("the keeper of %s was gone: this is the next one", state.mountpoint)
    adopt(state, [*fds, connection.detach()]).keep()


if __name__ == "__main__":
    main()
