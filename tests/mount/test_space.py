"""Space: what statvfs tells, what a full region does, that memory is promised and given back, that no old data show."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pkernfs import client
from tests.mount.site import MiB, Site, below, errno_of, site, small_host, wait_until

PAGE = 4096
BLOCK = 2 * MiB


def fill(folder: Path, size: int, *, seed: int = 1) -> int:
    """Write files of ``size`` bytes until nothing fits; how many there are."""
    count = 0
    data = random.Random(seed).randbytes(size)
    try:
        while True:
            with open(folder / f"fill{count:05}", "wb", buffering=0) as file:
                count += 1
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    return count


def no_space(function: Callable[..., object], *args: object) -> None:
    """The call fails with ENOSPC."""
    assert errno_of(function, *args) == errno.ENOSPC


def test_statvfs_of_a_new_region(site: Site) -> None:
    figures = os.statvfs(site.mnt)
    assert figures.f_bsize == figures.f_frsize == PAGE
    assert figures.f_namemax == 255
    assert figures.f_bfree == figures.f_bavail
    assert 58 * MiB // PAGE < figures.f_bfree <= figures.f_blocks <= 64 * MiB // PAGE
    assert figures.f_files >= figures.f_ffree > figures.f_bfree
    assert figures.f_files - figures.f_ffree < 10


@pytest.mark.parametrize(
    ("size", "pages"),
    [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2), (50 * PAGE, 50), (BLOCK, 512), (3 * BLOCK, 3 * 512)],
    ids=str,
)
def test_statvfs_is_true_to_the_page(shared: Site, size: int, pages: int) -> None:
    """Directory and inode are there before: what is missing afterwards is the content, and comes back whole."""
    path = shared.mnt / f"f{size}"
    path.touch()
    before = os.statvfs(shared.mnt)
    path.write_bytes(b"x" * size)
    after = os.statvfs(shared.mnt)
    assert before.f_bfree - after.f_bfree == pages
    assert path.stat().st_blocks * 512 == pages * PAGE
    os.truncate(path, 0)
    assert os.statvfs(shared.mnt).f_bfree == before.f_bfree
    assert path.stat().st_blocks == 0


def test_everything_comes_back(site: Site) -> None:
    """Of every kind of file, and of directories with many names; counted in pages and inodes."""
    before = os.statvfs(site.mnt)
    top = site.mnt / "top"
    top.mkdir()
    for index in range(1500):
        (top / f"some-name-{index}").write_bytes(b"x" * (index % 7 * 1000))
    for index in range(300):
        (top / f"link{index}").symlink_to("t" * (index % 300 + 1))
        os.setxattr(top / f"some-name-{index}", "user.big", bytes(index * 20))
    os.mkfifo(top / "fifo")
    (top / "large").write_bytes(b"y" * (5 * BLOCK + 1))
    for path in reversed(below(top)):
        path.unlink()
    top.rmdir()
    site.wait_for_free(before.f_bfree)
    after = os.statvfs(site.mnt)
    assert (after.f_blocks, after.f_bfree, after.f_files, after.f_ffree) == (
        before.f_blocks,
        before.f_bfree,
        before.f_files,
        before.f_ffree,
    )


@pytest.mark.parametrize("size", [1000, 30_000, 700_000, 5 * MiB])
def test_full_and_empty_again(site: Site, size: int) -> None:
    """A full region says ENOSPC, keeps what it has, and is whole again when the files are gone."""
    before = site.free()
    data = random.Random(1).randbytes(size)
    top = site.mnt / "top"
    top.mkdir()
    if size < 10_000:
        # Most of it at once: only the rest is filled with small files.
        last = fill(site.mnt, 5 * MiB) - 2
        os.unlink(site.mnt / f"fill{last:05}")
        assert wait_until(lambda: site.free() > 512, 20.0)
    count = fill(top, size)
    assert count > 3
    for index in range(count):
        path = top / f"fill{index:05}"
        if path.exists():  # the last may have been refused altogether
            content = path.read_bytes()
            assert content == data or (index == count - 1 and data.startswith(content))
    for path in [path for path in below(site.mnt) if path.name.startswith("fill")]:
        path.unlink()
    top.rmdir()
    site.wait_for_free(before)


def test_no_space_leaves_nothing_behind(site: Site) -> None:
    """Each kind of call on a full region: it fails as a whole, and what was there is untouched."""
    folder = site.mnt / "d"
    folder.mkdir()
    victim = folder / "victim"
    victim.write_bytes(b"content")
    fill(site.mnt, 4 * MiB)
    fill(folder, PAGE)
    # No page is left; names and inodes may still fit in pages that are there: use them up.
    created = 0
    while not (found := errno_of(os.mknod, folder / f"{created:0200}")):
        created += 1
    assert found == errno.ENOSPC
    assert site.free() == 0
    descriptor = os.open(victim, os.O_RDWR)
    calls: dict[str, Callable[[str], object]] = {
        "mkdir": lambda name: os.mkdir(folder / name),
        "mknod": lambda name: os.mknod(folder / name),
        "symlink": lambda name: os.symlink("t" * 3000, folder / name),
        "link": lambda name: os.link(victim, folder / name),
        "rename": lambda name: os.rename(folder / f"{0:0200}", folder / name),
        "truncate": lambda name: os.truncate(victim, 100_000),
        "truncate-far": lambda name: os.truncate(victim, 1 << 40),
        "setxattr": lambda name: os.setxattr(victim, "user.big", bytes(60_000)),
        "write": lambda name: os.pwrite(descriptor, bytes(PAGE), 10 * PAGE),
    }

    def state() -> tuple[object, ...]:
        figures = os.statvfs(site.mnt)
        status = os.stat(victim)
        names = sorted(os.listdir(folder))
        return figures.f_bfree, figures.f_ffree, status.st_size, status.st_nlink, os.listxattr(victim), names

    for case, call in calls.items():
        # A long name may still find room in its part of the directory: one of many does not.
        for number in range(200):
            before = state()
            if found := errno_of(call, f"{case}{number}".ljust(250, "n")):
                assert found == errno.ENOSPC, case
                assert state() == before, case
                break
            if case == "rename":
                os.rename(folder / f"{case}{number}".ljust(250, "n"), folder / f"{0:0200}")
        else:
            assert case == "rename", f"{case}: 200 times without an error on a full region"
    os.close(descriptor)
    names = os.listdir(folder)
    site.verify()
    # Overwriting in place, and removing, always work.
    with victim.open("r+b") as file:
        file.write(b"CONTENT")
    assert victim.read_bytes() == b"CONTENT"
    for name in names:
        os.unlink(folder / name)
    folder.rmdir()
    (site.mnt / "again").mkdir()


def test_growing_allocates_at_once(site: Site) -> None:
    path = site.mnt / "ram"
    (site.mnt / "another").touch()  # the page of inodes is there
    path.touch()
    before = site.free()
    os.truncate(path, 16 * MiB)
    assert site.free() == before - 16 * MiB // PAGE
    assert path.stat().st_blocks * 512 == 16 * MiB
    assert site.allocated() >= 16 * MiB  # on the host too: a guest must never get SIGBUS
    os.truncate(path, 4 * MiB)
    assert site.free() == before - 4 * MiB // PAGE
    os.truncate(path, 20 * MiB)
    assert site.free() == before - 20 * MiB // PAGE
    status = path.stat()
    no_space(os.truncate, path, 70 * MiB)
    no_space(os.truncate, path, (before * PAGE) + 1)
    assert site.free() == before - 20 * MiB // PAGE
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    path.unlink()
    site.wait_for_free(before)


def test_file_as_large_as_the_region(site: Site) -> None:
    """Every free block of a new region can be one file's; all of it can be written and read."""
    path = site.mnt / "all"
    path.touch()
    largest = site.free() // 512 * BLOCK
    os.truncate(path, largest)
    assert site.free() < 512
    rng = random.Random(3)
    parts = {at: rng.randbytes(1000) for at in range(0, largest - 1000, 3 * MiB + 7)}
    with path.open("r+b", buffering=0) as file:
        for at, part in parts.items():
            file.seek(at)
            file.write(part)
        file.seek(largest - 1)
        file.write(b"!")
    site.umount()
    site.mount()
    with path.open("rb") as file:
        for at, part in parts.items():
            file.seek(at)
            assert file.read(1000) == part
        file.seek(largest - 1)
        assert file.read() == b"!"


