"""The verbs on a real QEMU, on plain tmpfs: what happens when they fail, or come in the wrong order."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.qemu.cmdline import Machine, backend_option
from pkernfs.qemu.errors import QemuError
from pkernfs.qemu.guest import Guest, Phase

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 128 * MIB


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram, with a comma"
    path.touch()
    os.truncate(path, 2 * SIZE)
    return path


@pytest.fixture
def machine(ram: Path, images: Path) -> Machine:
    return Machine(backend_option(ram, SIZE), SIZE, images / "vmlinuz", images / "initramfs.gz")


@pytest.fixture
def guest(machine: Machine) -> Iterator[Guest]:
    with Guest(machine) as guest:
        yield guest


def test_save_quit_and_resume_in_a_second_guest(guest: Guest, machine: Machine, tmp_path: Path) -> None:
    guest.start()
    guest.save(tmp_path / "state")
    guest.quit()
    assert guest.pid is None
    with Guest(machine) as second:
        second.resume(tmp_path / "state")
        assert second.monitor.status() == "running"


def test_ram_at_an_offset_leaves_the_rest_of_the_file_alone(machine: Machine, ram: Path, tmp_path: Path) -> None:
    with Guest(machine._replace(backend=backend_option(ram, SIZE, offset=SIZE))) as guest:
        guest.start()
        guest.save(tmp_path / "state")
        guest.quit()
    content = ram.read_bytes()
    assert not any(content[:SIZE])
    assert any(content[SIZE:])


def test_failed_save_lets_the_guest_go_on(guest: Guest, tmp_path: Path) -> None:
    guest.start()
    with pytest.raises(QemuError, match="No such file or directory"):
        guest.save(tmp_path / "missing" / "state")
    assert guest.phase is Phase.RUNNING
    assert guest.monitor.status() == "running"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"", "said: ", id="empty"),
        pytest.param(b"junk" * 1000, "Not a migration stream", id="junk"),
    ],
)
def test_resume_from_a_bad_state_can_be_tried_again(
    guest: Guest, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    guest.start()
    guest.save(tmp_path / "state")
    guest.quit()
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(QemuError, match=reason):
        guest.resume(bad)
    assert guest.phase is Phase.DOWN
    assert guest.pid is None
    guest.resume(tmp_path / "state")
    assert guest.monitor.status() == "running"


def test_verb_in_the_wrong_phase_names_both(guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(QemuError, match=r"\(RUNNING\).*\(NEW\)"):
        guest.save(tmp_path / "state")
    guest.start()
    with pytest.raises(QemuError, match=r"\(DOWN\).*\(RUNNING\)"):
        guest.resume(tmp_path / "state")


def test_qemu_that_cannot_start_says_why(machine: Machine, tmp_path: Path) -> None:
    with Guest(machine._replace(backend=backend_option(tmp_path / "missing" / "ram", SIZE))) as guest:
        with pytest.raises(QemuError, match="can't open backing store"):
            guest.start()
        assert guest.pid is None


def test_qemu_that_is_killed_is_noticed(guest: Guest, tmp_path: Path) -> None:
    guest.start()
    assert guest.pid is not None
    os.kill(guest.pid, 9)
    with pytest.raises(QemuError, match="status -9"):
        guest.wait(1)
    with pytest.raises(QemuError, match="status -9"):
        guest.save(tmp_path / "state")


def test_close_leaves_no_process_and_no_directory(machine: Machine) -> None:
    with Guest(machine) as guest:
        guest.start()
        pid = guest.pid
    assert guest.phase is Phase.LOST
    assert not Path(f"/proc/{pid}").exists()
    assert not guest.directory.exists()
