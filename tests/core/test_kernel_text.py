"""What is read of /proc: written here as the kernel writes it, with whatever others may choose, and read back."""

from __future__ import annotations

import mmap
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkernfs import mountinfo, processes
from pkernfs.errors import printable

#: Bytes of names: all but zero, and those often that somebody splits at.
NAMES = st.lists(
    st.one_of(st.sampled_from([*b" \t\n\r\v\f\\#-\x1c\x85\xff/,=", *b"a7"]), st.integers(1, 255)), max_size=12
).map(bytes)
#: Whole lines of others, and pieces of such.
ODD = st.one_of(
    NAMES, st.sampled_from([b"", b" - ", b"1 2 0:3 / /x rw - ", b"1 2 0:3 / /x rw -", b"0-1 r", b"lock:\t"])
)


def mangled(name: bytes, escaped: bytes) -> bytes:
    """As mangle_path() of the kernel has it."""
    return b"".join(b"\\%03o" % byte if byte in escaped else bytes([byte]) for byte in name)


@st.composite
def mount_lines(draw: st.DrawFn) -> tuple[bytes, mountinfo.Mount]:
    root, point, source, subtype = (draw(NAMES) for _ in range(4))
    number, parent, minor, owner = (draw(st.integers(0, (1 << 31) - 1)) for _ in range(4))
    optional = draw(st.lists(st.sampled_from([b"shared:1", b"master:22", b"propagate_from:3", b"unbindable"])))
    fields = [b"%d" % number, b"%d" % parent, b"0:%d" % minor, b"/" + mangled(root, b" \t\n\\")]
    fields += [b"/" + mangled(point, b" \t\n\\"), b"rw,relatime", *optional, b"-"]
    fields += [
        b"fuse." + mangled(subtype, b" \t\n\\#"),
        mangled(source, b" \t\n\\#"),
        b"rw,user_id=%d,group_id=0" % owner,
    ]
    mount = mountinfo.Mount(
        f"0:{minor}",
        os.fsdecode(b"/" + point),
        os.fsdecode(b"fuse." + subtype),
        os.fsdecode(source),
        owner,
        number,
        parent,
        os.fsdecode(b"/" + root),
    )
    return b" ".join(fields) + b"\n", mount


@given(st.lists(st.one_of(mount_lines(), ODD)))
@settings(max_examples=150, deadline=None)
def test_mounts_are_read_beside_any_line(lines: list[tuple[bytes, mountinfo.Mount] | bytes]) -> None:
    text = b"".join(line.replace(b"\n", b"") + b"\n" if isinstance(line, bytes) else line[0] for line in lines)
    found = list(mountinfo.parse(text))
    made = [line[1] for line in lines if not isinstance(line, bytes)]
    assert [mount for mount in found if mount in made] == made


@given(st.lists(st.tuples(NAMES, st.booleans(), st.integers(0, 1 << 40))), st.lists(ODD))
@settings(max_examples=150, deadline=None)
def test_mappings_are_read_whatever_a_file_is_called(files: list[tuple[bytes, bool, int]], odd: list[bytes]) -> None:
    """Of show_map_vma() in fs/proc/task_mmu.c: in a name only the newline is escaped."""
    text, made = b"", []
    for name, shared, inode in files:
        head = b"%08x-%08x rw-%c %08x 00:1a %d " % (4096, 12288, b"sp"[not shared], 8192, inode)
        path = b"/" + mangled(name, b"\n")
        text += b"".join(line.replace(b"\n", b"") + b"\n" for line in odd) + head.ljust(73) + path + b"\n"
        made.append(processes.Mapping("00001000-00003000", shared, True, 8192, 16384, "00:1a", inode, path))
    found = list(processes.parse_maps(text))
    assert [one for one in found if one in made] == made
    assert len(found) >= len(made)