def test_others_are_served_while_memory_is_made_ready() -> None:
    """A guest's memory for which the host takes longer than a worker may be silent: in steps, and in one piece."""
    with site(size="512M") as made:
        made.mount_faulty("slow-memory")
        ram, other = made.mnt / "ram", made.mnt / "other"
        ram.touch()
        making = threading.Thread(target=os.truncate, args=(ram, 320 * MiB))
        making.start()
        served = 0
        while making.is_alive():
            other.touch()
            other.unlink()
            served += 1
        making.join()
        assert served >= 5
        facts = client.file(str(ram))
        assert (facts.size, facts.contiguous) == (320 * MiB, True)
        assert made.status()["takeovers"] == 0


def test_new_files_never_show_old_data(site: Site) -> None:
    """Fill with a pattern, delete, and look at what new memory reads: grown, mapped by holes, behind short writes."""
    secret = b"SECRET!!" * 512
    for size in (PAGE, 5 * MiB):
        names = [site.mnt / "s0"]
        while not (found := errno_of(names[-1].write_bytes, secret * (size // len(secret)))) and len(names) < 3000:
            names.append(site.mnt / f"s{len(names)}")
        assert found in (0, errno.ENOSPC)
        for path in names:
            path.unlink()
    new = site.mnt / "new"
    new.touch()
    os.truncate(new, 40 * MiB)
    assert new.read_bytes() == bytes(40 * MiB)
    new.unlink()
    for index in range(200):
        path = site.mnt / f"n{index}"
        with path.open("wb") as file:
            file.write(b"x")
            file.seek(3 * PAGE + 100)
            file.write(b"y")
        os.truncate(path, 10 * PAGE)
        assert path.read_bytes() == b"x" + bytes(3 * PAGE + 99) + b"y" + bytes(10 * PAGE - 3 * PAGE - 101)
        os.truncate(path, 1)
        os.truncate(path, PAGE)
        assert path.read_bytes() == b"x" + bytes(PAGE - 1)


def test_removing_gives_the_memory_back_to_the_host(site: Site) -> None:
    empty = site.allocated()
    paths = [site.mnt / f"f{index}" for index in range(10)]
    for path in paths:
        path.write_bytes(os.urandom(4 * MiB))
    full = site.allocated()
    assert full - empty >= 40 * MiB
    for path in paths[:5]:
        path.unlink()
    site.wait_until_allocated(full - 20 * MiB + PAGE)
    os.truncate(paths[5], 2 * MiB)
    site.wait_until_allocated(full - 22 * MiB + PAGE)
    for path in paths[5:]:
        path.unlink()
    site.wait_until_allocated(empty + BLOCK)


def test_region_file_is_sparse(unmounted: Site) -> None:
    """A new region takes next to nothing, mounted or not."""
    assert unmounted.allocated() <= 8 * MiB
    unmounted.mount()
    assert unmounted.allocated() <= 8 * MiB


def test_space_of_a_removed_file_can_be_used_at_once(site: Site) -> None:
    """On a full region: remove a file, write another as large, again and again, as a log rotation does."""
    count = fill(site.mnt, 4 * MiB)
    assert count > 10
    for number in range(60):
        size = (MiB, 4 * MiB)[number % 2]
        path = site.mnt / f"fill{number % (count - 1):05}"
        path.unlink()
        path.write_bytes(bytes(size))
        path.unlink()
        path.write_bytes(bytes(4 * MiB))


def test_overwriting_does_not_need_space(site: Site) -> None:
    path = site.mnt / "f"
    path.write_bytes(bytes(MiB))
    fill(site.mnt, 4 * MiB)
    fill(site.mnt, PAGE, seed=2) if site.free() else 0
    for at in (0, 5, 100_000, MiB - 1):
        with path.open("r+b", buffering=0) as file:
            file.seek(at)
            assert file.write(b"z") == 1
    os.truncate(path, 0)


def test_tmpfs_without_room_is_no_space(unmounted: Site) -> None:
    """A region larger than what its host has left: ENOSPC, not SIGBUS in the server."""
    with small_host(unmounted, "20M"):
        unmounted.mount()
        path = unmounted.mnt / "f"
        path.touch()
        no_space(os.truncate, path, 40 * MiB)
        assert path.stat().st_size == 0
        os.truncate(path, 8 * MiB)
        count = fill(unmounted.mnt, 3 * MiB)
        assert count >= 2
        assert path.read_bytes() == bytes(8 * MiB)
        unmounted.umount()
        unmounted.verify()
