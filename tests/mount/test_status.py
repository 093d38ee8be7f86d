"""pkernfs status and pkernfs metrics: what is told of a mount."""

from __future__ import annotations

import json
import mmap
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pkernfs.client import keeper_address
from tests.mount.site import PYTHON_FOR_ALL, MiB, Site, find_program, run, wait_for


def figures(text: str) -> dict[str, float]:
    """Values by name and kind, read by Prometheus' own parser."""
    return {
        "/".join([sample.name, *filter(None, [sample.labels.get("kind")])]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_status(site: Site) -> None:
    for number in range(7):
        (site.mnt / f"d{number}").mkdir()
    result = run("pkernfs", "status", "--json", site.mnt)
    status = json.loads(result.stdout)
    assert (status["keeper"], status["worker"]) == (site.keeper(), site.worker())
    assert (status["mountpoint"], status["region"]) == (str(site.mnt), str(site.region))
    assert (status["takeovers"], status["last_reason"], status["keepers"]) == (0, "", 1)
    assert status["requests"]["mkdir"] == 7
    assert 0 < status["worker_uptime"] <= status["uptime"]
    said = run("pkernfs", "status", site.mnt)
    assert said.returncode == 0
    assert re.search(rf"^worker +{status['worker']}, version", said.stdout, re.MULTILINE)
    assert "mkdir 7" in said.stdout


def test_status_after_takeovers(site: Site) -> None:
    """Requests are counted on."""
    site.expected = re.compile("takes over")
    (site.mnt / "d").mkdir()
    for number in range(3):
        before = site.status()
        os.kill(before["worker"], signal.SIGKILL)
        site.wait_for_takeovers(number + 1)
    (site.mnt / "e").mkdir()
    status = site.status()
    assert (status["takeovers"], status["last_reason"]) == (3, "signal SIGKILL")
    assert 0 < status["longest_stall"] < 60
    assert status["requests"]["mkdir"] == 2
    assert "signal SIGKILL" in run("pkernfs", "status", site.mnt).stdout


def test_status_while_the_worker_is_stopped(site: Site) -> None:
    """The keeper answers."""
    worker = site.worker()
    os.kill(worker, signal.SIGSTOP)
    try:
        assert site.status()["worker"] == worker
        assert run("pkernfs", "status", site.mnt).returncode == 0
    finally:
        os.kill(worker, signal.SIGCONT)


def test_dirty_and_pinned_memory(site: Site) -> None:
    path = site.mnt / "f"
    path.touch()
    os.truncate(path, 8 * MiB)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8 * MiB) as memory:
        memory[: 4 * MiB] = b"x" * (4 * MiB)
        dirty = site.status()["dirty"]
        assert dirty is None or dirty >= 3 * MiB  # counted by each processor, summed up roughly
        memory.flush()
        wait_for(lambda: not site.status()["dirty"], "nothing dirty")
    extent = json.loads(run("pkernfs", "info", "--json", path).stdout)["extents"][0]
    assert site.status()["pinned"] == 0
    with (
        site.region.open("r+b") as region,
        mmap.mmap(region.fileno(), 2 * MiB, offset=extent["region_offset"]),
        mmap.mmap(region.fileno(), 2 * MiB, offset=extent["region_offset"] + MiB),
    ):
        assert site.status()["pinned"] == 3 * MiB


@PYTHON_FOR_ALL
@pytest.mark.usefixtures("users")
def test_the_status_is_for_the_owner_of_the_mount(site: Site) -> None:
    address = Path(keeper_address(str(site.mnt)))
    assert address.is_socket()
    result = subprocess.run(
        ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", sys.executable, "-c",
         f"import socket; socket.socket(socket.AF_UNIX).connect({str(address)!r})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "PermissionError" in result.stderr
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        connection.sendall(b"nonsense\n")
        assert "expected a JSON object" in connection.makefile().readline()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        connection.sendall(b'{"verb": "nonsense"}\n')
        assert "known are status" in connection.makefile().readline()


@pytest.mark.parametrize("path", ["/", "/nonsense"])
def test_not_a_mount(path: str) -> None:
    for verb in ("status", "upgrade", "metrics"):
        result = run("pkernfs", verb, path)
        assert result.returncode == 2
        assert "expected a path in a pkernfs mount" in result.line


def test_watch_on_a_terminal(site: Site) -> None:
    """Shown again and again, until ^C."""
    (site.mnt / "d").mkdir()
    leader, follower = pty.openpty()
    command = [find_program("pkernfs"), "status", "--watch", "--every", "0.1", str(site.mnt)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        seen = b""
        while seen.count(b"mkdir") < 4:
            assert select.select([leader], [], [], 30)[0], seen
            seen += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:
            with suppress(OSError):  # nobody has the other end any more
                if select.select([leader], [], [], 0.1)[0]:
                    os.read(leader, 65536)
        assert process.returncode == 0
    os.close(leader)
    assert b"per second" in seen


def test_watch_in_a_pipe(site: Site) -> None:
    """With --json a line each time."""
    command = [find_program("pkernfs"), "status", "--watch", "--json", "--every", "0.05", str(site.mnt)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        seen = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.kill()
    assert seen[0]["uptime"] < seen[1]["uptime"] < seen[2]["uptime"]


def test_metrics(site: Site) -> None:
    (site.mnt / "d").mkdir()
    found = figures(run("pkernfs", "metrics", site.mnt).stdout)
    assert found["pkernfs_up"] == 1
    assert found["pkernfs_takeovers_total"] == 0
    assert found["pkernfs_requests_total/mkdir"] == 1
    assert found["pkernfs_uptime_seconds"] > 0


def test_metrics_of_a_mount(unmounted: Site) -> None:
    """In a file and at a port, as long as there is a mount; nowhere by default."""
    site = unmounted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for option in (f"metrics={site.tmp}/metrics.prom", f"metrics=127.0.0.1:{port}"):
        site.mount(option)
        if "/" in option:
            path = site.tmp / "metrics.prom"
            wait_for(path.exists, "the file")
            text = path.read_text()
        else:
            wait_for(lambda: listens(port), "the port")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
                text = reply.read().decode()
        assert figures(text)["pkernfs_up"] == 1
        site.umount()
    assert not listens(port)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("option", ["metrics=", "metrics=relative", "metrics=70000", "hang=0", "hang=x", "hang="])
def test_options_that_cannot_be(unmounted: Site, option: str) -> None:
    result = unmounted.try_mount(option)
    assert result.returncode == 1
    assert option in result.line
