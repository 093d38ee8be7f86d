"""What the host refuses a mount in use: it goes on with what it has, says so, and is whole again afterwards.

A table of system calls and errors, each injected into the running keeper or worker by strace(1) while a load runs; then
limits, full and read-only filesystems, and an installation that is gone.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from pkernfs import client
from tests.mount import host
from tests.mount.host import SmallLoad, fill, limited, refused, small_filesystem
from tests.mount.site import ROOT, Site, find_program, run, wait_for

#: What a mount says of all this: that it cannot, and that it can again.
SAID = re.compile(
    "cannot start|cannot do all|cannot be|nobody serves|takes over|takeover failed|standby|is the next one|"
    "before this one|goes on without|a message of the keeper|killing worker|in the kernel|in Python|^  |back to the"
)
RECVMSG = {"x86_64": "47 ", "aarch64": "212 "}.get(platform.machine(), "")
PROCESS = "clone,clone3,fork,vfork"


class Row(NamedTuple):
    """A line of the table."""

    where: str  #: keeper or worker
    calls: str
    errors: str
    act: (
        str  #: what is done meanwhile: kill NAME, ask or wait; "once": it is over only when nothing is refused any more
    )
    trouble: str = ""  #: a pattern of what status, or with "once" the log, must say meanwhile; "": nothing
    below: bool = False  #: also in what the process starts


TABLE = (
    Row("keeper", PROCESS, "EAGAIN ENOMEM", "kill standby", "standby: cannot start: a process for a worker: "),
    Row("keeper", "execve", "EAGAIN ENOMEM EACCES ELIBBAD", "kill standby", "standby: cannot start: ", below=True),
    Row("keeper", "socketpair", "EMFILE ENFILE ENOMEM ENOBUFS", "kill standby", "standby: cannot start: "),
    Row("keeper", "pipe2", "EMFILE ENFILE", "kill standby", "standby: cannot start: "),
    Row("keeper", "openat", "EMFILE ENFILE ENOMEM EIO", "kill standby"),
    Row("keeper", "pidfd_open", "EMFILE ENFILE ENOMEM ENODEV", "kill standby"),
    Row("keeper", "poll,ppoll", "ENOMEM EINTR", "kill standby"),
    Row("keeper", "sendmsg,sendto", "ENOBUFS ENOMEM", "kill standby"),
    Row("keeper", "recvmsg,recvfrom", "ENOMEM ENOBUFS", "ask"),
    Row("keeper", "mmap,mremap,brk", "ENOMEM", "kill standby"),
    Row("keeper", "fstat,newfstatat,statx,lseek", "ENOMEM EIO", "kill standby"),
    Row("keeper", "write", "ENOSPC EDQUOT EIO EFBIG EROFS", "kill standby", "log: cannot be written: "),
    Row("keeper", "fcntl,ioctl,dup,dup2,dup3,close", "EIO", "kill standby"),
    Row("keeper", PROCESS, "EAGAIN ENOMEM", "kill worker"),
    Row("keeper", "socketpair", "EMFILE ENFILE ENOMEM ENOBUFS", "kill worker once", "worker: takeover failed"),
    Row("keeper", "sendmsg,sendto", "ENOBUFS ENOMEM ETOOMANYREFS", "kill worker once", "worker: takeover failed"),
    Row("keeper", "recvmsg,recvfrom", "ENOMEM", "kill worker once"),
    Row("keeper", "openat", "EMFILE ENFILE ENOMEM", "kill worker"),
    Row("keeper threads", "accept,accept4", "EMFILE ENFILE ENOMEM ENOBUFS EPERM", "ask once", "commands: cannot be "),
    Row("keeper threads", PROCESS, "EAGAIN", "ask", "commands: cannot be answered: a thread: "),
    Row("keeper threads", "openat,open,getdents64", "EMFILE ENFILE ENOMEM", "ask"),
    Row("worker", "accept,accept4", "EMFILE ENFILE ENOMEM ENOBUFS EPERM", "ask once", "socket: cannot be answered"),
    Row("worker", PROCESS, "EAGAIN ENOMEM", "ask once"),
    Row("worker", PROCESS, "EAGAIN ENOMEM", "kill keeper"),
    Row("worker", "socketpair", "EMFILE ENFILE ENOMEM", "kill keeper"),
    Row("worker", "pipe2", "EMFILE ENFILE", "kill keeper"),
    Row("worker", "sendmsg,sendto", "ENOBUFS ENOMEM", "wait"),
    Row("worker", "recvmsg,recvfrom", "ENOMEM ENOBUFS", "wait"),
    Row("worker", "openat,open", "EMFILE ENFILE ENOMEM EIO", "ask"),
)
CASES = [
    pytest.param(row, error, id=f"{row.where}-{row.calls.split(',')[0]}-{error}-{row.act}".replace(" ", "-"))
    for row in TABLE
    for error in row.errors.split()
]
#: One of each line, and of errors the one that is met most; all of them: tests/run -m slow -k refusals
SHORT = [one for number, one in enumerate(CASES) if not number or CASES[number - 1].values[0] is not one.values[0]]


@pytest.fixture(scope="module")
def used() -> Iterator[tuple[Site, SmallLoad]]:
    """A mount in use, for all lines of the table."""
    with ExitStack() as stack:
        site = Site()
        site.expected = SAID
        stack.callback(site.close)
        site.mount("hang=20")
        (site.mnt / "asked").touch()
        yield site, stack.enter_context(host.load(site))


def troubles(site: Site) -> list[str]:
    """What status shows."""
    return [f"{one['what']}: {one['why']}" for one in site.status()["troubles"]]


def template(status: dict[str, Any]) -> int:
    """The process that workers are forked from: the keeper's child that neither serves nor is the standby; 0: none."""
    keeper = status["keeper"]
    children = map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())
    return next((pid for pid in children if pid not in (status["worker"], status["standby"])), 0)


