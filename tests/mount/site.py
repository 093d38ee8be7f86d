"""A region with its mount, for one test or one module: everything is checked and taken away when it is closed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import select
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pkernfs import client
from pkernfs.api import to_builtins
from pkernfs.format import JOURNAL_HEADER, MiB
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import check
from pkernfs.fsck.findings import Finding
from pkernfs.mountinfo import mount_at
from pkernfs.region import open_region

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from mounted import Mounted, holds_fuse, serving, wait_until

__all__ = ["DEAD", "MiB", "Result", "Site", "below", "serving", "wait_for", "wait_until"]

#: What calls on a mount get whose server is gone; the second while the last descriptor of it is being closed.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
#: Seconds that anything may take.
PATIENCE = 60.0
ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sysconfig.get_path("scripts"))
#: For tests in which another user runs the Python that runs us.
PYTHON_FOR_ALL = pytest.mark.skipif(
    not all(path.stat().st_mode & 0o001 for path in Path(sys.base_prefix).resolve().parents),
    reason=f"other users cannot run the Python in {sys.base_prefix}",
)
#: What a server must not have to say.
COMPLAINT = re.compile(r"WARNING|ERROR|CRITICAL|Traceback")


def below(top: Path) -> list[Path]:
    """All that is below a directory, sorted; Path.rglob of Python 3.11.2 fails at symbolic links to long names."""
    return sorted(Path(folder, name) for folder, *names in os.walk(top) for name in (*names[0], *names[1]))


class Result(subprocess.CompletedProcess[str]):
    """How a command ended and what it printed."""

    @property
    def line(self) -> str:
        """Its one line of complaint."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"expected one line on standard error, found {self.stderr!r}"
        return lines[0]


def run(*words: str | os.PathLike[str], timeout: float = PATIENCE, **options: object) -> Result:
    """Run a command (one of ours by its name) to its end.

    What it prints goes to files: a server that it leaves behind would keep a pipe open.
    """
    with (
        tempfile.TemporaryFile("w+", errors="surrogateescape") as out,
        tempfile.TemporaryFile("w+", errors="surrogateescape") as err,
    ):
        command = [find_program(str(words[0])), *map(str, words[1:])]
        done = subprocess.run(  # type: ignore[call-overload]
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout, check=False, **options
        )
        out.seek(0)
        err.seek(0)
        return Result(command, done.returncode, out.read(), err.read())


def find_program(name: str) -> str:
    """One of our commands by its path, any other as it is."""
    path = PROGRAMS / name
    return str(path) if path.exists() else name


