"""The keeper of a mount: crash loops, workers that hang, its own end, upgrades, kernels that deliver nothing again."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.site import DEAD, Site, errno_of, faulty_worker, find_program, run, strike, wait_for

HANG = re.compile("takes over|takeover failed|killing worker|in the kernel|in Python|is used by")
UPGRADE = re.compile("upgrade|takes over|takeover failed|has ended|a bug: |Traceback|^  |^Attribute|back to the worker")
KEEPER = re.compile("is the next one|takes over|next keeper has failed")


def kill(pid: int) -> None:
    """kill -9, and wait for the end of a process that is not ours."""
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state(pid) in "Z", f"the end of process {pid}")
    os.close(handle)


def state(pid: int) -> str:
    """As proc_pid_stat(5) has it; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


# -- workers that hang ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "reason", "stack"),
    [
        pytest.param("block", "has not answered a heartbeat", "in call", id="nothing-runs"),
        pytest.param("wait", "has not answered a request", "faulty_worker.py", id="one-request-waits"),
    ],
)
def test_a_worker_that_hangs(unmounted: Site, action: str, reason: str, stack: str) -> None:
    """It is noticed, its stack is logged, it is replaced; the call that waits for it is answered by the next."""
    site = unmounted
    site.expected = HANG
    site.mount_with(faulty_worker(site), "hang=0.5")
    strike(site, f"mkdir {action}")
    os.mkdir(site.mnt / "d")
    assert (site.mnt / "d").is_dir()
    log = site.server_log.read_text()
    assert reason in log
    assert stack in log
    wait_for(lambda: site.status()["takeovers"] == 1, "one takeover")


def test_a_worker_that_is_stopped(unmounted: Site) -> None:
    """SIGSTOP."""
    unmounted.expected = HANG
    unmounted.mount("hang=0.5")
    worker = unmounted.worker()
    os.kill(worker, signal.SIGSTOP)
    os.mkdir(unmounted.mnt / "d")  # answered by the next one, or by this one as it is made to tell where it stands
    wait_for(lambda: unmounted.status()["worker"] != worker, "another worker")
    assert f"killing worker {worker}: it has not" in unmounted.server_log.read_text()


def test_a_request_that_hangs_every_worker(unmounted: Site) -> None:
    """It is answered with EIO in the end."""
    site = unmounted
    site.expected = re.compile(HANG.pattern + "|has ended 4 workers|did not answer")
    site.mount_with(faulty_worker(site), "hang=0.3")
    (site.mnt / "d").mkdir()
    strike(site, "rmdir block!")
    assert errno_of(os.rmdir, site.mnt / "d") == errno.EIO
    (site.tmp / "strike").unlink()
    os.rmdir(site.mnt / "d")


def test_a_busy_worker_is_left_alone(unmounted: Site) -> None:
    """Requests all the time, for longer than a worker may be silent."""
    unmounted.mount("hang=0.5")
    (unmounted.mnt / "f").touch()
    code = "import os, sys, time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: os.statvfs(sys.argv[1])"
    users = [subprocess.Popen([sys.executable, "-c", code, str(unmounted.mnt)]) for _ in range(3)]
    assert [user.wait() for user in users] == [0, 0, 0]
    assert unmounted.status()["takeovers"] == 0


@pytest.mark.parametrize("verb", ["open", "serve"])
def test_the_first_worker_ends_at_once(unmounted: Site, verb: str) -> None:
    """The mount fails with one line, and nothing is left of it."""
    script = unmounted.tmp / "worker"
    code = f"import os, pkernfs.server.worker as w; w.Worker.{verb} = lambda *_: os._exit(3); w.main()"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PKERNFS_WORKER": str(script)}
    result = run("mount.pkernfs", unmounted.region, unmounted.mnt, env=environment)
    assert result.returncode == 32
    assert "ended" in result.line
    assert not os.path.ismount(unmounted.mnt)
    unmounted.wait_for_end()
    unmounted.mount()


# -- the end of the keeper ------------------------------------------------------------------------------------------


def test_the_keeper_is_killed(site: Site) -> None:
    """The worker goes on and starts another keeper, which replaces workers as the first one did."""
    site.expected = KEEPER
    before = site.status()
    with open(site.mnt / "f", "wb", buffering=0) as file:
        kill(before["keeper"])
        file.write(b"one ")
        wait_for(lambda: site.status()["keeper"] != before["keeper"], "another keeper")
        status = site.status()
        assert (status["worker"], status["keepers"]) == (before["worker"], 2)
        for number, word in enumerate((b"two ", b"three "), 1):
            kill(site.status()["worker"])
            file.write(word)
            site.wait_for_takeovers(number)
    assert (site.mnt / "f").read_bytes() == b"one two three "
    site.umount()
    site.wait_for_end()