def whole(site: Site) -> bool:
    """Whether a mount has all that it should, and nothing to say."""
    status = site.status()
    return bool(status["standby"]) and not status["troubles"] and bool(template(status))


def kill_spare(status: dict[str, Any]) -> None:
    """Kill the standby and what it was forked from: the next one must be a process of the installation."""
    kill(template(status))
    kill(status["standby"])


def kill(pid: int) -> None:
    """kill -9, and wait for the end."""
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: host.select_readable(handle), "its end")
    os.close(handle)


#: Asks the worker, which needs a thread for that, and the keeper.
ASK = "import sys; from pkernfs import client; client.set_direct(sys.argv[1], False); client.status(sys.argv[1])"


@contextmanager
def acting(site: Site, row: Row, status: dict[str, Any]) -> Iterator[None]:
    """Do what the line says; what was begun meanwhile must succeed in the end."""
    match row.act.split():
        case ["kill", "standby"]:
            kill_spare(status)
            yield
        case ["kill", name, *_]:
            kill(status[name])
            yield
        case ["ask", *_]:
            with subprocess.Popen([sys.executable, "-c", ASK, site.mnt / "asked"], cwd="/") as process:
                yield
                assert process.wait() == 0
        case _:
            wait_for(lambda: site.status()["uptime"] > status["uptime"] + 3, "three beats")
            yield