def errno_of(call: Callable[..., object], *args: object, **kwargs: object) -> int:
    """The errno of the OSError that a call raises; 0 when it succeeds."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno or -1
    return 0


def wait_for(condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    """Poll until ``condition`` holds; fails with ``what`` when it does not in time."""
    assert wait_until(lambda: bool(condition()), timeout), f"{what}: not within {timeout} s"


class Site(Mounted):
    """A region below /dev/shm, mounted below /tmp.

    ``expected`` is what the server's log may hold: a pattern of complaints that a test provokes.  ``said`` is what the
    last ``mount`` printed on standard error.
    """

    def __init__(self, region: Path | None = None, size: str | None = "64M", options: str = "") -> None:
        # Directories of our own that every user may enter: pytest's are root's alone.
        self.tmp = Path(tempfile.mkdtemp(prefix="pkernfs-test-", dir="/tmp"))
        self.tmp.chmod(0o755)
        self.shm = Path(tempfile.mkdtemp(prefix="pkernfs-test-", dir="/dev/shm"))
        self.options = options
        self.expected: re.Pattern[str] | None = None
        self.said = ""
        self.server_log = self.tmp / "server.log"
        super().__init__(region or self.shm / "region", self.tmp / "mnt", self.tmp / "commands.log")
        self.mountpoint.mkdir()
        if size is not None:
            self.make(size)

    @property
    def mnt(self) -> Path:
        """The mountpoint."""
        return self.mountpoint

    def make(self, size: str) -> None:
        """Make the region, whose path may be any bytes; other users may enter, as tests are about what they find."""
        # Sparse: what the host has is not what most tests are about, and hardly anything of the region is filled.
        self.run_ok("mkfs.pkernfs", "--sparse", "--size", size, "--mode", "0755", self.region)

    def mount(self, options: str = "") -> None:
        """Mount, or fail."""
        result = self.try_mount(options)
        assert result.returncode == 0, result
        self.said = result.stderr

    def try_mount(self, options: str = "") -> Result:
        """Mount with options; the command's result, whatever it is."""
        words = ",".join(filter(None, [self.options, options, f"log={self.server_log}"]))
        return run("mount.pkernfs", self.region, self.mountpoint, "-o", words)

    def mount_faulty(self, fault: str) -> None:
        """Mount with workers that have one of the faults of tests/mount/faulty.py."""
        words = [sys.executable, str(Path(__file__).with_name("faulty.py")), fault]
        self.mount_with(words)

    def mount_with(self, worker: list[str], options: str = "") -> None:
        """Mount with another program for the workers."""
        options = ",".join(filter(None, [self.options, options, f"log={self.server_log}"]))
        environment = {**os.environ, "PKERNFS_WORKER": shlex.join(worker)}
        result = run("mount.pkernfs", self.region, self.mountpoint, "-o", options, env=environment)
        assert result.returncode == 0, result

    def is_mounted(self) -> bool:
        """Asks the kernel's list, as its base does, for mountpoints with any name."""
        return mount_at(f"{os.path.realpath(self.mountpoint.parent)}/{self.mountpoint.name}") is not None

    def umount(self) -> None:
        """Unmount, and wait until the server has ended."""
        servers = [os.pidfd_open(pid) for pid in self.servers()]
        try:
            result = run("umount", self.mountpoint)
            assert result.returncode == 0, result
            for server in servers:
                assert select.select([server], [], [], PATIENCE)[0], "the server goes on after umount"
        finally:
            for server in servers:
                os.close(server)

    def servers(self) -> list[int]:
        """Ids of the processes that serve the region, keepers first; not of others that have it open."""
        return [pid for pid in super().servers() if holds_fuse(pid)]

    def keeper(self) -> int:
        """Id of the process that keeps the mount."""
        return self.servers()[0]

    def worker(self) -> int:
        """Id of the process that answers requests."""
        return self.servers()[-1]

    def status(self) -> dict[str, Any]:
        """What `pkernfs status` tells."""
        status: dict[str, Any] = to_builtins(client.status(str(self.mnt)))
        return status

    def wait_for_takeovers(self, number: int) -> None:
        """Wait until this many workers have taken over."""
        wait_for(lambda: self.status()["takeovers"] == number, f"takeover {number}")

    def crash(self) -> None:
        """kill -9 all servers: the mountpoint stays, dead."""
        servers = self.servers()
        assert servers, "expected a server to kill, found none"
        self.kill(servers)

    def restart(self) -> None:
        """Kill and mount again."""
        self.crash()
        self.mount()

    def digest(self) -> str:
        """Hash of every byte of the region."""
        with self.region.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    def allocated(self) -> int:
        """Bytes that the region takes on its host."""
        return self.region.stat().st_blocks * 512

    def free(self) -> int:
        """Free 4 KiB pages, as statvfs tells them."""
        return os.statvfs(self.mountpoint).f_bfree

    def wait_for_free(self, pages: int) -> None:
        """Wait until as much is free: the kernel lets go of an inode some time after its last user."""
        wait_until(lambda: self.free() == pages, 20.0)
        assert self.free() == pages

    def wait_until_allocated(self, at_most: int) -> None:
        """Wait until the region takes no more than this on its host."""
        wait_until(lambda: self.allocated() <= at_most, 20.0)
        assert self.allocated() <= at_most

    def wait_for_end(self) -> None:
        """Wait until no server of the region is left."""
        wait_for(lambda: not serving(self.region), f"no server of {self.region}")

    def run_ok(self, *words: str | os.PathLike[str]) -> str:
        """Run a command that must succeed; what it prints."""
        result = run(*words, timeout=10 * PATIENCE)
        assert result.returncode == 0, result
        return result.stdout

    def commit_again(self) -> None:
        """Make the journal look as if the server had died between committing and applying its last transaction."""
        with open_region(str(self.region), readonly=False) as region:
            journal = Volume(region).journal
            header = JOURNAL_HEADER.unpack(region.read(journal.header_at, JOURNAL_HEADER.size))
            assert not header.commit & 1
            assert header.length
            region.store_word(journal.header_at, 2 * header.sequence + 1)

    def verify(self) -> None:
        """The region holds a sound filesystem.  Reads only; a mount must be idle but for FORGETs that are under way."""
        problems: list[Finding] = []

        def sound() -> bool:
            with open_region(str(self.region), readonly=True, locked=False) as region:
                problems[:] = check(Volume(region))
            return not problems

        assert wait_until(sound, 3.0 if self.is_mounted() else 0.0), problems

    def complaints(self) -> list[str]:
        """Lines of the server's log that should not be there."""
        if not self.server_log.exists():
            return []
        lines = self.server_log.read_text(errors="replace").splitlines()
        return [line for line in lines if COMPLAINT.search(line) and not (self.expected and self.expected.search(line))]

    def close(self) -> None:
        """Unmount (or kill), check the log and the region, and delete everything.  Fails after the tidying up."""
        troubles: list[str] = []
        try:
            mounted = self.is_mounted()
            if mounted and self.servers():
                result = run("umount", self.mountpoint)
                if result.returncode:
                    troubles.append(f"umount: {result.stderr}")
                    run("umount", "-l", self.mountpoint)
                if not wait_until(lambda: not self.servers(), 20.0):
                    troubles.append("the server did not end by itself after umount")
            while servers := self.servers():
                self.kill(servers)
            while self.is_mounted():
                run("umount", "-l", self.mountpoint)
            troubles += self.complaints()
            if not troubles and self.region.exists():
                self.verify()
        finally:
            super().close()
            run("rm", "-rf", "--one-file-system", self.tmp, self.shm)
        assert not troubles, "\n".join(troubles)