def test_everything_is_killed(site: Site) -> None:
    """Nothing comes back by itself, and the next mount has everything."""
    (site.mnt / "f").write_bytes(b"content")
    wait_for(lambda: site.status()["standby"], "a standby")
    status = site.status()
    for process in ("keeper", "worker", "standby"):
        os.kill(status[process], signal.SIGKILL)
    site.wait_for_end()
    assert errno_of(os.statvfs, site.mnt) in DEAD
    site.mount()
    assert (site.mnt / "f").read_bytes() == b"content"


# -- upgrades -------------------------------------------------------------------------------------------------------


def upgrade(site: Site, *arguments: str, worker: list[str] | None = None) -> tuple[int, str]:
    """`pkernfs upgrade`, perhaps to another program for the workers: exit status, and what it said."""
    environment = dict(os.environ)
    if worker is not None:
        environment["PKERNFS_WORKER"] = " ".join(worker)
    result = run("pkernfs", "upgrade", site.mnt, *arguments, env=environment)
    return result.returncode, result.stdout + result.stderr


def test_upgrade(site: Site) -> None:
    """Another worker serves, also later; what is open stays."""
    before = site.status()
    program = [sys.executable, "-c", "from pkernfs.server import worker; import pkernfs; "
               "pkernfs.__version__ = 'new'; worker.main()"]  # fmt: skip
    command = [str(site.tmp / "new")]
    script = Path(command[0])
    script.write_text(f'#!/bin/sh\nexec {program[0]} -c "{program[2]}" "$@"\n')
    script.chmod(0o755)
    with open(site.mnt / "f", "w+b", buffering=0) as file:
        file.write(b"before ")
        status, said = upgrade(site, "--probation", "0.2", "--json", worker=command)
        assert status == 0, said
        assert (json.loads(said)["from"], json.loads(said)["to"]) == (before["version"], "new")
        assert 0 < json.loads(said)["longest_stall"] < 10
        file.write(b"after")
        file.seek(0)
        assert file.read() == b"before after"
    after = site.status()
    assert (after["version"], after["keeper"]) == ("new", before["keeper"])
    assert after["worker"] != before["worker"]
    site.expected = re.compile("takes over")
    kill(after["worker"])
    os.mkdir(site.mnt / "d")
    assert site.status()["version"] == "new"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        pytest.param("raise SystemExit(3)", "has ended", id="does-not-start"),
        pytest.param(
            "import pkernfs.server.child as c; c.PROTOCOL = 99; import pkernfs.server.worker as w; w.main()",
            "expected protocol 1 of its keeper, found 99",
            id="other-protocol",
        ),
        pytest.param(
            "import pkernfs.region.superblock as s, pkernfs.format as f; f.VERSION = s.VERSION = 99; "
            "import pkernfs.server.worker as w; w.main()",
            "version",
            id="cannot-read-the-format",
        ),
        pytest.param(
            "import pkernfs.server.worker as w, os; w.Worker.open = lambda *_: os._exit(3); w.main()",
            "ended with exit status 3",
            id="ends-at-once",
        ),
    ],
)
def test_an_upgrade_that_cannot_serve(site: Site, code: str, why: str) -> None:
    """The old version goes on, and the command says why."""
    site.expected = UPGRADE
    script = site.tmp / "new"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    script.chmod(0o755)
    (site.mnt / "f").write_bytes(b"content")
    status, said = upgrade(site, worker=[str(script)])
    assert status == 1
    assert why in said
    assert "keeping the previous version" in said
    assert len(said.splitlines()) == 1
    assert (site.mnt / "f").read_bytes() == b"content"
    kill(site.status()["worker"])
    (site.mnt / "g").touch()


@pytest.mark.parametrize("action", ["bug!", "die!", "block!"])
def test_an_upgrade_that_fails_in_its_probation(site: Site, action: str) -> None:
    """The worker of before is back, and calls are answered."""
    site.expected = re.compile(f"{UPGRADE.pattern}|{HANG.pattern}|has ended|File ")
    (site.mnt / "d").mkdir()
    strike(site, f"statfs {action}")
    command = [find_program("pkernfs"), "upgrade", "--probation", "2", str(site.mnt)]
    before = site.status()["worker"]
    with subprocess.Popen(
        command, env={**os.environ, "PKERNFS_WORKER": " ".join(faulty_worker(site))}, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: site.status()["worker"] not in (0, before), "the new worker")
        errno_of(os.statvfs, site.mnt)
        assert process.wait() == 1
        assert process.stderr
        assert "keeping the previous version" in process.stderr.read()
    os.statvfs(site.mnt)
    os.rmdir(site.mnt / "d")