def inject(site: Site, load: SmallLoad, row: Row, error: str) -> None:
    """One line with one error."""
    wait_for(lambda: whole(site), "a mount that has everything", 90.0)
    before = site.status()
    name, *threads = row.where.split()
    pid = before[name]
    kept = [one for one in ("keeper", "worker") if f"kill {one}" not in row.act]
    begin = site.server_log.stat().st_size

    def said() -> bool:
        text = site.server_log.read_text()[begin:] if "once" in row.act else "\n".join(troubles(site))
        return bool(re.search(row.trouble, text))

    with ExitStack() as stack:
        done = stack.enter_context(ExitStack())
        with refused(pid, row.calls, error, below=row.below, every=bool(threads)):
            done.enter_context(acting(site, row, before))
            if row.trouble:
                wait_for(said, f"{row.trouble!r} to be said")
            if "once" not in row.act:
                done.close()
                load.goes_on()
    wait_for(lambda: whole(site), "a mount that is whole again", 90.0)
    after = site.status()
    assert {one: after[one] for one in kept} == {one: before[one] for one in kept}
    load.goes_on()


@pytest.mark.parametrize(("row", "error"), SHORT)
def test_refused(used: tuple[Site, SmallLoad], row: Row, error: str) -> None:
    """No call of the load fails; keeper and worker are those of before; status says what is refused, and no longer."""
    inject(*used, row, error)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "error"), CASES)
def test_refused_each(used: tuple[Site, SmallLoad], row: Row, error: str) -> None:
    """All of the table."""
    inject(*used, row, error)


# -- limits, and filesystems that are full ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [16, 24])
def test_descriptors(used: tuple[Site, SmallLoad], number: int) -> None:
    """A keeper that may have no more: what it holds in reserve is enough for a standby, and for answers."""
    site, load = used
    wait_for(lambda: whole(site), "a mount that has everything", 90.0)
    before = site.status()
    with (
        limited(before["keeper"], "nofile", f"{number}:"),
        limited(before["worker"], "nofile", f"{number}:"),
    ):
        kill(before["standby"])
        wait_for(lambda: site.status()["standby"] not in (0, before["standby"]), "another standby")
        assert client.info(str(site.mnt)).server == before["worker"]
        load.goes_on()
    wait_for(lambda: whole(site), "a mount that is whole again", 90.0)
    assert site.status()["keeper"] == before["keeper"]


@pytest.mark.parametrize(
    ("limit", "trouble"), [("fsize", "log: cannot be written: File too large"), ("as", "standby: cannot start: ")]
)
def test_limits(used: tuple[Site, SmallLoad], limit: str, trouble: str) -> None:
    """Of the size of files, and of memory."""
    site, load = used
    wait_for(lambda: whole(site), "a mount that has everything", 90.0)
    before = site.status()
    begin = site.server_log.stat().st_size

    def said() -> bool:
        # A keeper without memory may have none for an answer.
        return trouble in (site.server_log.read_text()[begin:] if limit == "as" else "\n".join(troubles(site)))

    with limited(before["keeper"], limit, "1:"):
        kill_spare(before)
        wait_for(said, trouble)
        load.goes_on()
    wait_for(lambda: whole(site), "a mount that is whole again", 90.0)
    assert site.status()["keeper"] == before["keeper"]


@contextmanager
def logs(site: Site) -> Iterator[Path]:
    """A small filesystem that the site's log is in."""
    folder = site.tmp / "logs"
    remove = small_filesystem(folder)
    before, site.server_log = site.server_log, folder / "log"
    site.expected = SAID
    try:
        yield folder
        site.umount()
        site.wait_for_end()
        assert site.complaints() == []
    finally:
        site.server_log = before
        remove()


def test_the_log_is_full(unmounted: Site) -> None:
    """Nothing ends; the next line that can be written says how many could not."""
    site = unmounted
    with logs(site) as folder:
        site.mount()
        wait_for(lambda: whole(site), "a mount that has everything")
        with host.load(site) as load:
            filler = fill(folder / "filler")
            fill(site.server_log)  # the rest of its last page
            kill(site.status()["worker"])
            wait_for(lambda: "log: cannot be written: No space left on device" in troubles(site), "the trouble")
            load.goes_on()
            filler.unlink()
            kill(site.status()["standby"])
            wait_for(lambda: whole(site), "a mount that has everything")
        assert "before this one cannot be written: No space left on device" in site.server_log.read_text()


