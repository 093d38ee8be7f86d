"""Fixtures of the core tests: every filesystem that a test made must be sound when the test ends."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.region import open_region
from tests.core.support import MiB, assert_sound, mkfile, new_fs, open_fs, sparse_file

HOLD = """
import sys
from pkernfs.region import open_region
with open_region(sys.argv[1], readonly=sys.argv[2] == "readonly"):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def make_fs() -> Iterator[Callable[..., Filesystem]]:
    """Make filesystems: ``make_fs(mib)``."""
    made = []

    def make(mib: int = 64) -> Filesystem:
        made.append(new_fs(mib))
        return made[-1]

    yield make
    for fs in made:
        assert_sound(fs)
        # The same again from what is in the region only.
        again = open_fs(fs.region)
        assert_sound(again)


@pytest.fixture
def fs(make_fs: Callable[..., Filesystem]) -> Filesystem:
    """A filesystem of 64 MiB in memory."""
    return make_fs()


@pytest.fixture(params=["tmpfs", "disk"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a region can be made, on tmpfs and on a disk."""
    if request.param == "disk":
        yield str(tmp_path / "region")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-test-") as directory:
        yield f"{directory}/region"


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-test-") as directory:
        yield Path(directory)


@pytest.fixture
def made(path: str) -> str:
    """A region of 32 MiB with a file in it."""
    sparse_file(path, 32 * MiB)
    with open_region(path) as region:
        mkfs(region)
        fs = open_fs(region)
        mkfile(fs, b"f", b"content")
    return path


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held is not waited for."""
    monkeypatch.setattr("pkernfs.region.lock.LOCK_WAIT", 0.0)


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Let another process open the region."""
    holders = []

    def start(path: str, how: str = "writable") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, path, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        holders.append(process)
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in holders:
        process.communicate("")
        assert process.returncode == 0
