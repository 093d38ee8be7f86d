"""The same memory two ways: through the mount, and by a process that maps the region itself (and by QEMU)."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from pkernfs import client
from pkernfs.qemu.cmdline import Version, find_qemu
from pkernfs.qemu.errors import QemuError
from tests.mount.agent import Agent
from tests.mount.site import MiB, Site, wait_for

SIZE = 8 * MiB


def differs(agent: Agent, handle: int, before: bytes) -> bool:
    """Whether the first word of what a process maps is another one by now."""
    return bool(agent.map_load(handle, 0, len(before)) != before)


def counts_on(fd: int, first: int) -> bool:
    """Whether the count at the beginning of a file has gone on."""
    return int.from_bytes(os.pread(fd, 8, 0), "little") > first


@pytest.fixture
def ram(site: Site) -> Path:
    """A file as guest memory."""
    path = site.mnt / "ram"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def other() -> Iterator[Agent]:
    """Another process."""
    with Agent() as agent:
        yield agent


def backend(site: Site, path: Path) -> tuple[str, int]:
    """mem-path and offset, from the option that `pkernfs qemu-args --direct` prints."""
    words = shlex.split(site.run_ok("pkernfs", "qemu-args", "--direct", path))
    parts = dict(part.split("=", 1) for part in words[1].split(",")[1:])
    return parts["mem-path"], int(parts["offset"], 0)


def map_direct(site: Site, path: Path, agent: Agent) -> int:
    """Let the process map the file's memory past the mount; its handle."""
    region, offset = backend(site, path)
    return int(agent.map_file(region, SIZE, offset))


def test_freshly_opened_file_shows_what_was_stored(site: Site, ram: Path, other: Agent) -> None:
    handle = map_direct(site, ram, other)
    for number in range(50):
        other.map_store(handle, number * 150_000, b"%8d" % number)
        with ram.open("rb", buffering=0) as file:
            file.seek(number * 150_000)
            assert file.read(8) == b"%8d" % number


def test_long_open_file_shows_what_was_stored(site: Site, ram: Path, other: Agent) -> None:
    """Its pages are cached from before the file was marked."""
    fd = os.open(ram, os.O_RDWR)
    assert os.pread(fd, SIZE, 0) == bytes(SIZE)
    handle = map_direct(site, ram, other)
    other.map_store(handle, 5_000_000, b"stored")
    assert os.pread(fd, 6, 5_000_000) == b"stored"
    os.close(fd)


def test_alternating(site: Site, ram: Path, other: Agent) -> None:
    """A hundred times in turn at the same place, by one descriptor that stays open."""
    handle = map_direct(site, ram, other)
    fd = os.open(ram, os.O_RDWR)
    rng = random.Random(1)
    for number in range(100):
        at = rng.choice([0, 4096 * 3 + 8, SIZE - 8])
        other.map_store(handle, at, b"in%06d" % number)
        assert os.pread(fd, 8, at) == b"in%06d" % number
        os.pwrite(fd, b"out%05d" % number, at)
        assert other.map_load(handle, at, 8) == b"out%05d" % number
    os.close(fd)


def test_large_reads_and_writes(site: Site, ram: Path, other: Agent) -> None:
    handle = map_direct(site, ram, other)
    data = os.urandom(SIZE)
    ram_fd = os.open(ram, os.O_RDWR)
    os.pwrite(ram_fd, data, 0)
    assert other.map_load(handle, 0, SIZE) == data
    other.map_store(handle, 0, data[::-1])
    assert os.pread(ram_fd, SIZE, 0) == data[::-1]
    assert ram.read_bytes() == data[::-1]
    os.close(ram_fd)


def test_without_marking_a_fresh_open_shows_what_was_stored(site: Site, ram: Path, other: Agent) -> None:
    """By the extents alone, as a program does that does not ask us."""
    (extent,) = json.loads(os.getxattr(ram, "user.pkernfs.extents"))
    handle = other.map_file(str(site.region), SIZE, extent["region_offset"])
    for number in range(30):
        other.map_store(handle, 4_000_000, b"%8d" % number)
        with ram.open("rb", buffering=0) as file:
            file.seek(4_000_000)
            assert file.read(8) == b"%8d" % number
        with ram.open("r+b", buffering=0) as file:
            file.seek(6_000_000)
            file.write(b"%8d" % -number)
        assert other.map_load(handle, 6_000_000, 8) == b"%8d" % -number


def test_mapping_through_the_mount_after_marking(site: Site, ram: Path, other: Agent) -> None:
    """A mapping made anew sees what was stored; its own stores reach the region with msync."""
    handle = map_direct(site, ram, other)
    other.map_store(handle, 1_000_000, b"one")
    mapped = other.map_file(str(ram), SIZE)
    assert other.map_load(mapped, 1_000_000, 3) == b"one"
    other.map_store(mapped, 2_000_000, b"two")
    other.map_sync(mapped)
    assert other.map_load(handle, 2_000_000, 3) == b"two"