def replaced(site: Site, name: str, before: int) -> bool:
    """Whether another process is the one of a name, and there is a standby."""
    status = site.status()
    return bool(status["standby"]) and status[name] != before


def test_the_log_is_read_only(unmounted: Site) -> None:
    """A worker, and a keeper, that cannot open it do without."""
    site = unmounted
    with logs(site) as folder:
        site.mount()
        wait_for(lambda: whole(site), "a mount that has everything")
        assert run("mount", "--bind", folder, folder).returncode == 0
        assert run("mount", "-o", "remount,bind,ro", folder).returncode == 0
        with host.load(site) as load:
            for name in ("worker", "keeper", "worker"):
                before = site.status()
                kill(before[name])
                load.goes_on()
                wait_for(partial(replaced, site, name, before[name]), f"another {name}")
            assert "log: cannot be written: Read-only file system" in troubles(site)
        assert run("umount", folder).returncode == 0


def test_the_log_is_moved_away(unmounted: Site) -> None:
    """logrotate: what comes next is in a new file."""
    site = unmounted
    site.expected = SAID
    site.mount()
    wait_for(lambda: whole(site), "a mount that has everything")
    site.server_log.rename(site.tmp / "rotated")
    kill(site.status()["worker"])
    wait_for(lambda: whole(site), "a mount that has everything")
    assert "takes over" in site.server_log.read_text()


# -- an installation that is gone -------------------------------------------------------------------------------------


