"""Processes that change files until their filesystem dies, and say which calls had returned by then.

    with Load(top, seed, journals) as load: load.wait_for(calls); ...kill...; load.end(); load.verify()

Each worker keeps a journal in ``journals`` (on another filesystem): a line before each call and one behind it.  Words
in memory that is shared with the test tell how many calls have returned and what kind of call is under way.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.mount.model import KINDS, RECORD, Call, Ground, Model, content

ROOT = Path(__file__).parents[2]
#: What calls on a mount get whose server is gone.
DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
#: Files that a worker keeps open, with or without a name.
OPEN_FILES = 6
PATIENCE = 60.0
NUMBERS = {kind: number for number, kind in enumerate(KINDS, 1)}
WORDS = 2  #: of each worker: calls that have returned, number of the kind of the call under way or 0


class Load:
    """The workers, seen from the test.  ``models`` holds what they have made, once ``verify`` has found it."""

    def __init__(self, top: Path, seed: int, journals: Path, workers: int = 4) -> None:
        self.seed, self.journals = seed, journals
        self.grounds = [Ground(top, worker, workers) for worker in range(workers)]
        self.models: list[Model] = []
        self.complaint = ""
        for ground in self.grounds:
            ground.make()
        journals.mkdir()
        with (journals / "words").open("w+b") as file:
            file.truncate(mmap.PAGESIZE)
            self.words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
        words = [sys.executable, "-m", "tests.mount.load", str(top), str(seed), str(journals), str(workers)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def returned(self) -> int:
        """How many calls have returned."""
        return sum(self.words[WORDS * worker] for worker in range(len(self.grounds)))

    def wait_for(self, calls: int, within: str = "") -> None:
        """Wait until as many calls have returned; then until worker 0 is in a call of the kind ``within``."""
        wanted = NUMBERS.get(within, 0)
        deadline = time.monotonic() + PATIENCE
        while self.returned() < calls or (wanted and self.words[1] != wanted):
            if self.process.poll() is not None or time.monotonic() > deadline:
                complaint = self.stop()
                raise AssertionError(f"seed {self.seed}: the load stopped after {self.returned()} calls: {complaint}")
            if self.returned() < calls:
                time.sleep(0.0001)

    def end(self) -> None:
        """Wait for the end of the workers, whose filesystem was killed."""
        self.complaint += self.process.communicate(timeout=PATIENCE)[1]
        assert self.process.returncode == 0, f"seed {self.seed}: {self.complaint}"

    def stop(self) -> str:
        """End them, whatever they do; their complaint."""
        if self.process.poll() is None:
            self.process.terminate()
        if self.process.stderr and not self.process.stderr.closed:
            self.complaint += self.process.communicate(timeout=PATIENCE)[1]
        return self.complaint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def verify(self) -> int:
        """Compare what is there with what the calls that returned must have made; how many those were."""
        count = 0
        troubles = []
        for ground in self.grounds:
            model = Model()
            pending: Call | None = None
            for line in (self.journals / f"w{ground.worker}").read_text().splitlines():
                entry = json.loads(line)
                if entry == "returned":
                    assert pending is not None
                    model.apply(pending)
                    count += 1
                    pending = None
                else:
                    pending = entry
            model, lines = ground.found().settle(model, pending)
            self.models.append(model)
            troubles += [f"worker {ground.worker}: {line}" for line in lines]
        assert not troubles, "\n".join([f"seed {self.seed}: after {count} calls:", *troubles])
        return count

    def verify_again(self) -> None:
        """Compare what is there with what ``verify`` found."""
        for ground, model in zip(self.grounds, self.models, strict=True):
            assert ground.found().differences(model) == [], f"seed {self.seed}, worker {ground.worker}, a round later"


class Worker:
    """One of the processes."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.model = Model()
        self.files: dict[int, int] = {}  #: descriptors by the numbers of nodes
        self.libc = ctypes.CDLL(None, use_errno=True)

    def opened(self, path: str) -> int:
        """A descriptor of the file, which stays open for a while."""
        number = self.model.nodes[path].number
        if number not in self.files:
            self.keep(number, os.open(self.ground.path(path), os.O_RDWR))
        return self.files[number]

    def keep(self, number: int, fd: int) -> None:
        """Keep a descriptor, and close the oldest of too many."""
        self.files[number] = fd
        if len(self.files) > OPEN_FILES:
            os.close(self.files.pop(next(iter(self.files))))

    def do(self, call: Call) -> None:
        """Make the call."""
        kind, *words = call
        getattr(self, kind)(*words)

    def create(self, path: str, mode: int) -> None:
        fd = os.open(self.ground.path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        self.keep(self.model.made + 1, fd)

    def symlink(self, path: str, target: str) -> None:
        os.symlink(target, self.ground.path(path))

    def mkdir(self, path: str) -> None:
        os.mkdir(self.ground.path(path))

    def write(self, path: str, at: int, length: int, seed: int) -> None:
        _whole(os.pwrite(self.opened(path), content(seed, length), at), length)

    def append(self, path: str, length: int, seed: int) -> None:
        fd = os.open(self.ground.path(path), os.O_WRONLY | os.O_APPEND)
        try:
            _whole(os.write(fd, content(seed, length)), length)
        finally:
            os.close(fd)

    def mapped(self, path: str, at: int, length: int, seed: int) -> None:
        with mmap.mmap(self.opened(path), at + length) as view:
            view[at : at + length] = content(seed, length)
            low = at - at % mmap.PAGESIZE
            view.flush(low, at + length - low)

    def record(self, slot: int, seed: int) -> None:
        if 0 not in self.files:
            self.keep(0, os.open(self.ground.records, os.O_RDWR))
        _whole(os.pwrite(self.files[0], content(seed, RECORD), self.ground.record_at(slot)), RECORD)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.ground.path(path), size)

    def unlink(self, path: str) -> None:
        os.unlink(self.ground.path(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(self.ground.path(path))

    def rename(self, old: str, new: str) -> None:
        os.rename(self.ground.path(old), self.ground.path(new))

    def exchange(self, one: str, two: str) -> None:
        words = [os.fsencode(self.ground.path(path)) for path in (one, two)]
        if self.libc.renameat2(-100, words[0], -100, words[1], 2):
            raise OSError(ctypes.get_errno(), "renameat2")

    def link(self, old: str, new: str) -> None:
        os.link(self.ground.path(old), self.ground.path(new))

    def setxattr(self, path: str, name: str, size: int, seed: int) -> None:
        os.setxattr(self.ground.path(path), name, content(seed, size))

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.ground.path(path), name)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.ground.path(path), mode)

    def fsync(self, path: str) -> None:
        os.fsync(self.opened(path))

    def run(self, seed: int, journal: Any, words: memoryview) -> None:
        """Make calls until one fails as calls on a dead mount do."""
        rng = random.Random(seed)
        base = WORDS * self.ground.worker
        try:
            while True:
                call = self.model.choose(rng)
                journal.write(json.dumps(call).encode() + b"\n")
                words[base + 1] = NUMBERS[call[0]]
                self.do(call)
                words[base + 1] = 0
                journal.write(b'"returned"\n')
                words[base] += 1
                self.model.apply(call)
        except OSError as error:
            if error.errno not in DEAD:
                raise


def _whole(done: int, length: int) -> None:
    if done != length:
        raise OSError(errno.EIO, "a short write: the server died between its parts")


def main() -> None:
    """Fork the workers and wait for them.

    A store into a mapping of a dead mount's file ends its worker with SIGBUS.
    """
    top, seed, journals, workers = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    os.umask(0)
    with (journals / "words").open("r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")
    children = []
    for worker in range(workers):
        child = os.fork()
        if not child:
            with open(journals / f"w{worker}", "wb", buffering=0) as journal:
                Worker(Ground(top, worker, workers)).run(seed * 1000 + worker, journal, words)
            os._exit(0)
        children.append(child)

    def end(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    workers_of = {child: worker for worker, child in enumerate(children)}
    while children:
        # Not reaped before it is off the list: a process id that ``end`` may kill is still its own.
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        child = ended.si_pid
        children.remove(child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        mapping = words[WORDS * workers_of[child] + 1] == NUMBERS["mapped"]
        if code and not (code == -signal.SIGBUS and mapping):
            print(f"worker {workers_of[child]} ended with {code}", file=sys.stderr)
            end()


if __name__ == "__main__":
    main()
