"""-o writeback: the kernel holds back what is written; what was closed or synced is not lost, no content is wrong."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount import test_attributes, test_content
from tests.mount.site import MiB, Site, coarse_tick, errno_of, faulty_worker, run, strike, wait_for
from tests.mount.site import site as new_site
from tests.mount.test_takeover import ONCE, TAKEOVER, kill_worker, populate
from tests.mount.twin import Users

PAGE = 4096
#: What a kernel that writes back does in another way: a file that is truncated to the size that it has keeps its times,
#: pages that it reads to complete them count as accesses, a write too far fails when it is written back, and what is
#: written takes no space yet.
OTHERWISE = {
    *("test_times_that_calls_change", "test_times_that_writes_change", "test_unlinked_file_stays_usable"),
    *("test_too_big", "test_space_of_an_unlinked_file_comes_back_at_close"),
    *("test_mapping_outlives_name_and_descriptor", "test_holes_read_as_zeros_and_take_no_space"),
}
#: All else of these holds as it does without.
for module in (test_attributes, test_content):
    globals().update({k: v for k, v in vars(module).items() if k.startswith("test_") and k not in OTHERWISE})


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """For the tests of other modules."""
    with new_site(size="512M", options="writeback") as made:
        made.mount()
        yield made


@pytest.fixture
def site() -> Iterator[Site]:
    """A region of 64 MiB, mounted."""
    with new_site(options="writeback") as made:
        made.mount()
        yield made


class Load:
    """Random changes of one open file, made to a model too."""

    def __init__(self, path: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.path = path
        self.model = bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.append_fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def data(self) -> bytes:
        return self.random.randbytes(self.random.choice([1, 100, PAGE, 3 * PAGE + 17, 70_000]))

    def write(self) -> None:
        offset, data = self.random.randrange(400_000), self.data()
        assert os.pwrite(self.fd, data, offset) == len(data)
        self.model.extend(bytes(max(0, offset + len(data) - len(self.model))))
        self.model[offset : offset + len(data)] = data

    def append(self) -> None:
        data = self.data()
        assert os.write(self.append_fd, data) == len(data)
        self.model += data

    def truncate(self) -> None:
        size = self.random.randrange(400_000)
        os.ftruncate(self.fd, size)
        self.model[size:] = bytes(max(0, size - len(self.model)))

    def store(self) -> None:
        if not self.model:
            return
        at = self.random.randrange(len(self.model))
        with mmap.mmap(self.fd, len(self.model)) as memory:
            memory[at : at + 50] = self.model[at : at + 50] = self.random.randbytes(len(self.model[at : at + 50]))

    def sync(self) -> None:
        os.fsync(self.fd)

    def step(self) -> None:
        self.random.choices([self.write, self.append, self.truncate, self.store, self.sync], [8, 4, 2, 3, 1])[0]()
        assert os.fstat(self.fd).st_size == len(self.model)

    def check(self) -> None:
        assert self.path.read_bytes() == self.model
        assert self.path.stat().st_size == len(self.model)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.append_fd)


def test_random_changes(site: Site) -> None:
    """Writes, appends, truncations, stores into a mapping: as a model has it, then and on the next mount."""
    loads = [Load(site.mnt / f"{seed}", seed) for seed in range(4)]
    for _ in range(150):
        for load in loads:
            load.step()
    for load in loads:
        load.check()
        load.close()
        load.check()
    times = [load.path.stat().st_mtime_ns for load in loads]
    site.umount()
    site.mount()
    for load in loads:
        load.check()
    assert [load.path.stat().st_mtime_ns for load in loads] == times


def test_the_worker_is_killed(site: Site) -> None:
    """What the kernel holds back is written by the next worker, with what the first was asked for meanwhile."""
    site.expected = TAKEOVER
    load = Load(site.mnt / "f", 5)
    for round_ in range(4):
        for _ in range(25):
            load.step()
        kill_worker(site)
        load.append()
        if round_ % 2:
            load.sync()
    load.close()
    site.umount()
    site.mount()
    load.check()


@pytest.mark.parametrize("case", ["append", "truncate"])
def test_done_and_not_answered(case: str) -> None:
    """Exactly once, as without."""
    handler, call, holds = ONCE[case]
    with new_site(options="writeback") as made:
        made.expected = TAKEOVER
        made.mount_with(faulty_worker(made))
        populate(made)
        strike(made, f"{handler} kill")
        call(made.mnt)
        os.sync()
        wait_for(lambda: made.status()["takeovers"] == 1, "one takeover")
        assert holds(made.mnt)


def test_what_was_synced_survives_the_end_of_everything(site: Site) -> None:
    synced, closed, neither = (Load(site.mnt / name, seed) for seed, name in enumerate(("synced", "closed", "neither")))
    for load in (synced, closed, neither):
        for _ in range(30):
            load.step()
    synced.sync()
    closed.close()
    site.crash()
    for load in (synced, neither):
        for fd in (load.fd, load.append_fd):
            with suppress(OSError):  # closing writes back, which fails now
                os.close(fd)
    site.mount()
    for load in (synced, closed):
        load.check()
    neither.path.read_bytes()


def times(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns


def test_times_are_kept(site: Site) -> None:
    """The kernel's times reach the region: those of writes, and those that were set."""
    written, was_set = site.mnt / "written", site.mnt / "set"
    for path in (written, was_set):
        path.write_bytes(b"x" * 5000)
    os.utime(written, ns=(0, -(10**18)))
    before = times(written)
    coarse_tick()
    with open(written, "r+b", buffering=0) as file:
        file.write(b"y")
    assert times(written) > before
    os.utime(was_set, ns=(10**18, 10**18 + 1))
    assert times(was_set)[0] == 10**18 + 1
    found = times(written), times(was_set)
    site.umount()
    site.mount()
    assert (times(written), times(was_set)) == found