def test_locks_are_read_between_any_lines() -> None:
    text = (
        b"pos:\t0\nflags:\t02\nname:\tlock: 1 \xff\r\nlock:\t1: FLOCK  ADVISORY  WRITE 77 00:1a:5678 0 EOF\nlock:\t\n"
    )
    text += b"lock:\t2: POSIX  ADVISORY  WRITE 77 00:1a:9 0 EOF\nlock:\t3: FLOCK  ADVISORY  READ 77 fe:00:1 0 EOF\n"
    assert list(processes.parse_locks(text)) == [5678, 1]


def test_any_bytes_are_read() -> None:
    """Seeded: real texts of this machine with bytes changed, and bytes of no meaning."""
    rng = random.Random(11)
    real = [Path(f"/proc/self/{name}").read_bytes() for name in ("mountinfo", "maps", "cmdline", "fdinfo/0")]
    for _ in range(400):
        text = bytearray(rng.choice(real) if rng.random() < 0.8 else rng.randbytes(rng.randrange(200)))
        for _ in range(rng.randrange(8) if text else 0):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(3)] = rng.choice([b"", b" ", b"\n", b"\r", b"\0", rng.randbytes(2)])
        for mount in mountinfo.parse(bytes(text)):
            assert re.fullmatch(r"\d+:\d+", mount.device)
        list(processes.parse_maps(bytes(text)))
        list(processes.parse_locks(bytes(text)))
        processes.guest_of(bytes(text).split(b"\0"))
        assert printable(bytes(text)).isprintable()


def test_an_empty_source_is_an_empty_field() -> None:
    line = b"45 27 0:40 / /tmp/x rw,relatime shared:9 - tmpfs  rw,size=64k\n"
    (mount,) = mountinfo.parse(line)
    assert (mount.device, mount.mountpoint, mount.fstype, mount.source) == ("0:40", "/tmp/x", "tmpfs", "")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["-name", "g1"], "g1"),
        (["-name", "guest=g1,debug-threads=on"], "g1"),
        (["-m", "2G", "--name", "debug-threads=on,guest=a,,b"], "a,b"),
        (["-name", "g1,process=x"], "g1"),
        (["-name", "g\x1b[31m1"], r"g\x1b[31m1"),
    ],
    ids=["plain", "libvirt", "comma", "process", "escape"],
)
def test_a_guest_is_known_by_its_name(words: list[str], name: str) -> None:
    code = "import sys, time; print('up', flush=True); time.sleep(60)"
    command = ["/usr/bin/qemu-system-x86_64", "-c", code, *words]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as guest:
        try:
            assert guest.stdout
            guest.stdout.readline()
            assert str(processes.holder(guest.pid)) == f"process {guest.pid}, qemu-system-x86 -name {name}"
        finally:
            guest.kill()
    assert str(processes.holder(guest.pid)) == f"process {guest.pid}"


def test_a_program_is_known_by_its_command_line() -> None:
    command = [sys.executable, "-c", "print(flush=True), input()", "\x1b]0;x\x07\xff\n"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        name = processes.holder(other.pid).command
        other.communicate(b"\n")
    assert name.isprintable()
    assert name.endswith("input() \\x1b]0;x\\x07\xff\\n")


@pytest.mark.parametrize("name", [b"a\rb", b"a b", b"a\nb", b"\xff (deleted)", b" 1 2 3"])
def test_who_maps_a_file(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    code = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096, offset=4096); print()"
    Path(os.fsdecode(path)).write_bytes(bytes(12288))
    command = [sys.executable, "-c", f"{code}; sys.stdout.flush(); sys.stdin.read()", os.fsdecode(path)]
    with open(path, "rb") as file:
        before = list(processes.shared_mappings(file.fileno()))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout
            other.stdout.readline()
            assert before == []
            assert list(processes.shared_mappings(file.fileno())) == [(other.pid, 4096, 8192)]
            other.communicate()
        with mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ):
            assert list(processes.shared_mappings(file.fileno())) == [(os.getpid(), 0, 4096)]
