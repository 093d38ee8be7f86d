"""Several processes at once: locks, directories that change while they are read, and counts at their limits."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pkernfs.format import LINK_MAX, ROOT_INO
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import open_region
from tests.mount.agent import Directory
from tests.mount.site import Site, errno_of, run
from tests.mount.twin import Twin

# -- locks ----------------------------------------------------------------------------------------------------------


def test_flock_between_processes(twin: Twin) -> None:
    twin.file("f", b"", 0o666)
    one, two = twin.by(1000), twin.by(1001)
    mine, other = one.open("f", os.O_RDWR), two.open("f", os.O_RDWR)
    assert one.flock(mine, b"w") is True
    assert two.flock(other, b"r") is False
    assert two.flock(other, b"w") is False
    assert one.flock(mine, b"r") is True
    assert two.flock(other, b"r") is True
    assert one.flock(mine, b"w") is False
    one.close(mine)
    assert two.flock(other, b"w") is True
    two.close(other)


def test_record_locks_between_processes(twin: Twin) -> None:
    twin.file("f", b"x" * 100, 0o666)
    one, two = twin.by(1000), twin.by(1001)
    mine, other = one.open("f", os.O_RDWR), two.open("f", os.O_RDWR)
    assert one.lockf(mine, b"w", 0, 10) is True
    assert two.lockf(other, b"w", 5, 10) is False
    assert two.lockf(other, b"w", 10, 10) is True
    assert one.lockf(mine, b"r", 0, 10) is True
    assert two.lockf(other, b"r", 0, 10) is True
    assert one.lockf(mine, b"w", 50) is True  # to the end and beyond
    assert two.lockf(other, b"r", 1 << 40, 1) is False
    assert one.lockf(mine, b"u", 60) is True
    assert two.lockf(other, b"w", 60, 1) is True
    again = one.open("f", os.O_RDWR)
    one.close(again)  # closing any descriptor of the file lets all record locks of the process go
    assert two.lockf(other, b"w", 0, 60) is True


def test_locks_wait(twin: Twin) -> None:
    """A lock that has to wait is granted when the other goes."""
    twin.file("f", b"", 0o666)
    one, two = twin.users.get(1000), twin.users.get(1001)
    path = f"{twin.roots.ours}/f"
    mine, other = one.open(path, os.O_RDWR), two.open(path, os.O_RDWR)
    assert one.flock(mine, b"w")
    two.start("flock_waiting", other)
    one.close_fd(mine)
    assert two.finish() is True


# -- reading directories --------------------------------------------------------------------------------------------


@contextmanager
def reading(path: str) -> Iterator[Directory]:
    """A directory read with opendir(3) and its like."""
    made = Directory(path)
    try:
        yield made
    finally:
        made.close()


def test_entries_that_stay_are_read_once_while_others_come_and_go(shared: Site) -> None:
    """5,000 entries are removed and 5,000 made while the directory is read, in steps between the reads."""
    folder = shared.mnt / "churn"
    folder.mkdir()
    rng = random.Random(5)
    staying = {f"stays-{index}" for index in range(1500)}
    leaving = [f"leaves-{index}" for index in range(5000)]
    everything = [*staying, *leaving]
    rng.shuffle(everything)
    for name in everything:
        os.mknod(folder / name)
    rng.shuffle(leaving)
    coming = [f"comes-{index}" for index in range(5000)]
    read = []
    with reading(str(folder)) as directory:
        while (entry := directory.next()) is not None:
            read.append(entry)
            for _ in range(min(3, len(leaving))):
                os.unlink(folder / leaving.pop())
            for _ in range(min(3, len(coming))):
                os.mknod(folder / coming.pop())
    assert not leaving
    assert not coming
    assert len(read) == len(set(read)), "a name was read twice"
    assert staying <= set(read)
    assert {".", ".."} <= set(read)
    assert set(os.listdir(folder)) == staying | {f"comes-{index}" for index in range(5000)}


def test_seekdir_goes_back_to_where_telldir_was(shared: Site) -> None:
    folder = shared.mnt / "seek"
    folder.mkdir()
    for index in range(1000):
        os.mknod(folder / f"entry-{index}")
    rng = random.Random(6)
    with reading(str(folder)) as directory:
        order, cookies = [], []
        while True:
            cookies.append(directory.tell())
            name = directory.next()
            if name is None:
                break
            order.append(name)
        assert len(set(order)) == 1002
        for at in rng.sample(range(1002), 60):
            directory.seek(cookies[at])
            assert directory.next() == order[at]
        # A cookie stays good when the entry that it stands for has gone.
        gone = rng.sample(range(5, 1000), 20)
        for at in gone:
            os.unlink(folder / order[at])
        for at in gone:
            directory.seek(cookies[at])
            left = next((name for name in order[at:] if (folder / name).exists()), None)
            assert directory.next() == left
        directory.rewind()
        assert {directory.next(), directory.next()} == {".", ".."}


def test_directory_types_in_readdir(twin: Twin) -> None:
    twin.mkdir("d")
    twin.file("f")
    twin.symlink(b"x", "l")
    twin.mkfifo("p")
    twin.bind_socket("s")
    assert twin.entry_types("") == [("d", 4), ("f", 8), ("l", 10), ("p", 1), ("s", 12)]


def test_many_processes_in_one_directory(shared: Site) -> None:
    """Threads create, rename and remove in one directory; what is left is what they left."""
    folder = shared.mnt / "many"
    folder.mkdir()
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for index in range(150):
                path = folder / f"{worker}-{index}"
                path.write_bytes(b"%d" % index)
                os.rename(path, folder / f"{worker}-{index}-renamed")
                if index % 3:
                    os.unlink(folder / f"{worker}-{index}-renamed")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(os.listdir(folder)) == sorted(f"{w}-{i}-renamed" for w in range(4) for i in range(0, 150, 3))


def test_one_of_many_creates_exclusively(shared: Site) -> None:
    """O_EXCL, mkdir, link and rename with NOREPLACE: of several at once exactly one succeeds."""
    for kind in ("open", "mkdir", "link"):
        (shared.mnt / f"source-{kind}").touch()
        target = str(shared.mnt / f"exclusive-{kind}")
        wins: list[int] = []
        barrier = threading.Barrier(4)

        def attempt(worker: int, kind: str, target: str, wins: list[int], barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                if kind == "open":
                    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                elif kind == "mkdir":
                    os.mkdir(target)
                else:
                    os.link(shared.mnt / "source-link", target)
                wins.append(worker)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=attempt, args=(worker, kind, target, wins, barrier)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1, kind


# -- limits ---------------------------------------------------------------------------------------------------------


def test_link_limit(unmounted: Site) -> None:
    """EMLINK at 65,000 names; all but the last few are made without the mount, which is faster."""
    unmounted.mount()
    first = unmounted.mnt / "first"
    first.touch()
    unmounted.umount()
    fs = open_filesystem(open_region(str(unmounted.region)))
    ino = fs.lookup(ROOT_INO, b"first")
    for number in range(LINK_MAX - 2):
        fs.link(ino, ROOT_INO, b"%d" % number)
    fs.close()
    unmounted.mount()
    assert first.stat().st_nlink == LINK_MAX - 1
    os.link(first, unmounted.mnt / "last")
    for call in (os.link, lambda one, two: os.link(unmounted.mnt / "17", two)):
        assert errno_of(call, first, unmounted.mnt / "one-too-many") == errno.EMLINK
    assert first.stat().st_nlink == LINK_MAX
    os.unlink(unmounted.mnt / "last")
    os.link(first, unmounted.mnt / "another")
    os.rename(first, unmounted.mnt / "renamed")


def test_deep_directories(twin: Twin) -> None:
    """Deeper than one path can name."""
    for root in twin.roots:
        fd = os.open(root, os.O_RDONLY)
        for _ in range(60):
            os.mkdir("d" * 100, dir_fd=fd)
            below = os.open("d" * 100, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        assert run("rm", "-rf", f"{root}/{'d' * 100}").returncode == 0
