"""A host that refuses: system calls of a running process that fail, its limits, small filesystems; a load meanwhile.

with refused(site.keeper(), "socketpair", "EMFILE"):     by strace(1), in the process that runs already
    ...
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mount.site import PATIENCE, Site, run, wait_for

#: What uses a mount all the time: each call must succeed, and what is read must be what was written.
LOAD = """
import os, signal, sys
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
os.chdir(sys.argv[1])
number = 0
while not ended:
    data = b"%09d" % number * 700
    name, other = f"f{number % 5}", f"g{number % 3}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    assert os.write(fd, data) == len(data)
    os.fsync(fd)
    os.rename(name, other)
    assert os.pread(fd, len(data), 0) == data
    os.close(fd)
    os.mkdir("d")
    assert other in os.listdir(".")
    os.rmdir("d")
    os.unlink(other)
    number += 1
    print(number, flush=True)
"""


class SmallLoad:
    """A process that uses a mount, and ends with an error at the first call that fails."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOAD, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        self.goes_on()

    def goes_on(self) -> None:
        """A whole round of calls that begins now succeeds."""
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        while self.process.stdout.buffer.raw.read(1 << 16):  # type: ignore[attr-defined]
            pass
        os.set_blocking(self.process.stdout.fileno(), True)
        for _ in range(3):
            assert self.process.stdout.buffer.raw.read(1 << 16), self.end()  # type: ignore[attr-defined]

    def end(self) -> str:
        """End it; what it says of a call that failed."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=PATIENCE)
        return said


@contextmanager
def load(site: Site) -> Iterator[SmallLoad]:
    """A load that goes on from the beginning to the end, without a call that fails."""
    made = SmallLoad(site.mnt / "load")
    try:
        yield made
        made.goes_on()
    finally:
        said = made.end()
    assert said == ""


def select_readable(fd: int) -> bool:
    """Whether a descriptor is readable now: a pidfd is when its process has ended."""
    return bool(select.select([fd], [], [], 0)[0])


def tracer(pid: int, thread: int) -> int:
    """The process that traces a thread; 0: none; -1: the thread has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{thread}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    found = re.search(r"^TracerPid:\s*(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def _attach(pid: int, calls: str, error: str, *, below: bool, every: bool) -> subprocess.Popen[bytes] | None:
    """A strace(1) that has attached to a process; None: one of its threads has ended meanwhile."""
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")] if every else [pid]
    which = [word for thread in threads for word in ("-p", str(thread))]
    inject = f"inject={calls}:error={error}"
    command = ["strace", "-qq", "-o", "/dev/null", *["-f"] * below, *which, "-e", f"trace={calls}", "-e", inject]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    traced = {process.pid, -1}
    wait_for(lambda: traced.issuperset(tracer(pid, one) for one in threads) or process.poll() is not None, "strace")
    if process.poll() is None:
        return process
    said = process.communicate()[1]
    assert b"No such process" in said, said
    return None


@contextmanager
def refused(pid: int, calls: str, error: str, *, below: bool = False, every: bool = False) -> Iterator[None]:
    """Let system calls of the main thread of a process fail: ``calls`` as strace(1) names them, with commas.

    ``below``: in what it starts, too; ``every``: in all of its threads.
    """
    attached: list[subprocess.Popen[bytes]] = []

    def attach() -> bool:
        process = _attach(pid, calls, error, below=below, every=every)
        attached.extend([process] if process else [])
        return process is not None

    wait_for(attach, "strace")
    try:
        yield
    finally:
        attached[0].send_signal(signal.SIGINT)  # it lets go of what it has attached to
        attached[0].communicate(timeout=PATIENCE)


@contextmanager
def limited(pid: int, limit: str, value: str) -> Iterator[None]:
    """Set a limit of a running process, as prlimit(1) names it, and give it back what it had."""
    shown = run("prlimit", "--pid", str(pid), f"--{limit}", "--raw", "--noheadings", "--output", "SOFT,HARD").stdout
    before = ":".join(shown.split())
    assert run("prlimit", "--pid", str(pid), f"--{limit}={value}").returncode == 0
    try:
        yield
    finally:
        assert run("prlimit", "--pid", str(pid), f"--{limit}={before}").returncode == 0


def small_filesystem(path: Path, size: str = "64k") -> Callable[[], None]:
    """A tmpfs of its own at ``path``, in the mount namespace of the tests; what takes it away."""
    path.mkdir(exist_ok=True)
    result = run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", path)
    assert result.returncode == 0, result

    def remove() -> None:
        run("umount", "-l", path)

    return remove


def fill(path: Path) -> Path:
    """Let a file take what is left of its filesystem, to the last byte: of newlines."""
    with path.open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"\n" * size):
                    pass
            except OSError:
                pass
    return path
