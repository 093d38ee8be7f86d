"""What a mount has from whoever started it: descriptors, signals, limits, environment.  It works as any other."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.mount.site import PATIENCE, Site, find_program, run, wait_for

SAID = re.compile("is the next one|takes over|standby")


def close(*fds: int) -> Callable[[], None]:
    """Close standard descriptors, as cron-like supervisors do."""

    def call() -> None:
        for fd in fds:
            os.close(fd)

    return call


def limit(kind: int, soft: int) -> Callable[[], None]:
    """Lower a soft limit; not everybody who is root may raise a hard one again."""
    return lambda: resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


def go_where_nothing_is() -> None:
    """A working directory that is removed."""
    folder = f"/tmp/pkernfs-test-gone-{os.getpid()}"
    os.mkdir(folder)
    os.chdir(folder)
    os.rmdir(folder)


#: What a mount is started with -> (what sets it, environment)
CASES: dict[str, tuple[Callable[[], object], dict[str, str]]] = {
    "no-stdin": (close(0), {}),
    "no-stdout": (close(1), {}),
    "no-stderr": (close(2), {}),
    "no-stdin-stdout": (close(0, 1), {}),
    "no-stdin-stderr": (close(0, 2), {}),
    "no-stdout-stderr": (close(1, 2), {}),
    "no-descriptors": (close(0, 1, 2), {}),
    "umask-0": (lambda: os.umask(0), {}),
    "umask-777": (lambda: os.umask(0o777), {}),
    "children-ignored": (lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), {}),
    "end-ignored": (lambda: [signal.signal(number, signal.SIG_IGN) for number in (1, 2, 15)], {}),
    "all-blocked": (lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()), {}),
    "few-descriptors": (limit(resource.RLIMIT_NOFILE, 16), {}),
    "small-files": (limit(resource.RLIMIT_FSIZE, 4096), {}),
    "little-time": (limit(resource.RLIMIT_CPU, 1), {}),
    "little-memory": (limit(resource.RLIMIT_AS, 1 << 27), {}),
    "nice": (lambda: os.nice(19), {}),
    "idle": (lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)), {}),
    "removed-directory": (go_where_nothing_is, {}),
    "no-path": (lambda: None, {"PATH": "/nowhere"}),
    "latin-1": (lambda: None, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "python": (
        lambda: None,
        {"PYTHONOPTIMIZE": "2", "PYTHONDEVMODE": "1", "PYTHONSTARTUP": "/x"},
    ),
    "other-service": (lambda: None, {"NOTIFY_SOCKET": "@pkernfs-test", "WATCHDOG_USEC": "1000000", "LISTEN_FDS": "2"}),
}
SHORT = ("no-stdin", "no-descriptors", "all-blocked", "few-descriptors", "no-path", "other-service")


def kill(pid: int) -> None:
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([handle], [], [], PATIENCE)[0]
    os.close(handle)


def mount(site: Site, name: str) -> None:
    """Mount as somebody does who leaves it all that."""
    prepare, environment = CASES[name]
    command = [
        sys.executable,
        find_program("mount.pkernfs"),
        str(site.region),
        str(site.mnt),
        "-o",
        f"log={site.server_log}",
    ]
    with (site.tmp / "said").open("w+") as said:
        done = subprocess.run(  # no thread of ours matters to what is run
            command,
            preexec_fn=prepare,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            timeout=PATIENCE,
            check=False,
        )
        said.seek(0)
        assert (done.returncode, said.read()) == (0, "")


def replaced(site: Site, name: str, before: int) -> bool:
    """Whether another process is the one of a name."""
    return bool(site.status()[name] != before)


def works(site: Site) -> None:
    """Worker and keeper are replaced, and a signal ends the mount, all while a file is open."""
    site.expected = SAID
    with open(site.mnt / "f", "w+b", buffering=0) as file:
        for number, name in enumerate(("worker", "keeper", "worker"), 1):
            wait_for(lambda: site.status()["standby"], "a standby")
            before = site.status()[name]
            kill(before)
            assert file.write(b"x" * 8192) == 8192
            os.stat(site.mnt)
            wait_for(partial(replaced, site, name, before), f"another {name}")
            assert file.tell() == number * 8192
    assert site.status()["keepers"] == 2
    assert site.server_log.stat().st_mode & 0o022 == 0
    keeper = site.keeper()
    # What was below the usual priority is not; what was above stays.
    assert os.getpriority(os.PRIO_PROCESS, keeper) == min(0, os.getpriority(os.PRIO_PROCESS, 0))
    assert os.sched_getscheduler(keeper) == os.SCHED_OTHER
    os.kill(keeper, signal.SIGTERM)
    site.wait_for_end()
    assert not site.is_mounted()


@pytest.mark.parametrize("name", SHORT)
def test_started(unmounted: Site, name: str) -> None:
    """Those that were found to end a mount."""
    mount(unmounted, name)
    works(unmounted)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_started_each(unmounted: Site, name: str) -> None:
    """All of them."""
    mount(unmounted, name)
    works(unmounted)


def test_the_notify_socket_of_another_service(unmounted: Site) -> None:
    """It hears nothing of a mount that its service has made: neither READY=1 nor descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0pkernfs-test")
        manager.setblocking(False)
        mount(unmounted, "other-service")
        works(unmounted)
        with pytest.raises(BlockingIOError):
            manager.recv(1 << 16)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_commands_without_descriptors(site: Site, closed: tuple[int, ...]) -> None:
    """Nothing is opened in the place of one that is closed, and there is no traceback."""
    file = site.mnt / "f"
    file.write_bytes(b"content")
    before = site.digest()
    new = site.shm / "new"
    for words in (
        ["pkernfs", "status", site.mnt],
        ["pkernfs", "info", site.region],
        ["pkernfs", "cat", f"{site.region}:/f"],
        ["pkernfs", "--help"],
        ["fsck.pkernfs", "-n", site.region],
        ["mkfs.pkernfs", "--size", "32M", new],
    ):
        command = [find_program(str(words[0])), *map(str, words[1:])]
        with (site.tmp / "said").open("w+") as said:
            done = subprocess.run(
                command, preexec_fn=close(*closed), stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
            )
            said.seek(0)
            text = said.read()
        assert done.returncode == 0, text
        assert "Traceback" not in text
        assert "Exception ignored" not in text
    assert run("fsck.pkernfs", "-n", new).returncode == 0
    assert site.digest() == before


