"""fsck.pkernfs with somebody who looks on: questions, progress, and cancelling it."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs.cli.fsck import main
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import check
from pkernfs.fsck.check.passes import PASSES
from pkernfs.region import FileRegion, MemoryRegion
from tests.core.faults import FAULTS
from tests.core.images import cast
from tests.core.support import digest, new_fs

PATIENCE = 60.0
CHECKOUT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from pkernfs.cli import main_fsck; raise SystemExit(main_fsck())"]
Plant = Callable[[str], str]


@pytest.fixture
def planted(shm: Path) -> Plant:
    """A region in a file on tmpfs, with a fault ("" for none)."""

    def make(name: str) -> str:
        fs = new_fs(20)
        cast(fs)
        if name:
            FAULTS[name][1](fs)
        path = shm / "region"
        path.write_bytes(fs.region.view)
        return str(path)

    return make


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen([*COMMAND, *words], stdin=inner, stdout=inner, stderr=inner, cwd=CHECKOUT)
        os.close(inner)
        self.seen = b""

    def read(self) -> bool:
        """Some more of what it prints; whether there was more."""
        assert select.select([self.fd], [], [], PATIENCE)[0], self.seen
        try:
            chunk = os.read(self.fd, 65536)
        except OSError:  # EIO: nobody has it open any more
            chunk = b""
        self.seen += chunk
        return bool(chunk)

    def read_until(self, text: bytes) -> None:
        while text not in self.seen:
            assert self.read(), self.seen

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self.read():
            pass
        os.close(self.fd)
        return self.process.wait(PATIENCE)


@pytest.mark.parametrize(("answer", "status"), [(b"y\n", 1), (b"yes\n", 1), (b"n\n", 4), (b"\n", 4), (b"\x04", 4)])
def test_it_asks(planted: Plant, answer: bytes, status: int) -> None:
    path = planted("page-count")
    before = digest(path)
    terminal = Terminal(path)
    terminal.read_until(b"1 problem found: repair (y/N)? ")
    assert b": inode-pages: " in terminal.seen
    os.write(terminal.fd, answer)
    assert terminal.end() == status, terminal.seen
    assert (digest(path) == before) == (status == 4)
    assert main(["-n", path]) == (4 if status == 4 else 0)


def test_it_does_not_ask_about_a_clean_region(planted: Plant) -> None:
    terminal = Terminal(planted(""))
    assert terminal.end() == 0
    assert b": clean, " in terminal.seen
    assert b"y/N" not in terminal.seen


@pytest.mark.parametrize("options", [[], ["-f"], ["--json"]], ids=["", "-f", "--json"])
def test_without_a_terminal_it_only_looks(
    planted: Plant, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """And says what it sees."""
    assert main([*options, planted("")]) == 0
    path = planted("page-count")
    before = digest(path)
    capsys.readouterr()
    assert main([*options, path]) == 4
    assert "inode-pages" in capsys.readouterr().out
    assert digest(path) == before


def test_progress_is_for_a_terminal(planted: Plant) -> None:
    path = planted("page-count")
    terminal = Terminal("-n", path)
    assert terminal.end() == 4
    assert b"page tables" in terminal.seen, "the last pass"
    assert b"\x1b[" in terminal.seen
    piped = subprocess.run([*COMMAND, "-n", path], capture_output=True, check=False, cwd=CHECKOUT, timeout=PATIENCE)
    assert piped.returncode == 4
    assert piped.stderr == b""
    assert b"page tables" not in piped.stdout
    assert b"\x1b" not in piped.stdout


def test_progress_to_a_descriptor(planted: Plant, capfd: pytest.CaptureFixture[str]) -> None:
    path = planted("page-count")
    out, into = os.pipe()
    assert main(["-y", "-C", str(into), path]) == 1
    os.close(into)
    with open(out) as lines:
        found = [line.rstrip("\n").split(" ", 3) for line in lines]
    assert all(words[3] == path for words in found)
    numbers = [int(words[0]) for words in found]
    assert numbers[: len(PASSES)] == list(range(1, len(PASSES) + 1))
    assert max(numbers) > len(PASSES), "the stages of the repair, too"
    done = [int(words[1]) for words in found[: len(PASSES)]]
    total = [int(words[2]) for words in found[: len(PASSES)]]
    assert done == sorted(done)
    assert done[-1] > 0
    assert total[-1] > 0
    assert capfd.readouterr().err == ""


def test_nobody_reads_the_progress(planted: Plant) -> None:
    out, into = os.pipe()
    os.close(out)
    assert main(["-y", "-C", str(into), planted("page-count")]) == 1
    os.close(into)


def test_nobody_reads_what_it_prints(planted: Plant) -> None:
    """It is no "corrected"."""
    out, into = os.pipe()
    os.close(out)
    done = subprocess.run(
        [*COMMAND, "-n", planted("")], stdout=into, stderr=subprocess.PIPE, check=False, cwd=CHECKOUT, timeout=PATIENCE
    )
    os.close(into)
    assert (done.returncode, done.stderr) == (8, b"")


def test_figures(planted: Plant, capsys: pytest.CaptureFixture[str]) -> None:
    path = planted("")
    assert main(["-n", "-v", path]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5
    assert all(line.startswith(f"{path}: ") for line in out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_cancelled_by_a_signal(planted: Plant, number: signal.Signals) -> None:
    """During the check; nothing is changed."""
    path = planted("page-count")
    before = digest(path)
    out, into = os.pipe()
    # The pipe takes two lines and no third, so that the command cannot end before the signal.
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    os.write(into, b"x" * (4096 - 2 * len(f"1 0 0 {path}\n")))
    process = subprocess.Popen(
        [*COMMAND, "-y", "-C", str(into), path],
        pass_fds=[into],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=CHECKOUT,
        text=True,
    )
    with process:
        waiting = bytearray(4)
        while int.from_bytes(waiting, "little") < 4096:
            fcntl.ioctl(into, 0x541B, waiting)  # FIONREAD: what is in the pipe
            assert process.poll() is None
        process.send_signal(number)
        # Without the reader nothing holds the command up any more, should it go on against expectation.
        os.close(out)
        os.close(into)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 32
    assert stdout == ""
    assert stderr == "fsck.pkernfs: cancelled: what was repaired so far is whole; run it again\n"
    assert digest(path) == before


@pytest.mark.parametrize(
    "name", ["page-count", "superblock-damaged", "lost-file", "node-of-directory-damaged", "slab-header-damaged"]
)
def test_cancelled_within_a_repair(
    planted: Plant, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any of its stores: what was begun is finished, and a second run mends the rest."""
    path = planted(name)
    image = Path(path).read_bytes()
    for cut in range(1000):
        left = cut

        def counted(real: Callable[..., None]) -> Callable[..., None]:
            def store(*arguments: object) -> None:
                nonlocal left
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
                real(*arguments)

            return store

        with Path(path).open("r+b") as file:
            file.write(image)
        with monkeypatch.context() as patch:
            patch.setattr(FileRegion, "store", counted(FileRegion.store))
            patch.setattr(FileRegion, "store_word", counted(FileRegion.store_word))
            status = main(["-y", path])
        if status != 32:
            break
        if name != "superblock-damaged":
            twin = Volume(MemoryRegion(image=Path(path).read_bytes()))
            assert twin.recovered == 0, "no transaction is half done"
        assert main(["-y", path]) in (0, 1)
    assert cut > 0
    assert status == 1
    capsys.readouterr()
    assert main(["-n", "--json", path]) == 0
    assert json.loads(capsys.readouterr().out)["clean"]
    assert check(Volume(MemoryRegion(image=Path(path).read_bytes()))) == []
