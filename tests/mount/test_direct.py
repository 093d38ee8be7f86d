"""The same memory two ways: through the mount, and by a process that maps the region itself (and by QEMU)."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from pkernfs import client
from pkernfs.qemu.cmdline import Version, find_qemu
from pkernfs.qemu.errors import QemuError
from tests.mount.agent import Agent
from tests.mount.site import MiB, Site, errno_of, run, wait_for

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


def backend(site: Site, path: Path, *more: str) -> tuple[str, int]:
    """mem-path and offset, from the option that `pkernfs qemu-args --direct` prints of a file that is marked."""
    site.run_ok("pkernfs", "direct", path, "on")
    words = shlex.split(site.run_ok("pkernfs", "qemu-args", "--direct", *more, path))
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


@pytest.mark.parametrize("opened", ["anew", "before"])
def test_a_marked_file_is_not_mapped_through_the_mount(site: Site, ram: Path, other: Agent, opened: str) -> None:
    """Its pages would be others than those of who maps it directly: so it showed what had been there, and kept it."""
    fd = os.open(ram, os.O_RDWR) if opened == "before" else -1
    handle = map_direct(site, ram, other)
    if opened == "anew":
        fd = os.open(ram, os.O_RDWR)
        for prot in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
            assert errno_of(mmap.mmap, fd, SIZE, mmap.MAP_SHARED, prot) == errno.ENODEV
    with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) as private:
        other.map_store(handle, 1_000_000, b"one")
        assert private[1_000_000:1_000_003] == b"one"
    other.map_store(handle, 1_000_000, b"two")
    assert os.pread(fd, 3, 1_000_000) == b"two"
    os.close(fd)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("cat {0} > {1}", id="cat"),
        pytest.param("cp {0} {1}", id="cp"),
        pytest.param("cp --sparse=always {0} {1}", id="cp-sparse"),
        pytest.param("dd if={0} of={1} bs=1M status=none", id="dd"),
        pytest.param("dd if={0} of={1} bs=1M iflag=direct status=none", id="dd-direct"),
        pytest.param("tail -c +1 {0} > {1}", id="tail"),
        pytest.param('python3 -c \'import shutil; shutil.copyfile("{0}", "{1}")\'', id="sendfile"),
        pytest.param("mv {0} {0}.moved && cat {0}.moved > {1}", id="mv"),
        pytest.param("ln {0} {0}.linked && cat {0}.linked > {1}", id="ln"),
    ],
)
def test_programs_read_a_marked_file(site: Site, ram: Path, other: Agent, command: str) -> None:
    """What they read is what the guest has stored, at each time."""
    handle = map_direct(site, ram, other)
    for path in (ram, *ram.parent.glob("ram.*")):
        path.read_bytes()  # nothing of it may stay in the cache
    data = os.urandom(SIZE)
    other.map_store(handle, 0, data)
    copy = site.tmp / "copy"
    subprocess.run(command.format(ram, copy), shell=True, check=True)
    assert copy.read_bytes() == data


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
        region, offset = backend(site, ram, "--force")
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
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapped:
        assert mapped[:8] == bytes(8)
    assert json.loads(os.getxattr(ram, "user.pkernfs.direct")) is False
    ram.write_bytes(b"small")
    assert ram.read_bytes() == b"small"


# -- the mark, and who maps the file ----------------------------------------------------------------------------------


def shown(site: Site, path: Path) -> tuple[bool, list[tuple[int, str]]]:
    """Whether a file is marked, and the process ids and ways of those who map it."""
    facts = json.loads(site.run_ok("pkernfs", "direct", "--json", path, "show"))
    return facts["direct"], [(one["pid"], one["map"]) for one in facts["mapped_by"]]


def test_the_mark(site: Site, ram: Path, other: Agent) -> None:
    """Printing a command does not change it; it outlives a mount, and goes when nobody needs it any more."""
    for words in ([], ["--path"], ["--json"], ["--direct"]):
        run("pkernfs", "qemu-args", ram, *words)
        assert shown(site, ram) == (False, [])
    handle = map_direct(site, ram, other)
    assert shown(site, ram) == (True, [(other.process.pid, "direct")])
    said = site.run_ok("pkernfs", "direct", ram)
    assert f"mapped directly by process {other.process.pid}" in said
    assert f"mapped directly by process {other.process.pid}" in site.run_ok("pkernfs", "info", ram)
    refused = run("pkernfs", "direct", ram, "off")
    assert (refused.returncode, f"mapped directly by process {other.process.pid}" in refused.line) == (1, True)
    site.restart()
    other.map_store(handle, 0, b"still there")
    assert ram.read_bytes()[:11] == b"still there"
    other.close()
    assert shown(site, ram) == (True, [])
    assert "nobody maps it" in site.run_ok("pkernfs", "direct", ram)
    site.run_ok("pkernfs", "direct", ram, "off")
    assert shown(site, ram) == (False, [])
    assert ram.read_bytes()[:11] == b"still there"


def test_a_file_that_is_mapped_through_the_mount_is_not_marked(site: Site, ram: Path, other: Agent) -> None:
    """Also while it is only read; what was written through a mapping that has gone is there for the guest."""
    handle = other.map_file(str(ram), SIZE)
    other.map_store(handle, 4096, b"by a mapping")
    assert shown(site, ram) == (False, [(other.process.pid, "path")])
    for words in ("direct", "on"), ("qemu-args", "--path"):
        refused = run("pkernfs", words[0], ram, words[1])
        assert refused.returncode == 1
        assert f"mapped through the mount by process {other.process.pid}" in refused.line
    with pytest.raises(client.ControlError) as caught:
        client.set_direct(str(ram))
    assert caught.value.errno == errno.EBUSY
    assert shown(site, ram)[0] is False
    other.close()
    with Agent() as guest:
        direct = map_direct(site, ram, guest)
        assert guest.map_load(direct, 4096, 12) == b"by a mapping"


@pytest.mark.parametrize("way", ["rm", "truncate", "rename"])
def test_memory_that_is_mapped_is_not_destroyed(site: Site, ram: Path, other: Agent, way: str) -> None:
    """EBUSY; who maps it is in the log, by name."""
    handle = map_direct(site, ram, other)
    (site.mnt / "new").write_bytes(b"new")
    calls: dict[str, Callable[[], None]] = {
        "rm": lambda: os.unlink(ram),
        "truncate": lambda: os.truncate(ram, 4096),
        "rename": lambda: os.rename(site.mnt / "new", ram),
    }
    assert errno_of(calls[way]) == errno.EBUSY
    assert f"mapped directly by process {other.process.pid}" in site.server_log.read_text()
    other.map_store(handle, 0, b"here")
    os.rename(ram, site.mnt / "renamed")  # destroys nothing
    assert (site.mnt / "renamed").read_bytes()[:4] == b"here"


# -- qemu-args --------------------------------------------------------------------------------------------------------


def test_without_a_mark_the_path_map_and_a_warning(ram: Path) -> None:
    result = run("pkernfs", "qemu-args", ram)
    assert (result.returncode, f"mem-path={ram}" in result.stdout) == (0, True)
    assert f"pkernfs direct {ram} on" in result.line
    assert run("pkernfs", "qemu-args", "--path", ram).stderr == ""
    refused = run("pkernfs", "qemu-args", "--direct", ram)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"pkernfs direct {ram} on" in refused.line


def test_a_file_in_pieces(site: Site) -> None:
    pieces = site.mnt / "pieces"
    with pieces.open("wb") as file:
        os.pwrite(file.fileno(), bytes(4096), 20 * MiB)
        os.pwrite(file.fileno(), bytes(4096), 0)
    result = run("pkernfs", "qemu-args", pieces)
    assert (result.returncode, f"mem-path={pieces}" in result.stdout) == (0, True)
    assert "2 extents" in result.line
    site.run_ok("pkernfs", "direct", pieces, "on")
    assert "2 extents" in run("pkernfs", "qemu-args", pieces).line


def test_a_domain_needs_the_direct_map(site: Site, ram: Path) -> None:
    site.run_ok("pkernfs", "iommu", "create", site.mnt / "iommu/dom-0")
    site.run_ok("pkernfs", "iommu", "map", site.mnt / "iommu/dom-0", "0", ram)
    for words in ([], ["--path"]):
        refused = run("pkernfs", "qemu-args", ram, *words)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "dom-0" in refused.line
    assert backend(site, ram)[0] == str(site.region)


def test_with_writeback(unmounted: Site) -> None:
    """It failed, where it was to fall back to the path map."""
    site = unmounted
    site.options = "writeback"
    site.mount()
    ram = site.mnt / "ram"
    ram.touch()
    os.truncate(ram, SIZE)
    result = run("pkernfs", "qemu-args", ram)
    assert (result.returncode, f"mem-path={ram}" in result.stdout) == (0, True)
    assert "through the mount" in result.line
    refused = run("pkernfs", "direct", ram, "on")
    assert (refused.returncode, "writeback" in refused.line) == (1, True)


def test_neighbours(site: Site, ram: Path) -> None:
    """Whoever can open a region reaches all of it."""
    site.run_ok("pkernfs", "direct", ram, "on")
    (site.mnt / "state").write_bytes(b"of the same owner")
    assert run("pkernfs", "qemu-args", ram).stderr == ""
    (site.mnt / "d").mkdir()
    (site.mnt / "d/foreign").write_bytes(b"of another")
    os.chown(site.mnt / "d/foreign", 1000, 1000)
    warning = run("pkernfs", "qemu-args", ram).line
    assert "1 more" in warning
    assert "/d/foreign" in warning
    os.unlink(site.mnt / "d/foreign")
    (site.mnt / "ram2").write_bytes(bytes(SIZE))
    assert run("pkernfs", "qemu-args", ram).stderr == ""
    site.run_ok("pkernfs", "direct", site.mnt / "ram2", "on")
    assert "/ram2" in run("pkernfs", "qemu-args", ram).line


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
def qemu(site: Site, words: list[str], user: int = 0) -> Iterator[Qtest]:
    """A machine without an operating system whose RAM is the given object, in a QEMU of this user."""
    try:
        found = find_qemu(needed=Version(8, 1))
    except QemuError as error:
        pytest.skip(str(error))
    halt = site.tmp / "halt.bin"
    halt.write_bytes(b"\xfa\xf4\xeb\xfc".rjust(65536, b"\x90")[: 65536 - 16] + b"\xfa\xf4\xeb\xfc" + bytes(12))
    address = site.tmp / f"of-{user}" / "qtest"
    address.parent.mkdir()
    os.chown(address.parent, user, user)
    command = [
        str(found.path), "-machine", "q35,accel=tcg,memory-backend=ram", "-cpu", "qemu64", "-smp", "1", "-m", "8M",
        "-bios", str(halt), "-icount", "shift=0,sleep=off", "-nodefaults", "-display", "none", "-no-reboot", *words,
        "-qtest", f"unix:{address},server=on,wait=off", "-qtest-log", "/dev/null",
    ]  # fmt: skip
    with (site.tmp / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=user, group=user, extra_groups=[]
        )
    try:
        wait_for(lambda: address.exists() or process.poll() is not None, "QEMU's socket")
        assert process.poll() is None, (site.tmp / "qemu.log").read_text()
        with closing(Qtest(address)) as made:
            yield made
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_a_region_for_each_tenant(site: Site, ram: Path) -> None:
    """The tenant's QEMU opens the region, and nobody else's does."""
    site.run_ok("pkernfs", "direct", ram, "on")
    option = shlex.split(site.run_ok("pkernfs", "qemu-args", "--id", "ram", ram))
    site.shm.chmod(0o711)
    site.region.chmod(0o600)
    os.chown(site.region, 1000, 1000)
    with qemu(site, option, user=1000) as guest:
        guest.store(0x1000, b"the tenant's")
        assert ram.read_bytes()[0x1000:][:12] == b"the tenant's"
    command = [find_qemu(needed=Version(8, 1)).path, "-machine", "none", "-nodefaults", "-display", "none", *option]
    refused = run(*command, user=1001, group=1001, extra_groups=[])
    assert refused.returncode
    assert "Permission denied" in refused.stderr


@pytest.mark.parametrize("mapping", ["--direct", "--path"])
def test_a_file_that_a_guest_has(site: Site, ram: Path, mapping: str) -> None:
    """No second command for it, but with --force, for who takes it over; never one for the other map."""
    way = {"--direct": "directly", "--path": "through the mount"}[mapping]
    if mapping == "--direct":
        site.run_ok("pkernfs", "direct", ram, "on")
    option = site.run_ok("pkernfs", "qemu-args", mapping, "--id", "ram", ram)
    with qemu(site, [*shlex.split(option), "-name", "guest=g 1,debug-threads=on"]):
        for words in ([], ["--path"], ["--direct"]):
            refused = run("pkernfs", "qemu-args", *words, ram)
            assert (refused.returncode, refused.stdout) == (1, "")
        refused = run("pkernfs", "qemu-args", mapping, ram)
        assert f"mapped {way} by process" in refused.line
        assert "-name g 1" in refused.line
        assert site.run_ok("pkernfs", "qemu-args", mapping, "--force", "--id", "ram", ram) == option
        other = {"--direct": "--path", "--path": "--direct"}[mapping]
        assert run("pkernfs", "qemu-args", other, "--force", ram).returncode == 1
        assert f"mapped {way} by process" in site.run_ok("pkernfs", "info", ram)
        assert "-name g 1" in run("pkernfs", "direct", ram, "off" if mapping == "--direct" else "on").line
    site.run_ok("pkernfs", "qemu-args", mapping, ram)


@pytest.mark.parametrize("mapping", ["--direct", "--path"])
def test_qemu_and_the_mount_see_the_same_memory(site: Site, ram: Path, mapping: str) -> None:
    if mapping == "--direct":
        site.run_ok("pkernfs", "direct", ram, "on")
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