@pytest.mark.parametrize(
    "words",
    [
        "pkernfs status MNT",
        "pkernfs info --json REGION",
        "pkernfs ls -l REGION",
        "pkernfs --help",
        "fsck.pkernfs -n REGION",
    ],
)
def test_a_full_disk_for_what_a_command_prints(site: Site, words: str) -> None:
    """One line, and a status that says so."""
    command = words.replace("MNT", str(site.mnt)).replace("REGION", str(site.region)).split()
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [find_program(command[0]), *command[1:]], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"{command[0]}: cannot write the output: No space left on device"
    assert "Traceback" not in done.stderr


def test_names_that_are_no_utf8(unmounted: Site) -> None:
    """In a locale whose output is strict (en_US.UTF-8) they are printed as they are."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    odd = unmounted.shm / os.fsdecode(b"region-\xe9")
    for command in (["mkfs.pkernfs", "--size", "32M"], ["fsck.pkernfs", "-n"], ["pkernfs", "info"], ["pkernfs", "ls"]):
        result = run(*map(str, command), odd, env=environment)
        assert result.returncode == 0, result
        assert result.stderr == ""


def test_a_working_directory_that_is_gone() -> None:
    """A path that is relative to it is an error in one line."""
    command = [find_program("pkernfs"), "info", "region"]
    done = subprocess.run(command, preexec_fn=go_where_nothing_is, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_the_log_is_where_the_command_was_given(unmounted: Site) -> None:
    """A relative name is one in the working directory of the command, not of the server."""
    words: list[str | Path] = ["mount.pkernfs", unmounted.region, unmounted.mnt, "-o", "log=relative.log"]
    assert run(*words, cwd=unmounted.tmp).returncode == 0
    assert "mounted on" in (unmounted.tmp / "relative.log").read_text()
    assert not Path("/relative.log").exists()
