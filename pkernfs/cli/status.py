"""pkernfs status: who serves a mount, and how it has been doing."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from pkernfs.cli.arguments import seconds
from pkernfs.cli.parsers import Verb, add_json, add_mount
from pkernfs.cli.text import as_json, duration, human, memory_line, printable, show
from pkernfs.served import some

if TYPE_CHECKING:
    from pkernfs import api

DESCRIPTION = """\
Show who serves a mount, and how it has been doing: its keeper and its worker, takeovers and the longest stall, requests
by kind, memory that is dirty in the kernel or mapped past the mount.  Asks the keeper, so it answers while the worker
does not.  What the host refuses at the moment (a process for a standby, room for the log) is shown with the reason and
the next try; the mount goes on with what it has.

  pkernfs status /mnt/pkernfs
  pkernfs status --watch /mnt/pkernfs
  pkernfs status --json /mnt/pkernfs
"""
EVERY = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT, and how it is shown."""
    add_mount(parser)
    add_json(parser, "sizes in bytes, times in seconds")
    parser.add_argument("--watch", action="store_true", help="show it anew until ^C; with --json a line each time")
    parser.add_argument("--every", metavar="SECONDS", type=seconds, default=EVERY, help="between two (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Ask and print.  Raises PkernfsError."""
    from pkernfs import client

    status = client.status(arguments.mount)
    if not arguments.watch:
        show(arguments, status, lines(status))
        return 0
    if arguments.json or not sys.stdout.isatty():
        return _repeat(arguments, status)
    return _watch(arguments, status)


def _repeat(arguments: argparse.Namespace, status: api.Status) -> int:
    """A line (or a paragraph) each time, for programs and pipes."""
    from pkernfs import client

    while True:
        print(as_json(status, None) if arguments.json else "\n".join(lines(status)) + "\n", flush=True)
        time.sleep(arguments.every)
        status = client.status(arguments.mount)


def _watch(arguments: argparse.Namespace, status: api.Status) -> int:
    """In place, on a terminal, until ^C: which waits to be looked at, as an exception could be lost in a finalizer."""
    import signal

    from rich.live import Live

    from pkernfs import client

    before = status.requests
    begun = time.monotonic()
    interrupt = {signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupt)
    with Live(_picture(status, before, 1.0), auto_refresh=False, screen=True) as live:
        while not signal.sigtimedwait(interrupt, arguments.every):
            status = client.status(arguments.mount, timeout=5.0)
            now = time.monotonic()
            live.update(_picture(status, before, now - begun), refresh=True)
            before, begun = status.requests, now
    return 0


def _picture(status: api.Status, before: dict[str, int], passed: float) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("request", "so far", "per second", "", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    rates = {kind: (count - before.get(kind, 0)) / passed for kind, count in status.requests.items()}
    most = max(rates.values(), default=0.0) or 1.0
    for kind, count in sorted(status.requests.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{count:,}", f"{rates[kind]:,.0f}", "█" * round(40 * rates[kind] / most))
    return Group(Text("\n".join(lines(status)[:-1])), Text(), table)


def lines(status: api.Status) -> list[str]:
    """The status for people."""
    ago = duration(time.time() - status.last_takeover) if status.last_takeover else ""
    last = f", the last {ago} ago: {status.last_reason}" if ago else ""
    requests = sorted(status.requests.items(), key=lambda item: -item[1])
    troubles = {
        one.what: f"{printable(one.why)} ({f'next try in {duration(one.next_try)}' if one.next_try else 'trying now'})"
        for one in status.troubles
    }
    others = [mountpoint for mountpoint in status.mountpoints if mountpoint != status.mountpoint]
    rows = {
        "mount": f"{printable(status.mountpoint)}, region {printable(status.region)}",
        **({"also": ", ".join(map(printable, others))} if others else {}),
        **(
            {"elsewhere": f"in the mount namespace of {some(list(map(printable, status.elsewhere)))}"}
            if status.elsewhere
            else {}
        ),
        "keeper": f"{status.keeper}, mounted for {duration(status.uptime)}"
        + f", {status.keepers} keepers so far" * (status.keepers > 1),
        "worker": f"{status.worker}, version {status.version}, serving for {duration(status.worker_uptime)}",
        "standby": str(status.standby or troubles.pop("standby", "none yet")),
        "takeovers": f"{status.takeovers}{last}",
        "stall": f"{duration(status.longest_stall)} at most",
        "dirty": "not known" if status.dirty is None else f"{human(status.dirty)} in the page cache",
        "awaiting": f"{human(status.awaiting)} waiting for invalidation",
        "memory": memory_line(status.memory, status.host_free),
        "pinned": "not known" if status.pinned is None else f"{human(status.pinned)} mapped past the mount",
        "requests": f"{sum(status.requests.values()):,}: " + ", ".join(f"{kind} {count:,}" for kind, count in requests),
    }
    if status.refused:
        rows["worker"] = f"none can open the region: requests fail with EIO: {printable(status.refused)}"
    # A standby that is being started anew still has its trouble.
    more = [f"{'trouble':10} {what}: {why}" for what, why in troubles.items()]
    return [f"{name:10} {text}" for name, text in rows.items()] + more


VERBS = {"status": Verb(DESCRIPTION, add_arguments, run)}
