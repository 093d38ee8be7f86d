"""Under a real systemd: examples/systemd/pkernfs-mnt.service keeps the mount while its keeper is restarted or killed.

systemd runs as the first process of namespaces of its own, which see the host's files.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mount.site import PATIENCE, ROOT, Result, Site, find_program, run, wait_for

SYSTEMD = "/lib/systemd/systemd"
SCRIPT = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
    mount -t tmpfs tmpfs /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
printf '[Unit]\\nDefaultDependencies=no\\n' >/run/systemd/system/empty.target
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/run/systemd/system \
    $SYSTEMD --system --unit=empty.target --log-target=console
"""


class Systemd:
    """A running systemd.  ``unit``: the service of the example, for the mount of a site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.log = (site.tmp / "systemd.log").open("wb")
        command = [
            "unshare",
            "--fork",
            "--kill-child",
            "--pid",
            "--mount",
            "--mount-proc",
            "--cgroup",
            "--uts",
            "--ipc",
        ]
        self.process = subprocess.Popen(
            [*command, "--propagation", "private", "bash", "-c", SCRIPT],
            env={**os.environ, "SYSTEMD": SYSTEMD}, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        wait_for(children.read_text, "the first process")
        self.pid = int(children.read_text())
        self.root = Path(f"/proc/{self.pid}/root")
        text = (ROOT / "examples/systemd/pkernfs-mnt.service").read_text()
        for old, new in (
            ("/sbin/mount.pkernfs", find_program("mount.pkernfs")),
            ("/sbin/mkfs.pkernfs", find_program("mkfs.pkernfs")),
            ("/mnt/pkernfs", str(site.mnt)),
            ("/dev/shm/pkernfs.img", str(site.region)),
            ("WatchdogSec=60", f"WatchdogSec=2\nStandardError=append:{site.tmp}/systemd.log"),
            ("RequiresMountsFor=", "DefaultDependencies=no\n#"),
            ("allow_other", f"allow_other,log={site.server_log}"),
        ):
            assert old in text
            text = text.replace(old, new)
        wait_for(lambda: self.run("systemctl", "list-units").returncode == 0, "systemd to answer")
        (self.root / "run/systemd/system/pkernfs.service").write_text(text)
        self.systemctl("daemon-reload")

    def run(self, *arguments: str | os.PathLike[str]) -> Result:
        """Run a command in its namespaces."""
        return run("nsenter", "--target", str(self.pid), "--all", *arguments)

    def systemctl(self, verb: str) -> None:
        """A verb, for the service if it takes one."""
        result = self.run("systemctl", verb, *["pkernfs.service"] * (verb != "daemon-reload"))
        assert result.returncode == 0, f"{result}\n" + (self.site.tmp / "systemd.log").read_text()

    def status(self) -> dict[str, Any]:
        """What `pkernfs status` tells."""
        result = self.run(find_program("pkernfs"), "status", "--json", self.site.mnt)
        assert result.returncode == 0, result
        status: dict[str, Any] = json.loads(result.stdout)
        return status

    def kill(self, *processes: str, number: str = "KILL") -> None:
        """Signal processes, by their names in the status; wait until they are gone."""
        status = self.status()
        pids = [str(status[name]) for name in processes]
        assert self.run("kill", f"-{number}", *pids).returncode == 0
        if number == "KILL":
            wait_for(lambda: not any((self.root / "proc" / pid / "exe").exists() for pid in pids), "their end")

    def close(self) -> None:
        """End everything."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.log.close()


@pytest.fixture
def systemd(unmounted: Site) -> Iterator[Systemd]:
    if not os.path.exists(SYSTEMD):
        pytest.skip("needs systemd")
    made = Systemd(unmounted)
    try:
        yield made
    finally:
        made.close()


def test_the_example_service(systemd: Systemd) -> None:
    """The file stays open and its mount in use through everything but the stop."""
    systemd.site.expected = None
    systemd.systemctl("start")
    mnt = Path(f"{systemd.root}{systemd.site.mnt}")
    first = systemd.status()
    written = []
    with (mnt / "f").open("wb", buffering=0) as file:

        def use(word: str) -> dict[str, Any]:
            file.write(word.encode())
            written.append(word)
            return systemd.status()

        systemd.systemctl("restart")
        restarted = use("restarted ")
        assert restarted["keeper"] != first["keeper"]
        assert restarted["worker"] == first["worker"]

        systemd.site.expected = re.compile("takes over")
        systemd.kill("worker")
        assert use("worker-killed ")["worker"] != first["worker"]

        systemd.kill("keeper")
        assert use("keeper-killed ")["keeper"] != restarted["keeper"]

        before = systemd.status()
        systemd.kill("keeper", "worker", "standby")
        after = use("all-killed ")
        assert not {after["keeper"], after["worker"]} & {before["keeper"], before["worker"]}

        systemd.kill("keeper", number="STOP")
        wait_for(lambda: systemd.status()["keeper"] != after["keeper"], "the watchdog's keeper")
        use("watchdog")
    assert (mnt / "f").read_text() == "".join(written)
    systemd.systemctl("stop")
    assert not mnt.joinpath("f").exists()
    assert systemd.run("systemctl", "is-failed", "pkernfs.service").returncode != 0
    systemd.site.verify()


def test_stop_while_in_use(systemd: Systemd) -> None:
    """The mount ends in good order, and the next start has what was written."""
    systemd.site.expected = re.compile("is in use")
    systemd.systemctl("start")
    mnt = Path(f"{systemd.root}{systemd.site.mnt}")
    with (mnt / "f").open("wb", buffering=0) as file:
        file.write(b"content")
        systemd.systemctl("stop")
    systemd.site.verify()
    systemd.systemctl("start")
    assert (mnt / "f").read_bytes() == b"content"
    systemd.systemctl("stop")


def test_a_unit_that_has_another_directory_by_now(systemd: Systemd) -> None:
    """A restart keeps the mount where it is in use, and mounts it on the new directory too."""
    site = systemd.site
    systemd.systemctl("start")
    mnt = Path(f"{systemd.root}{site.mnt}")
    other = site.tmp / "other"
    other.mkdir()
    unit = systemd.root / "run/systemd/system/pkernfs.service"
    with (mnt / "f").open("wb", buffering=0) as file:
        before = systemd.status()
        unit.write_text(re.sub(rf"(ExecStart=.*) {site.mnt} ", rf"\1 {other} ", unit.read_text()))
        systemd.systemctl("daemon-reload")
        systemd.systemctl("restart")
        file.write(b"content")
        after = systemd.status()
    assert (after["worker"], after["mountpoints"]) == (before["worker"], [str(site.mnt), str(other)])
    assert after["keeper"] != before["keeper"]
    assert Path(f"{systemd.root}{other}/f").read_bytes() == b"content"
    assert systemd.run("umount", other).returncode == 0
    systemd.systemctl("stop")
    assert not mnt.joinpath("f").exists()