def test_set_id_bits_that_are_given_after_a_write_stay(site: Site, users: Users) -> None:
    """As `install -m 4755` gives them; a user's write after that takes them."""
    user = users.get(1000)
    site.mnt.chmod(0o777)
    path = str(site.mnt / "program")
    fd = user.call("open", path, os.O_RDWR | os.O_CREAT, 0o700)
    user.call("pwrite", fd, b"x" * 10000, 0)
    user.call("chmod", path, 0o6755)
    user.call("fsync", fd)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o6755
    user.call("pwrite", fd, b"y", 0)
    user.call("close", fd)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o755
    users.tidy()


@pytest.mark.parametrize("last", [os.fsync, os.close], ids=["fsync", "close"])
def test_no_space_is_told_at_last(site: Site, last: Callable[[int], None]) -> None:
    fd = os.open(site.mnt / "f", os.O_WRONLY | os.O_CREAT)
    for _ in range(70):
        assert os.write(fd, b"x" * MiB) == MiB
    assert errno_of(last, fd) == errno.ENOSPC
    if last is os.fsync:
        os.close(fd)
    os.unlink(site.mnt / "f")


def test_a_direct_mapping_is_refused(site: Site) -> None:
    (site.mnt / "ram").write_bytes(bytes(2 * MiB))
    result = run("pkernfs", "direct", site.mnt / "ram", "on")
    assert result.returncode
    assert "writeback" in result.line


def test_a_file_that_is_mapped_directly_is_read_past_the_cache(site: Site) -> None:
    """One that was marked on an earlier mount."""
    path = site.mnt / "ram"
    path.write_bytes(bytes(4 * MiB))
    site.umount()
    site.options = ""
    site.mount()
    site.run_ok("pkernfs", "direct", path, "on")
    offset = json.loads(os.getxattr(path, "user.pkernfs.extents"))[0]["region_offset"]
    site.umount()
    site.options = "writeback"
    site.mount()
    with open(path, "r+b", buffering=0) as file, open(site.region, "r+b", buffering=0) as region:
        assert file.read(10) == bytes(10)
        os.pwrite(region.fileno(), b"from below", offset)
        assert os.pread(file.fileno(), 10, 0) == b"from below"
        os.pwrite(file.fileno(), b"from above", 0)
        assert os.pread(region.fileno(), 10, offset) == b"from above"


def test_remount_knows_the_word(site: Site) -> None:
    (site.mnt / "f").write_bytes(b"content")
    site.run_ok("mount.pkernfs", "-o", "remount,ro,writeback", site.region, site.mnt)
    assert errno_of((site.mnt / "g").touch) == errno.EROFS
    assert (site.mnt / "f").read_bytes() == b"content"
