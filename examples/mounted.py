"""A region with its mount, for demonstrations and tests that kill the server.

Uses nothing but the commands that an administrator has: mkfs.pkernfs, mount.pkernfs, umount, pkernfs.  As a script,
prints the ids of the processes that serve the region given to it.
"""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from pkernfs.errors import PkernfsError
from pkernfs.mountinfo import mount_at

#: Seconds that a server may take to end, and a mount to be gone.
PATIENCE = 30.0


class Mounted:
    """The region at `region`, to be mounted at `mountpoint`; neither needs to exist.

    The commands are those in `programs`, by default those of the Python that runs us.  `log` is a file that gets what
    they and the server have to say.
    """

    def __init__(self, region: Path, mountpoint: Path, log: Path, programs: Path | None = None) -> None:
        self.region = region
        self.mountpoint = mountpoint
        self.log = log
        self.programs = programs or Path(sysconfig.get_path("scripts"))

    def make(self, size: str) -> None:
        """Make the region."""
        self._run("mkfs.pkernfs", "--size", size, str(self.region))

    def mount(self) -> None:
        """Mount the region.  Returns when the mount is usable."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self._run("mount.pkernfs", str(self.region), str(self.mountpoint))

    def create_ram(self, file: Path, size: int) -> None:
        """Make a guest's memory, of `size` bytes."""
        self._run("pkernfs", "create-ram", str(file), str(size))

    def direct_backend(self, file: Path) -> str:
        """Mark `file`; what QEMU needs to map it past the mount, as the argument of its `-object`."""
        self._run("pkernfs", "direct", str(file), "on")
        answer = self._run("pkernfs", "qemu-args", str(file), "--direct")
        words = shlex.split(answer)
        return words[words.index("-object") + 1]

    def servers(self) -> list[int]:
        """Ids of the processes that serve the region, parents before their children."""
        return serving(self.region)

    def kill(self, servers: list[int]) -> None:
        """kill -9 `servers`, and wait until they are gone: what kexec does to them.

        Had one of them started another in between, that one would hold the region's lock, and the next mount would say
        so.
        """
        handles = []
        for pid in servers:
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
                os.kill(pid, signal.SIGKILL)
        try:
            for handle in handles:
                if not select.select([handle], [], [], PATIENCE)[0]:
                    raise PkernfsError(
                        f"one of the processes {servers} still runs after kill -9", hint="see ps -o stat,wchan"
                    )
        finally:
            for handle in handles:
                os.close(handle)

    def detach(self) -> None:
        """Take a dead mount out of the way."""
        if self.is_mounted():
            self._run("umount", "--lazy", str(self.mountpoint))

    def is_mounted(self) -> bool:
        """Is something mounted at the mountpoint?  Asks the kernel's list, for a dead mount answers nothing itself."""
        at = os.path.realpath(self.mountpoint.parent) + "/" + self.mountpoint.name
        return mount_at(at) is not None

    def close(self) -> None:
        """Unmount, see to it that no server is left, and delete the region and the mountpoint."""
        with contextlib.suppress(PkernfsError):
            if self.is_mounted():
                self._run("umount", str(self.mountpoint))
                wait_until(lambda: not serving(self.region), 5.0)
        while servers := self.servers():
            self.kill(servers)
        self.detach()
        self.region.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.mountpoint.rmdir()

    def _run(self, program: str, *arguments: str) -> str:
        """Run a command and return what it printed.

        Its errors go to the log, not to a pipe: a server that stays in the background would keep the pipe open.
        """
        path = self.programs / program
        command = [str(path) if path.exists() else program, *arguments]
        output = self.log.with_suffix(".out")
        with output.open("wb") as out, self.log.open("ab") as log:
            begin = log.tell()
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, check=False).returncode
        if status != 0:
            said = self.log.read_bytes()[begin:].decode(errors="replace").strip() or "nothing"
            raise PkernfsError(f"{shlex.join(command)} ended with {status} and said: {said}")
        return output.read_text()


def serving(region: Path) -> list[int]:
    """Ids of the processes that serve `region`: who has it open, whoever before those holds a /dev/fuse, all below.

    Parents come before their children.  We go by what a process holds and not by what it is called: another mount's
    server has the same name.
    """
    try:
        status = os.stat(region)
    except FileNotFoundError:
        return []
    parents: dict[int, int] = {}
    found: set[int] = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()[:2]
            if state != b"Z" and pid != os.getpid():
                parents[pid] = int(parent)
                if has_open(pid, status):
                    found.add(pid)

    def ancestors(pid: int) -> list[int]:
        chain = []
        while (pid := parents.get(pid, 0)) > 1:
            chain.append(pid)
        return chain

    for pid in list(found):
        found.update(takewhile(holds_fuse, ancestors(pid)))
    found.update(pid for pid in parents if found.intersection(ancestors(pid)))
    return sorted(found, key=lambda pid: len(ancestors(pid)))


def has_open(pid: int, status: os.stat_result) -> bool:
    """Has the process this file open, or mapped?  It may have closed a file that it maps."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            # Only the right inode number is asked with stat: it hangs where the server of another FUSE mount does.
            if b"ino:\t%d\n" % status.st_ino in Path(f"/proc/{pid}/fdinfo/{name}").read_bytes():
                found = os.stat(f"/proc/{pid}/fd/{name}")
                if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                    return True
    wanted = b" %02x:%02x %d " % (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    return wanted in Path(f"/proc/{pid}/maps").read_bytes()


def holds_fuse(pid: int) -> bool:
    """Has the process /dev/fuse open?"""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == "/dev/fuse":
                    return True
    return False


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until `condition` holds; False if it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


if __name__ == "__main__":
    print(*serving(Path(sys.argv[1])))