@contextmanager
def site(**options: object) -> Iterator[Site]:
    """A Site that is closed at the end, whatever happens."""
    made = Site(**options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


@contextmanager
def small_host(site: Site, size: str) -> Iterator[None]:
    """Let the site have a region of 64 MiB, not mounted yet, on a tmpfs of ``size``."""
    host, region = site.tmp / "host", site.region
    host.mkdir()
    site.run_ok("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", host)
    try:
        site.region = host / "region"
        site.make("64M")
        yield
    finally:
        if site.is_mounted():
            site.run_ok("umount", site.mnt)
        site.wait_for_end()
        site.run_ok("umount", host)
        site.region = region


def faulty_worker(site: Site) -> list[str]:
    """The program of workers that fail as ``strike`` says."""
    return [sys.executable, str(Path(__file__).with_name("faulty_worker.py")), str(site.tmp / "strike")]


def strike(site: Site, what: str) -> None:
    """Say "HANDLER ACTION": what happens to a worker at the next call of a handler, see faulty_worker.py."""
    (site.tmp / "next").write_text(what)
    (site.tmp / "next").rename(site.tmp / "strike")


def coarse_tick() -> None:
    """Wait until the clock that filesystems take time stamps from has passed this moment (a few ms).

    One tick of it is not enough: it lags, and no stamp is older than what another filesystem was given more exactly.
    """
    coarse = 5  # CLOCK_REALTIME_COARSE
    now = time.time_ns()
    while time.clock_gettime_ns(coarse) <= now:
        pass
