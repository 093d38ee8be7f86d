"""pkernfs upgrade: let another version serve a mount that stays in use."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import TYPE_CHECKING

from pkernfs.cli.arguments import seconds
from pkernfs.cli.parsers import Verb, add_json, add_mount
from pkernfs.cli.text import duration, show
from pkernfs.errors import PkernfsError, printable

if TYPE_CHECKING:
    from pkernfs import api

DESCRIPTION = """\
Let this installation of pkernfs serve a mount that an older one (or a newer one) serves, while it stays in use.

A worker of this version is started and looks whether it can read the region; the one that serves answers what it has
read and ends; the new one goes on.  If it fails within its time of probation, the previous version goes on, and this
command fails.

  pkernfs upgrade /mnt/pkernfs                 the worker
  pkernfs upgrade --keeper /mnt/pkernfs        the keeper, which starts workers; under systemd restart its service

A stall is printed: for how long nobody answered.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT and what is upgraded."""
    add_mount(parser)
    parser.add_argument("--keeper", action="store_true", help="not the worker but its keeper")
    parser.add_argument(
        "--probation", metavar="SECONDS", type=seconds, default=5.0, help="until the new version has proved (default 5)"
    )
    add_json(parser, "times in seconds")


def run(arguments: argparse.Namespace) -> int:
    """Upgrade, and tell.  Raises PkernfsError."""
    mount = printable(arguments.mount)
    if arguments.keeper:
        before, keeper = _keeper(arguments.mount)
        line = f"{mount}: keeper {keeper} in place of {before}"
        show(arguments, {"from": before, "keeper": keeper}, [line])
    else:
        done = _worker(arguments.mount, arguments.probation)
        stall = f"stalled for {duration(done.longest_stall)} at most"
        show(arguments, done, [f"{mount}: version {done.after} in place of {done.before}, {stall}"])
    return 0


def _worker(mount: str, probation: float) -> api.Upgraded:
    from pkernfs import api, client
    from pkernfs.server.child import worker_command

    return client.ask(mount, api.Upgrade(command=worker_command(), probation=probation))


def _keeper(mount: str) -> tuple[int, int]:
    """Become the keeper, in a process of its own; the processes of the one before and of this one."""
    from pkernfs import client

    before = client.status(mount).keeper
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            _take_over(mount, writer)
        except PkernfsError as error:
            os.write(writer, b"e" + str(error).encode())
            os._exit(1)
        except BaseException as error:
            os.write(writer, b"e" + repr(error).encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read(1 << 16)
    if not said.startswith(b"+"):
        raise PkernfsError(said[1:].decode(errors="replace") or f"{mount}: the new keeper has failed")
    return before, child


def _take_over(mount: str, report: int) -> None:
    """Get everything from the keeper of the mount, and keep it to its end.  Raises PkernfsError."""
    from pkernfs.api import HandOver
    from pkernfs.client import keeper_address
    from pkernfs.codec import encode_request
    from pkernfs.server.child import FDS_MAX
    from pkernfs.server.daemon import let_go_of_terminal
    from pkernfs.server.resources import reserve
    from pkernfs.server.succession import taken
    from pkernfs.sockets import receive_fds
    from pkernfs.surroundings import settle

    settle(ours=False, foreground=False)
    reserve()

    os.setsid()
    os.chdir("/")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(keeper_address(mount))
        connection.sendall(encode_request(HandOver()))
        data, fds = receive_fds(connection, 1 << 16, FDS_MAX)
        keeper = taken(connection, data, fds)
        connection.sendall(b"+")
    os.write(report, b"+")
    os.close(report)
    let_go_of_terminal()
    keeper.keep()


VERBS = {"upgrade": Verb(DESCRIPTION, add_arguments, run)}