def test_an_upgrade_on_probation(site: Site) -> None:
    """Another one is refused, by both states; when the mount is unmounted meanwhile the first one is told so."""
    site.expected = re.compile("upgrade: the mount is being unmounted")
    before = site.status()
    command = [find_program("pkernfs"), "upgrade", "--probation", "1000", str(site.mnt)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: site.status()["worker"] not in (0, before["worker"]), "the new worker")
        status, text = upgrade(site)
        assert status == 1
        for state in ("that serves on probation (PROBATION)", "prepares one of another version (UPGRADING)"):
            assert state in text
        os.kill(before["keeper"], signal.SIGTERM)
        assert process.wait() == 1
        assert process.stderr
        assert "the mount is being unmounted" in process.stderr.read()
    site.wait_for_end()
    assert not os.path.ismount(site.mnt)


def test_upgrade_of_the_keeper(site: Site) -> None:
    """Another process keeps the mount; the worker goes on."""
    before = site.status()
    with open(site.mnt / "f", "wb", buffering=0) as file:
        status, said = upgrade(site, "--keeper")
        assert status == 0, said
        file.write(b"content")
    after = site.status()
    assert (after["worker"], after["keepers"]) == (before["worker"], 2)
    assert after["keeper"] != before["keeper"]
    assert os.getsid(after["keeper"]) == after["keeper"]
    site.expected = re.compile("takes over")
    kill(after["worker"])
    (site.mnt / "g").touch()
    site.umount()
    site.wait_for_end()


def test_a_keeper_that_fails_to_take_over(site: Site) -> None:
    """The old one goes on."""
    site.expected = KEEPER
    code = (
        "import socket, sys; from pkernfs.client import keeper_address; c = socket.socket(socket.AF_UNIX); "
        'c.connect(keeper_address(sys.argv[1])); c.sendall(b\'{"verb": "hand-over"}\\n\'); c.recv(1 << 16)'
    )
    before = site.status()
    result = run(sys.executable, "-c", code, site.mnt)
    assert result.returncode == 0, result
    wait_for(lambda: "the next keeper has failed" in site.server_log.read_text(), "the old keeper to go on")
    kill(before["worker"])
    (site.mnt / "f").touch()
    assert site.status()["keeper"] == before["keeper"]


def test_signals_while_nobody_serves(unmounted: Site) -> None:
    """In a crash loop the keeper still answers, and SIGTERM ends the mount."""
    site = unmounted
    site.expected = re.compile("takes over|takeover failed|standby")
    flag = site.tmp / "flag"
    script = site.tmp / "worker"
    script.write_text(f"#!/bin/sh\ntest -e {flag} && exit 1\nexec {sys.executable} -P -m pkernfs.server.worker $1\n")
    script.chmod(0o755)
    site.mount_with([str(script)])
    wait_for(lambda: site.status()["standby"], "a standby")
    status = site.status()
    flag.touch()
    kill(status["standby"])
    kill(status["worker"])
    wait_for(lambda: site.server_log.read_text().count("takeover failed") > 0, "failures")
    assert site.status()["keeper"] == status["keeper"]
    os.kill(status["keeper"], signal.SIGTERM)
    site.wait_for_end()
    assert not os.path.ismount(site.mnt)


# -- kernels that cannot deliver again ------------------------------------------------------------------------------


def test_without_resend(unmounted: Site) -> None:
    """What was read and not answered fails with EIO, at once; all else goes on."""
    site = unmounted
    site.expected = re.compile("takes over")
    code = "import sys; from pkernfs.server.device import Device; Device.resend = lambda self: False; "
    code += "from pkernfs.cli import main_mount; sys.exit(main_mount())"
    arguments = ["-c", code, str(site.region), str(site.mnt), "-o", f"log={site.server_log}"]
    environment = {**os.environ, "PKERNFS_WORKER": " ".join(faulty_worker(site))}
    assert run(sys.executable, *arguments, env=environment).returncode == 0
    (site.mnt / "d").mkdir()
    strike(site, "rmdir die")
    assert errno_of(os.rmdir, site.mnt / "d") == errno.EIO
    os.rmdir(site.mnt / "d")
    wait_for(lambda: site.status()["takeovers"] == 1, "one takeover")