@pytest.mark.usefixtures("other")
def test_memory_stays_in_place(site: Site, ram: Path) -> None:
    """While the file is marked: neither a mount, nor other files that come and go, nor writes move it."""
    _, offset = backend(site, ram)
    for index in range(20):
        (site.mnt / f"f{index}").write_bytes(bytes(MiB + index))
    for index in range(0, 20, 2):
        (site.mnt / f"f{index}").unlink()
    with ram.open("r+b") as file:
        file.write(os.urandom(SIZE))
    assert backend(site, ram)[1] == offset
    site.restart()
    assert backend(site, ram)[1] == offset
    assert json.loads(os.getxattr(ram, "user.pkernfs.direct")) is True


def test_stores_go_on_while_there_is_no_server(site: Site, ram: Path, other: Agent) -> None:
    """The process never notices that the server is killed and another comes; nothing that it stores is lost."""
    handle = map_direct(site, ram, other)
    log = str(site.tmp / "counted")
    counter = Agent()
    try:
        region, offset = backend(site, ram)
        counter.start("count_up", region, SIZE, offset, log)
        wait_for(lambda: os.path.exists(log) and os.path.getsize(log) > 0, "the counter")
        for _ in range(3):
            site.crash()
            before = other.map_load(handle, 0, 8)
            wait_for(partial(differs, other, handle, before), "stores without a server")
            site.mount()
            with ram.open("rb", buffering=0) as file:
                first = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
                wait_for(partial(counts_on, file.fileno(), first), "the count to rise through the mount")
        counter.process.send_signal(signal.SIGUSR1)
        last = counter.finish()
        assert int.from_bytes(ram.read_bytes()[:8], "little") == last
    finally:
        counter.close()


def test_unmarking(site: Site, ram: Path) -> None:
    backend(site, ram)
    assert json.loads(os.getxattr(ram, "user.pkernfs.direct")) is True
    client.set_direct(str(ram), on=False)
    assert json.loads(os.getxattr(ram, "user.pkernfs.direct")) is False
    ram.write_bytes(b"small")
    assert ram.read_bytes() == b"small"


# -- QEMU -----------------------------------------------------------------------------------------------------------


class Qtest:
    """QEMU's test protocol: reads and writes of guest memory."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("rb")

    def command(self, words: str) -> list[str]:
        """One command; the words of its answer after OK."""
        self.socket.sendall(words.encode() + b"\n")
        answer = self.lines.readline().decode().split()
        while answer and answer[0] == "IRQ":
            answer = self.lines.readline().decode().split()
        assert answer[:1] == ["OK"], answer
        return answer[1:]

    def store(self, address: int, data: bytes) -> None:
        """Into guest memory."""
        self.command(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def load(self, address: int, length: int) -> bytes:
        """From guest memory."""
        return bytes.fromhex(self.command(f"read {address:#x} {length:#x}")[0][2:])

    def close(self) -> None:
        """Hang up."""
        self.lines.close()
        self.socket.close()


@contextmanager
def qemu(site: Site, words: list[str]) -> Iterator[Qtest]:
    """A machine without an operating system whose RAM is the given object."""
    try:
        found = find_qemu(needed=Version(8, 1))
    except QemuError as error:
        pytest.skip(str(error))
    halt = site.tmp / "halt.bin"
    halt.write_bytes(b"\xfa\xf4\xeb\xfc".rjust(65536, b"\x90")[: 65536 - 16] + b"\xfa\xf4\xeb\xfc" + bytes(12))
    address = site.tmp / "qtest"
    command = [
        str(found.path), "-machine", "q35,accel=tcg,memory-backend=ram", "-cpu", "qemu64", "-smp", "1", "-m", "8M",
        "-bios", str(halt), "-icount", "shift=0,sleep=off", "-nodefaults", "-display", "none", "-no-reboot", *words,
        "-qtest", f"unix:{address},server=on,wait=off", "-qtest-log", "/dev/null",
    ]  # fmt: skip
    with (site.tmp / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(lambda: address.exists() or process.poll() is not None, "QEMU's socket")
        assert process.poll() is None, (site.tmp / "qemu.log").read_text()
        with closing(Qtest(address)) as made:
            yield made
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


@pytest.mark.parametrize("mapping", ["--direct", "--path"])
def test_qemu_and_the_mount_see_the_same_memory(site: Site, ram: Path, mapping: str) -> None:
    words = shlex.split(site.run_ok("pkernfs", "qemu-args", mapping, "--id", "ram", ram))
    fd = os.open(ram, os.O_RDWR)
    rng = random.Random(9)
    try:
        with qemu(site, words) as guest:
            for _ in range(50):
                at = rng.choice([0x1000, 0x10000, 0x200000, 0x700000]) + rng.randrange(1000)
                data = rng.randbytes(16)
                guest.store(at, data)
                assert os.pread(fd, 16, at) == data
                os.pwrite(fd, data[::-1], at)
                assert guest.load(at, 16) == data[::-1]
            if mapping == "--direct":
                site.crash()
                guest.store(0x300000, b"while no server is there")
                site.mount()
                assert ram.read_bytes()[0x300000:][:24] == b"while no server is there"
                guest.store(0x300000, b"while another server is ")
                with ram.open("rb", buffering=0) as file:
                    assert os.pread(file.fileno(), 24, 0x300000) == b"while another server is "
    finally:
        with suppress(OSError):
            os.close(fd)