class Installation:
    """A Python environment of links, which can be taken away and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin/python"
        libraries = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        libraries.mkdir(parents=True)
        self.python.parent.mkdir()
        self.python.symlink_to(os.path.realpath(sys.executable))
        (folder / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
        (folder / "pkernfs").symlink_to(ROOT / "pkernfs")
        (folder / "packages").symlink_to(Path(trio.__file__).parents[1])
        (libraries / "here.pth").write_text(f"{folder}\n{folder}/packages\n")

    def run(self, function: str, *arguments: str | os.PathLike[str]) -> str:
        """Run a command of it; what it printed."""
        code = f"import sys; from pkernfs.cli import {function}; sys.exit({function}())"
        result = run(self.python, "-P", "-c", code, *arguments)
        assert result.returncode == 0, result
        return result.stdout


@pytest.mark.parametrize("gone", ["all", "modules"])
def test_the_installation_is_gone(unmounted: Site, gone: str) -> None:
    """Who serves goes on, answers, and is replaced once; status says what is missing; when it is back, all is whole."""
    site = unmounted
    site.expected = SAID
    here = Installation(site.tmp / "venv")
    away = site.tmp / "away"
    moved = here.folder if gone == "all" else here.folder / "pkernfs"
    here.run("main_mount", site.region, site.mnt, "-o", f"log={site.server_log}")
    wait_for(lambda: whole(site), "a mount that has everything")
    first = site.status()
    (site.mnt / "ram").write_bytes(b"content")
    with host.load(site) as load:
        wait_for(lambda: standby_is_ready(site), "a standby that has loaded everything")
        moved.rename(away)
        kill(template(first))
        kill(first["worker"])
        load.goes_on()
        second = site.status()
        assert (second["worker"], second["keeper"]) == (first["standby"], first["keeper"])
        wait_for(lambda: any(one.startswith("standby: cannot start: ") for one in troubles(site)), "the trouble")
        shown = run("pkernfs", "status", site.mnt).stdout
        assert re.search(r"^(standby|trouble) .*cannot start: .* \((next try in|trying now)", shown, re.MULTILINE)
        assert "pkernfs upgrade MOUNT" in shown
        for verb in (
            ["info", site.mnt],
            ["info", site.mnt / "ram"],
            ["iommu", "list", site.mnt],
            ["metrics", site.mnt],
        ):
            result = run("pkernfs", *map(str, verb))
            assert result.returncode == 0, result
        client.set_direct(str(site.mnt / "ram"), False)
        assert os.getxattr(site.mnt / "ram", "user.pkernfs.extents")
        kill(second["keeper"])
        load.goes_on()
        away.rename(moved)
        wait_for(lambda: whole(site) and site.status()["keeper"] != second["keeper"], "another keeper", 90.0)
        kill(site.status()["worker"])
        load.goes_on()


def standby_is_ready(site: Site) -> bool:
    """Whether the standby has loaded what the verbs need, msgspec too, and waits for a message again (recvmsg)."""
    process = Path(f"/proc/{site.status()['standby']}")
    return "msgspec" in (process / "maps").read_text() and (process / "syscall").read_text().startswith(RECVMSG)


def test_another_installation_helps(unmounted: Site) -> None:
    """Where the one that a mount was made with does not come back, `pkernfs upgrade` of another one helps."""
    site = unmounted
    site.expected = SAID
    here = Installation(site.tmp / "venv")
    here.run("main_mount", site.region, site.mnt, "-o", f"log={site.server_log}")
    wait_for(lambda: whole(site) and standby_is_ready(site), "a standby that has loaded everything")
    here.folder.rename(site.tmp / "away")
    kill_spare(site.status())
    wait_for(lambda: troubles(site), "a trouble")
    assert run("pkernfs", "upgrade", "--probation", "0.1", site.mnt).returncode == 0
    wait_for(lambda: whole(site), "a standby", 90.0)


# -- waiting that has an end ------------------------------------------------------------------------------------------


def test_a_mount_that_ends_while_nobody_serves(unmounted: Site) -> None:
    """The keeper ends with it, and the region is free."""
    site = unmounted
    site.expected = SAID
    flag = site.tmp / "flag"
    script = site.tmp / "worker"
    script.write_text(f"#!/bin/sh\ntest -e {flag} && exit 1\nexec {sys.executable} -P -m pkernfs.server.worker $1\n")
    script.chmod(0o755)
    site.mount_with([str(script)])
    wait_for(lambda: whole(site), "a standby")
    status = site.status()
    flag.touch()
    kill_spare(status)
    kill(status["worker"])
    wait_for(lambda: "worker: takeover failed, nobody serves: " in "\n".join(troubles(site)), "the trouble")
    assert run("umount", "-l", site.mnt).returncode == 0
    site.wait_for_end()
    flag.unlink()
    site.mount()


@pytest.mark.parametrize("when", ["starts", "looks"])
def test_an_upgrade_that_hangs(unmounted: Site, when: str) -> None:
    """While it starts, or looks at the region: status and signals go on, and the wait has an end."""
    site = unmounted
    site.expected = re.compile("upgrade: ")
    code = (
        "import pkernfs.server.upgrade as u; u.START = u.CHECK = 1.5; import sys; from pkernfs.cli import main_mount; "
    )
    code += "sys.exit(main_mount())"
    assert run(sys.executable, "-c", code, site.region, site.mnt, "-o", f"log={site.server_log}").returncode == 0
    wait_for(lambda: whole(site), "a standby")
    script = site.tmp / "new"
    hang = "import time; time.sleep(1000)"
    if when == "looks":
        hang = "import pkernfs.server.worker as w; w.Worker.check = lambda *_: __import__('time').sleep(1000); w.main()"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{hang}" "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PKERNFS_WORKER": str(script)}
    command = [find_program("pkernfs"), "upgrade", str(site.mnt)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: "upgrade: starting" in site.server_log.read_text(), "the new worker")
        before = site.status()
        os.kill(before["standby"], signal.SIGKILL)  # the keeper's loop goes on: it starts another one
        site.expected = re.compile("upgrade: |standby: ")
        wait_for(lambda: site.status()["standby"] not in (0, before["standby"]), "another standby")
        assert process.wait() == 1
        assert process.stderr
        assert "within 1.5 s: keeping the previous version" in process.stderr.read()
    (site.mnt / "f").touch()
