"""pkernfs metrics: the status of a mount for Prometheus."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

from pkernfs.cli.arguments import seconds
from pkernfs.cli.parsers import Verb, add_mount
from pkernfs.errors import PkernfsError, printable, quoted

DESCRIPTION = """\
Show the status of a mount as Prometheus reads it: once, or at a port or in a file until the mount ends.

  pkernfs metrics /mnt/pkernfs                                  on standard output
  pkernfs metrics --port 127.0.0.1:9464 /mnt/pkernfs            http://127.0.0.1:9464/metrics
  pkernfs metrics --file /var/lib/node_exporter/pkernfs.prom /mnt/pkernfs
                                                                for node_exporter's textfile collector
The mount option metrics=ADDRESS:PORT or metrics=/FILE lets the mount itself see to it.
"""
EVERY = 15.0
#: (status, name, type, help); times in seconds, sizes in bytes.
FIGURES = (
    ("uptime", "pkernfs_uptime_seconds", "gauge", "Since the mount."),
    ("worker_uptime", "pkernfs_worker_uptime_seconds", "gauge", "Since the worker began to serve."),
    ("takeovers", "pkernfs_takeovers", "counter", "Workers that took the place of another."),
    ("keepers", "pkernfs_keepers", "counter", "Keepers of the mount so far."),
    ("longest_stall", "pkernfs_longest_stall_seconds", "gauge", "Longest time in which nobody served."),
    ("failed_requests", "pkernfs_failed_requests", "counter", "Requests that ended in a bug of the worker."),
    ("dirty", "pkernfs_dirty_bytes", "gauge", "Written to the mount, in the kernel's page cache only."),
    ("pinned", "pkernfs_pinned_bytes", "gauge", "Memory of the region that others map past the mount."),
    ("awaiting", "pkernfs_awaiting_bytes", "gauge", "Memory that nobody uses, and that awaits an invalidation."),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT, and where the metrics go."""
    add_mount(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--port", metavar="[ADDRESS:]PORT", type=address, help="serve them there (default 127.0.0.1)")
    where.add_argument("--file", metavar="FILE", help="write them there again and again")
    parser.add_argument("--every", metavar="SECONDS", type=seconds, default=EVERY, help="with --file (default 15)")


def address(word: str) -> tuple[str, int]:
    """[ADDRESS:]PORT.  For argparse."""
    host, _, port = word.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"expected [ADDRESS:]PORT, found {quoted(word)}")
    return host.strip("[]") or "127.0.0.1", int(port)


class StatusCollector:
    """The status of one mount, asked for anew each time that it is collected."""

    def __init__(self, mount: str, mountpoint: str) -> None:
        self.mount = mount  #: a path in it, or its region
        self.mountpoint = mountpoint  #: as it was when it last answered

    def collect(self) -> Iterator[Any]:
        """The metrics; only pkernfs_up 0 when the keeper does not answer."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        from pkernfs import client

        families = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        up = GaugeMetricFamily("pkernfs_up", "Whether the keeper of the mount answers.", labels=["mountpoint"])
        try:
            status = client.status(self.mount)
        except PkernfsError:
            up.add_metric([printable(self.mountpoint)], 0)
            yield up
            return
        self.mountpoint = status.mountpoint
        mountpoint = printable(status.mountpoint)
        up.add_metric([mountpoint], 1)
        yield up
        for key, name, kind, text in FIGURES:
            value = getattr(status, key)
            if value is not None:
                family = families[kind](name, text, labels=["mountpoint"])
                family.add_metric([mountpoint], value)
                yield family
        standby = GaugeMetricFamily("pkernfs_standby", "Whether a worker waits to take over.", labels=["mountpoint"])
        standby.add_metric([mountpoint], bool(status.standby))
        yield standby
        troubles = GaugeMetricFamily(
            "pkernfs_trouble", "What the host refuses, 1 while it does.", labels=["mountpoint", "what"]
        )
        for trouble in status.troubles:
            troubles.add_metric([mountpoint, trouble.what], 1)
        yield troubles
        requests = CounterMetricFamily("pkernfs_requests", "Requests of the kernel.", labels=["mountpoint", "kind"])
        for request, count in status.requests.items():
            requests.add_metric([mountpoint, request], count)
        yield requests


def run(arguments: argparse.Namespace) -> int:
    """Once, or until the mount ends.  Raises PkernfsError."""
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile

    from pkernfs import client

    status = client.status(arguments.mount)
    registry = CollectorRegistry()
    registry.register(StatusCollector(arguments.mount, status.mountpoint))
    if not arguments.port and not arguments.file:
        print(generate_latest(registry).decode(), end="")
        return 0
    try:
        if arguments.port:
            start_http_server(arguments.port[1], arguments.port[0], registry)
            _wait_for_the_end(arguments.mount, status.device, lambda: None, 1.0)
        else:
            _wait_for_the_end(
                arguments.mount, status.device, lambda: write_to_textfile(arguments.file, registry), arguments.every
            )
    except OSError as error:
        place = arguments.file or "{}:{}".format(*arguments.port)
        raise PkernfsError(f"{place}: cannot give the metrics there: {error.strerror or error}") from None
    return 0


def _wait_for_the_end(mount: str, device: str, step: Any, every: float) -> None:
    """Call ``step`` again and again while the mount is there, and the process that started this one."""
    from pkernfs.client import device_of

    parent = os.getppid()
    while device_of(mount) == device and os.getppid() == parent:
        step()
        time.sleep(every)


VERBS = {"metrics": Verb(DESCRIPTION, add_arguments, run)}
