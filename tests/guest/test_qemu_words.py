"""Command lines and the guest's lines; needs no QEMU."""

from pathlib import Path

import pytest

from pkernfs.qemu import cmdline, console
from pkernfs.qemu.cmdline import Machine, Qemu, Version, backend_arguments, backend_option
from pkernfs.qemu.errors import QemuError

BOOT = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "fedcba98-89ab-cdef-0123-456789abcdef"


def line(tick: int, boot_id: str = BOOT) -> str:
    return f"PKERNFS-GUEST boot_id={boot_id} count={tick} sum={tick:032x}\r\n"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        pytest.param("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds)\nCopyright", (10, 0, 2), id="debian"),
        pytest.param("QEMU emulator version 8.2.0", (8, 2, 0), id="plain"),
        pytest.param("QEMU emulator version 9.1", (9, 1, 0), id="two-numbers"),
        pytest.param("command not found", None, id="no-version"),
    ],
)
def test_parse_version(text: str, version: tuple[int, int, int] | None) -> None:
    assert cmdline.parse_version(text) == version


def test_what_each_version_knows() -> None:
    assert not Qemu("qemu", Version(7, 2, 22)).knows_offset
    assert Qemu("qemu", Version(8, 1)).knows_offset
    assert not Qemu("qemu", Version(8, 1, 5)).knows_cpr
    assert Qemu("qemu", Version(10, 0)).knows_cpr


def fake_qemu(directory: Path, says: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = directory / cmdline.BINARY
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    return path


def test_find_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_qemu(tmp_path, "QEMU emulator version 8.2.1", monkeypatch)
    assert cmdline.find_qemu() == Qemu(str(path), Version(8, 2, 1))


@pytest.mark.parametrize(
    ("says", "found"),
    [
        pytest.param("QEMU emulator version 7.2.22 (Debian)", "found 7.2.22 at", id="too-old"),
        pytest.param("nonsense", 'found "nonsense"', id="no-version"),
    ],
)
def test_qemu_not_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, found: str) -> None:
    fake_qemu(tmp_path, says, monkeypatch)
    with pytest.raises(QemuError, match=f"{found}.*guest-qemu"):
        cmdline.find_qemu()


def test_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuError, match="on PATH, found none"):
        cmdline.find_qemu()


def test_backend_option() -> None:
    assert backend_option("/mnt/ram", 4096) == "memory-backend-file,id=pc.ram,size=4096,mem-path=/mnt/ram,share=on"
    assert backend_option(Path("/r,1"), 8192, offset=0, id="m", align=4096) == (
        "memory-backend-file,id=m,size=8192,mem-path=/r,,1,offset=0,align=4096,share=on"
    )
    assert backend_arguments("/r", 1, 2) == ["-object", backend_option("/r", 1, 2)]


@pytest.mark.parametrize(("size", "offset"), [(0, None), (-1, None), (1, -1)])
def test_backend_option_refuses_what_is_no_range(size: int, offset: int | None) -> None:
    with pytest.raises(ValueError, match="no such range"):
        backend_option("/r", size, offset)


def test_guest_command_differs_only_in_incoming() -> None:
    machine = Machine(backend_option("/r", 1 << 20), 1 << 20, Path("/k"), Path("/i"))
    qemu = Qemu("/bin/qemu", Version(10, 0))
    start = cmdline.guest_command(qemu, machine, monitor=Path("/q"), console=Path("/c"))
    resume = cmdline.guest_command(qemu, machine, monitor=Path("/q"), console=Path("/c"), incoming=True)
    assert start[0] == "/bin/qemu"
    assert resume == [*start, "-incoming", "defer"]


def test_parse_takes_ticks_among_other_lines_but_no_unfinished_one() -> None:
    text = "[    0.000000] Linux version 6.1\n" + line(1) + "random: crng init done\r\n" + line(2) + line(3)[:-1]
    assert [beat.tick for beat in console.parse(text)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(line(7) + line(1, OTHER), f"expected boot_id {BOOT}, found {OTHER}", id="booted-again"),
        pytest.param(line(7) + line(9), "expected tick 8, found tick 9", id="lost-tick"),
        pytest.param(line(7) + line(7), "expected tick 8, found tick 7", id="doubled-tick"),
        pytest.param(
            line(7) + f"PKERNFS-GUEST FAILED boot_id={BOOT} count=8 chunk=0 expected=aa found=bb\r\n",
            "chunk=0 expected=aa found=bb",
            id="bad-memory",
        ),
    ],
)
def test_parse_refuses_a_guest_that_did_not_go_on(text: str, reason: str) -> None:
    with pytest.raises(QemuError, match=reason):
        list(console.parse(text))


def test_wait_gives_up_and_tells_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "console"
    path.write_text(line(1) + "Kernel panic\n")
    assert console.Console(path).wait(1, timeout=0).tick == 1
    with pytest.raises(QemuError, match='tick 2 of the guest, found "Kernel panic"'):
        console.Console(path).wait(2, timeout=0)


def test_console_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert console.Console(tmp_path / "none").last() is None
