"""What is in files: offsets, holes, limits, memory mappings, and open files that have lost their names."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from tests.mount.site import MiB, Site, errno_of, run
from tests.mount.twin import Twin, Users

PAGE = 4096
BLOCK = 2 * MiB
READ_WRITE = os.O_CREAT | os.O_RDWR


def test_append(twin: Twin) -> None:
    twin.file("f", b"start")
    one = twin.open("f", os.O_WRONLY | os.O_APPEND)
    two = twin.open("f", os.O_RDWR | os.O_APPEND)
    for number in range(20):
        twin.write((one, two)[number % 2], b"%d," % number)
    twin.lseek(one, 0, os.SEEK_SET)
    twin.write(one, b"end")
    twin.lseek(one, 0, os.SEEK_CUR)
    twin.pwrite(one, b"as pwrite on Linux appends", 2)
    twin.ftruncate(two, 3)
    twin.write(one, b"after the cut")
    twin.stat("f")
    assert twin.read_file("f") == b"staafter the cut"


def test_append_by_two_processes_at_once(shared: Site, users: Users) -> None:
    """Every record is there once, whole."""
    path = str(shared.mnt / "records")
    Path(path).touch(0o666)
    os.chmod(path, 0o666)
    agents = [users.get(1000), users.get(1001), users.get()]
    for index, agent in enumerate(agents):
        agent.start("append_records", path, index, 300)
    for agent in agents:
        agent.finish()
    lines = Path(path).read_text().splitlines()
    assert sorted(lines) == sorted(
        f"{index} {number} {'x' * (number % 97)}" for index in range(3) for number in range(300)
    )


def test_reads_and_writes_at_the_edges(twin: Twin) -> None:
    fd = twin.open("f", READ_WRITE, 0o644)
    assert twin.pread(fd, 10, 0) == b""
    assert twin.pread(fd, 10, 1 << 40) == b""
    twin.pwrite(fd, b"end", PAGE - 1)
    assert twin.pread(fd, PAGE, 0) == bytes(PAGE - 1) + b"e"
    assert twin.pread(fd, PAGE, PAGE) == b"nd"
    twin.pwrite(fd, b"", 1 << 30)
    twin.stat(fd)
    twin.fails("EINVAL", "pread", fd, 1, -1)
    twin.fails("EINVAL", "lseek", fd, -1, os.SEEK_SET)
    twin.fails("EBADF", "write", twin.open("f", os.O_RDONLY), b"x")
    twin.fails("EBADF", "pread", twin.open("f", os.O_WRONLY), 1, 0)
    twin.fails("EINVAL", "ftruncate", twin.open("f", os.O_RDONLY), 1)
    twin.fails("EINVAL", "truncate", "f", -1)
    twin.mkdir("d")
    twin.fails("EISDIR", "truncate", "d", 0)
    twin.fails("EISDIR", "read", twin.open("d", os.O_RDONLY), 1)


def test_random_writes_truncates_and_reads(twin: Twin) -> None:
    """A few hundred changes of one file, small and across pages and blocks, with holes: always equal to tmpfs."""
    rng = random.Random(20)
    fd = twin.open("f", READ_WRITE, 0o644)
    for step in range(300):
        at = rng.choice([rng.randrange(3 * BLOCK), rng.randrange(4) * BLOCK, rng.randrange(1000) * PAGE])
        length = rng.choice([1, 17, PAGE, 3 * PAGE + 5, 300_000])
        choice = rng.random()
        if choice < 0.6:
            twin.pwrite(fd, rng.randbytes(length), at)
        elif choice < 0.75:
            twin.ftruncate(fd, at)
        else:
            twin.pread(fd, length, at)
        if step % 50 == 0:
            twin.stat(fd)
    twin.read_file("f")


def test_holes_read_as_zeros_and_take_no_space(shared: Site) -> None:
    path = shared.mnt / "holes"
    before = shared.free()
    with path.open("wb") as file:
        for index in range(10):
            file.seek(index * 100 * PAGE)
            file.write(b"x")
    assert before - shared.free() <= 10 + 1
    assert 10 <= path.stat().st_blocks * 512 // PAGE <= 11  # one for the tree of extents
    data = path.read_bytes()
    assert data.count(b"x") == 10
    assert data.count(b"\0") == len(data) - 10
    path.unlink()
    shared.wait_for_free(before)


def test_seek_hole_and_data(twin: Twin) -> None:
    """No handler for lseek in pyfuse3: the kernel then tells the whole file to be data, which is allowed."""
    fd = twin.open("f", READ_WRITE, 0o644)
    twin.pwrite(fd, b"x" * PAGE, 0)
    assert twin.lseek(fd, 0, os.SEEK_DATA) == 0
    assert twin.lseek(fd, 0, os.SEEK_HOLE) == PAGE
    twin.fails("ENXIO", "lseek", fd, PAGE, os.SEEK_DATA)
    twin.fails("ENXIO", "lseek", fd, PAGE + 1, os.SEEK_HOLE)


def test_too_big(shared: Site) -> None:
    """EFBIG beyond 2**48, ENOSPC below; the file as it was."""
    path = str(shared.mnt / "big")
    fd = os.open(path, READ_WRITE)
    free = shared.free()
    for size, wanted in ((1 << 48, errno.ENOSPC), ((1 << 48) + 1, errno.EFBIG), ((1 << 63) - 1, errno.EFBIG)):
        for call in (lambda size=size: os.ftruncate(fd, size), lambda size=size: os.truncate(path, size)):
            assert errno_of(call) == wanted
    assert errno_of(os.pwrite, fd, b"x", 1 << 48) == errno.EFBIG
    assert os.pwrite(fd, b"x" * 10, (1 << 48) - 1) == 1
    assert os.fstat(fd).st_size == 1 << 48
    assert os.pread(fd, 10, (1 << 48) - 2) == b"\0x"
    os.ftruncate(fd, 0)
    shared.wait_for_free(free)
    os.close(fd)
    os.unlink(path)


def test_limit_of_the_process(shared: Site) -> None:
    path = shared.mnt / "rlimit"
    code = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)); fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); "
        "print(os.write(fd, bytes(20000))); os.write(fd, b'x')"
    )
    result = run(sys.executable, "-c", code, path)
    assert result.stdout == "10000\n"
    assert "[Errno 27]" in result.stderr
    assert path.stat().st_size == 10_000


def test_sparse_file_grown_by_a_write_at_its_end(twin: Twin) -> None:
    fd = twin.open("f", READ_WRITE, 0o644)
    twin.pwrite(fd, b"old" * 1000, 0)
    twin.ftruncate(fd, 10)
    twin.pwrite(fd, b"x", 20_000)
    assert twin.pread(fd, 20_001, 0) == b"oldoldoldo" + bytes(19_990) + b"x"
    twin.ftruncate(fd, 5)
    twin.ftruncate(fd, 3 * BLOCK)
    assert twin.pread(fd, 3 * BLOCK, 0) == b"oldol" + bytes(3 * BLOCK - 5)


def test_copy_file_range_and_sendfile(twin: Twin) -> None:
    data = os.urandom(300_000)
    twin.file("a", data)
    source, target = twin.open("a", os.O_RDONLY), twin.open("b", READ_WRITE, 0o644)
    assert twin.copy_file_range(source, target, 200_000, 100, 5) == 200_000
    twin.sendfile(target, source, 0, 1000)
    twin.read_file("b")


def test_posix_fallocate(twin: Twin) -> None:
    """The C library writes where the filesystem has no fallocate; the result is the same."""
    fd = twin.open("f", READ_WRITE, 0o644)
    twin.write(fd, b"abc")
    twin.posix_fallocate(fd, 0, 100_000)
    twin.stat(fd, times=False)
    assert twin.read_file("f") == b"abc" + bytes(99_997)


def test_fsync_and_friends(twin: Twin) -> None:
    twin.file("f", b"x")
    twin.mkdir("d")
    for path, flags in (("f", os.O_RDWR), ("f", os.O_RDONLY), ("d", os.O_RDONLY)):
        fd = twin.open(path, flags)
        twin.fsync(fd)
        twin.fdatasync(fd)
        assert twin.error == ""
    twin.open("f", os.O_RDWR | os.O_SYNC)
    twin.open("f", os.O_RDWR | os.O_DSYNC)


# -- open files without a name --------------------------------------------------------------------------------------


def test_unlinked_file_stays_usable(twin: Twin) -> None:
    twin.file("f", b"x" * 10_000)
    fd = twin.open("f", os.O_RDWR)
    twin.unlink("f")
    twin.stat(fd)
    twin.pwrite(fd, b"more" * 5000, 9_000)
    twin.fchmod(fd, 0o600)
    twin.fchown(fd, 1000, 1000)
    twin.stat(fd)
    assert twin.pread(fd, 5, 8_998) == b"xxmor"
    twin.ftruncate(fd, 100)
    twin.setxattr(fd, b"trusted.a", b"1")
    twin.file("f", b"another")
    twin.stat(fd)
    assert twin.read_file("f") == b"another"


def test_space_of_an_unlinked_file_comes_back_at_close(shared: Site) -> None:
    path = shared.mnt / "unlinked"
    before = shared.free()
    with path.open("w+b") as file:
        file.write(bytes(10 * MiB))
        file.flush()
        path.unlink()
        assert before - shared.free() >= 10 * MiB // PAGE
        assert os.pread(file.fileno(), 1, 5 * MiB) == b"\0"
    shared.wait_for_free(before)


def test_mapping_outlives_name_and_descriptor(shared: Site) -> None:
    path = shared.mnt / "mapped"
    before = shared.free()
    path.write_bytes(b"x" * 100_000)
    with path.open("r+b") as file:
        area = mmap.mmap(file.fileno(), 0)
    path.unlink()
    assert area[99_999] == ord("x")
    area[50_000:50_003] = b"new"
    assert area[49_999:50_004] == b"xnewx"
    area.close()
    shared.wait_for_free(before)


# -- memory mappings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [PAGE, 5 * PAGE + 1, 3 * BLOCK], ids=["page", "pages", "blocks"])
def test_mapping_is_coherent_with_read_and_write(twin: Twin, size: int) -> None:
    """Both ways at once, between processes: what one stores the other reads."""
    twin.file("f", bytes(size), 0o666)
    user = twin.by(1000)
    handle = user.map_file("f", size)
    fd = twin.open("f", os.O_RDWR)
    rng = random.Random(size)
    for number in range(100):
        at = rng.randrange(size - 8) // 8 * 8
        word = number.to_bytes(8, "little")
        user.map_store(handle, at, word)
        assert twin.pread(fd, 8, at) == word
        twin.pwrite(fd, word[::-1], at)
        assert user.map_load(handle, at, 8) == word[::-1]
    user.map_sync(handle)
    twin.read_file("f")


def test_two_processes_map_the_same_memory(twin: Twin) -> None:
    twin.file("f", bytes(BLOCK), 0o666)
    one, two = twin.by(1000), twin.by(1001)
    mine, other = one.map_file("f", BLOCK), two.map_file("f", BLOCK)
    for number in range(50):
        one.map_store(mine, number * 37_000, b"%8d" % number)
        assert two.map_load(other, number * 37_000, 8) == b"%8d" % number


def test_mapped_stores_are_there_after_the_mapping(site: Site) -> None:
    """After munmap and close, read; after umount and mount, read again."""
    path = site.mnt / "f"
    path.touch()
    os.truncate(path, 4 * MiB)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as area:
        for at in range(0, 4 * MiB, 12_288):
            area[at : at + 4] = at.to_bytes(4, "little")
    for _ in range(2):
        data = path.read_bytes()
        assert all(data[at : at + 4] == at.to_bytes(4, "little") for at in range(0, 4 * MiB, 12_288))
        assert data.count(0) >= 4 * MiB - 4 * MiB // 12_288 * 4
        site.umount()
        site.mount()


def test_private_mapping_changes_nothing(shared: Site) -> None:
    path = shared.mnt / "private"
    path.write_bytes(b"x" * PAGE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as area:
        area[:3] = b"new"
        assert path.read_bytes() == b"x" * PAGE


def test_load_beyond_a_cut_is_sigbus(shared: Site) -> None:
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); os.ftruncate(fd, 8192); "
        "area = mmap.mmap(fd, 8192); area[5000] = 1; os.ftruncate(fd, 4096); print(area[100], flush=True); area[5000]"
    )
    result = run(sys.executable, "-c", code, shared.mnt / "cut")
    assert result.stdout == "0\n"
    assert result.returncode == -signal.SIGBUS


def test_tail_of_a_mapped_page_does_not_become_content(shared: Site) -> None:
    """What a mapping stores beyond the end of a file in its last page, as ext4 has it."""
    path = shared.mnt / "tail"
    path.write_bytes(b"x" * PAGE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as area:
        file.truncate(100)
        area[200:206] = b"beyond"
        area.flush()
        file.truncate(1000)
        assert path.read_bytes() == b"x" * 100 + bytes(900)


# -- running programs -----------------------------------------------------------------------------------------------


def test_exec(twin: Twin) -> None:
    twin.file("program", Path("/bin/echo").read_bytes(), 0o755)
    twin.file("script", b"#!/bin/sh\necho script $0 | sed 's,/.*/,,'\n", 0o755)
    assert twin.by(1000).output_of("program", b"hello") == "hello\n"
    assert twin.output_of("script") == "script script\n"
    twin.chmod("program", 0o644)
    twin.fails("EACCES", "output_of", "program")
