"""pkernfs info, ls, cat, qemu-args and mkfs.pkernfs, as a person or a script calls them."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.site import PATIENCE, MiB, Result, Site, below, find_program, run

COMMANDS = [
    ["pkernfs"],
    ["pkernfs", "info"],
    ["pkernfs", "ls"],
    ["pkernfs", "cat"],
    ["pkernfs", "explain"],
    ["pkernfs", "scrub"],
    ["pkernfs", "qemu-args"],
    ["mkfs.pkernfs"],
    ["mount.pkernfs"],
    ["fsck.pkernfs"],
]


def fails(result: Result, status: int, *expected: str) -> None:
    """One line on standard error, nothing on standard output."""
    assert result.returncode == status, result
    assert result.stdout == ""
    for word in expected:
        assert word in result.line


def make_files(site: Site) -> None:
    """Some files."""
    top = site.mnt / "top"
    (top / "below").mkdir(parents=True)
    (top / "file").write_bytes(b"content\n")
    os.chown(top / "file", 1000, 1002)
    os.chmod(top / "file", 0o4640)
    os.link(top / "file", top / "below" / "second name")
    os.symlink("below/second name", top / "link")
    os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(10, 229))
    os.mkfifo(top / "fifo")
    (top / os.fsdecode(b"\xff-raw\n")).touch()
    (top / "sparse").write_bytes(b"")
    with (top / "sparse").open("r+b") as file:
        file.seek(5 * MiB)
        file.write(b"end")
    os.utime(top / "file", (1e9, 1e9))


# -- all commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help(arguments: list[str]) -> None:
    result = run(*arguments, "--help")
    assert result.returncode == 0, result
    assert result.stderr == ""
    assert " ".join(arguments) in result.stdout
    assert len(result.stdout.splitlines()) > 8
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_wrong_usage(arguments: list[str]) -> None:
    wrong = {"mount.pkernfs": 1, "fsck.pkernfs": 16}.get(arguments[0], 2)
    fails(run(*arguments), wrong, "--help")
    fails(run(*arguments, "--nonsense", "x", "y"), wrong, "--help")


def test_version() -> None:
    for name in ("pkernfs", "mkfs.pkernfs", "mount.pkernfs", "fsck.pkernfs"):
        assert re.fullmatch(rf"{re.escape(name)} \d+\.\d+\.\d+\n", run(name, "--version").stdout)


@pytest.mark.parametrize(
    "arguments", [*COMMANDS, ["pkernfs", "ls", "REGION"], ["pkernfs", "info", "REGION"]], ids=" ".join
)
def test_commands_load_nothing_that_they_do_not_need(unmounted: Site, arguments: list[str]) -> None:
    """No server's library for any of them; --help does without the filesystem too."""
    given = [str(unmounted.region) if word == "REGION" else word for word in arguments[1:]]
    if "REGION" not in arguments:
        given.append("--help")
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = run(sys.executable, find_program(arguments[0]), *given, env=environment)
    assert result.returncode == 0, result
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in loaded
    heavy = {"trio", "pyfuse3", "rich", "qemu", "asyncio"}
    if "REGION" not in arguments:
        heavy |= {"pkernfs.fs", "pkernfs.fs.filesystem", "pkernfs.server"}
    assert not heavy & loaded


def test_closed_pipe(site: Site) -> None:
    """`pkernfs ls ... | head -1` ends without a word."""
    for index in range(3000):
        os.mknod(site.mnt / f"name-{index}")
    site.umount()
    command = f"{shlex.quote(find_program('pkernfs'))} ls -l {shlex.quote(str(site.region))} | head -1"
    result = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL
    )
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


# -- mkfs -----------------------------------------------------------------------------------------------------------


def test_mkfs(unmounted: Site) -> None:
    path = unmounted.shm / "new"
    uuid = "12345678-1234-5678-1234-567812345678"
    result = run(
        "mkfs.pkernfs", "--size", "32MiB", "--label", "höst 7", "--uuid", uuid, "--phys-base", "0x40000000", path
    )
    assert result.returncode == 0, result
    assert len(result.stdout.splitlines()) == 1
    assert uuid in result.stdout
    found = path.stat()
    assert found.st_size == 32 * MiB
    assert stat.S_IMODE(found.st_mode) == 0o600
    facts = json.loads(unmounted.run_ok("pkernfs", "info", "--json", path))
    assert (facts["uuid"], facts["label"], facts["phys_base"], facts["size"]) == (uuid, "höst 7", 1 << 30, 32 * MiB)
    assert [row["name"] for row in json.loads(unmounted.run_ok("pkernfs", "ls", "-R", "--json", path))] == [
        "iommu",
        "root-pgtables",
    ]
    assert run("mkfs.pkernfs", "--quiet", "--force", path).stdout == ""
    assert json.loads(unmounted.run_ok("pkernfs", "info", "--json", path))["uuid"] != uuid


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--size", "3M", "new"], 2, "2 MiB"),
        (["--size", "4M", "new"], 2, "8 MiB"),
        (["--size", "x", "new"], 2, "size"),
        (["--size", "-2M", "new"], 2, ""),
        (["--size", "8P", "new"], 1, ""),
        (["new"], 2, "--size"),
        (["--uuid", "x", "--size", "16M", "new"], 2, "UUID"),
        (["--label", "l" * 65, "--size", "16M", "new"], 2, "label"),
        (["--phys-base", "4096", "--size", "16M", "new"], 2, "2 MiB"),
        (["--size", "16M", "missing/new"], 1, "missing"),
        (["--size", "16M", "."], 1, ""),
        (["region"], 1, "--force"),
        (["--size", "16M", "region"], 1, "--force"),
        (["--size", "16M", "data"], 1, "--force"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mkfs_refuses(unmounted: Site, arguments: list[str], status: int, complaint: str) -> None:
    """And leaves what was there as it was."""
    (unmounted.shm / "data").write_bytes(b"precious" * 1000)
    before = {path: path.read_bytes() for path in sorted(unmounted.shm.iterdir())}
    fails(run("mkfs.pkernfs", *arguments, cwd=unmounted.shm), status, "mkfs.pkernfs: ", complaint)
    assert {path: path.read_bytes() for path in sorted(unmounted.shm.iterdir())} == before


def test_mkfs_of_a_mounted_region(site: Site) -> None:
    for arguments in ((), ("--force",)):
        fails(run("mkfs.pkernfs", *arguments, "--size", "64M", site.region), 1, "mkfs.pkernfs: ")
    (site.mnt / "f").touch()


# -- info -----------------------------------------------------------------------------------------------------------


def test_info_of_a_region_and_of_its_mount(site: Site) -> None:
    make_files(site)
    through_mount = json.loads(site.run_ok("pkernfs", "info", "--json", site.mnt))
    through_region = json.loads(site.run_ok("pkernfs", "info", "--json", site.region))
    for info in (through_mount, through_region):
        assert info.pop("host_free") > 0  # others take memory meanwhile
    assert through_mount == through_region
    assert through_mount["mountpoint"] == str(site.mnt)
    assert through_mount["server"] == site.worker()
    figures = os.statvfs(site.mnt)
    assert through_mount["space"] == figures.f_blocks * 4096
    assert through_mount["space_free"] == figures.f_bfree * 4096
    text = site.run_ok("pkernfs", "info", site.mnt)
    for word in (str(site.region), str(site.mnt), through_mount["uuid"], "64 MiB", "tmpfs"):
        assert word in text
    site.umount()
    offline = json.loads(site.run_ok("pkernfs", "info", "--json", site.region))
    assert offline["mountpoint"] is None
    assert offline["last_unmounted"] >= offline["last_mounted"]
    for name in ("uuid", "size", "blocks", "inodes", "space", "space_free", "phys_base", "mounts"):
        assert offline[name] == through_mount[name], name
    assert "mounted      no" in site.run_ok("pkernfs", "info", site.region)


def test_info_of_a_file(site: Site) -> None:
    path = site.mnt / "ram"
    path.touch()
    os.truncate(path, 10 * MiB)
    facts = json.loads(site.run_ok("pkernfs", "info", "--json", path))
    assert facts["contiguous"] is True
    assert facts["size"] == facts["allocated"] == 10 * MiB
    assert facts["ino"] == path.stat().st_ino
    (extent,) = facts["extents"]
    assert extent["region_offset"] % (2 * MiB) == 0
    assert extent["physical"] == extent["region_offset"]
    with path.open("r+b") as file:
        file.seek(7 * MiB)
        file.write(b"needle")
    with site.region.open("rb") as region:
        region.seek(extent["region_offset"] + 7 * MiB)
        assert region.read(6) == b"needle"
    assert json.loads(os.getxattr(path, "user.pkernfs.contiguous")) is True
    assert json.loads(os.getxattr(path, "user.pkernfs.extents")) == facts["extents"]
    text = site.run_ok("pkernfs", "info", path)
    assert "contiguous" in text
    assert f"{extent['region_offset']:#x}" in text
    empty = site.mnt / "empty"
    empty.touch()
    assert json.loads(site.run_ok("pkernfs", "info", "--json", empty))["extents"] == []


def test_info_with_a_physical_address(unmounted: Site) -> None:
    unmounted.run_ok("mkfs.pkernfs", "--force", "--phys-base", "8G", unmounted.region)
    unmounted.mount()
    path = unmounted.mnt / "f"
    path.write_bytes(b"x")
    (extent,) = json.loads(unmounted.run_ok("pkernfs", "info", "--json", path))["extents"]
    assert extent["physical"] == (8 << 30) + extent["region_offset"]


def test_info_errors(site: Site) -> None:
    fails(run("pkernfs", "info", "/missing"), 1, "/missing", "no such")
    fails(run("pkernfs", "info", "/etc/passwd"), 1, "/etc/passwd")
    fails(run("pkernfs", "info", "/etc"), 1, "/etc")
    fails(run("pkernfs", "info", site.mnt / "missing"), 1, "missing", "No such file")
    site.crash()
    fails(run("pkernfs", "info", site.mnt), 1, str(site.mnt))
    fails(run("pkernfs", "qemu-args", site.mnt / "f"), 2, "")


# -- ls and cat -----------------------------------------------------------------------------------------------------


def rows_of(site: Site, path: str = "", *arguments: str) -> dict[str, dict[str, object]]:
    """What `pkernfs ls --json` tells, by path."""
    rows = json.loads(site.run_ok("pkernfs", "ls", "--json", *arguments, f"{site.region}:{path}"))
    return {f"{row['folder'].rstrip('/')}/{row['name']}": row for row in rows}


@pytest.mark.parametrize("how", ["umount", "kill-and-replay"])
def test_offline_listing_equals_the_mount(site: Site, how: str) -> None:
    """Also where the journal waits to be applied; no byte of the region changes."""
    make_files(site)
    if how == "kill-and-replay":
        os.mkdir(site.mnt / "last")
    wanted = {}
    for path in below(site.mnt):
        found = os.lstat(path)
        fields = ("mode", "nlink", "uid", "gid", "rdev", "ino", *([] if path.is_dir() else ["size"]))
        row: dict[str, object] = {name: getattr(found, f"st_{name}") for name in fields}
        row |= {name: getattr(found, f"st_{name}_ns") for name in ("mtime", "ctime")}
        row["target"] = os.readlink(path) if path.is_symlink() else None
        wanted[f"/{path.relative_to(site.mnt)}"] = row
    content = (site.mnt / "top" / "sparse").read_bytes()
    if how == "umount":
        site.umount()
    else:
        site.crash()
        site.commit_again()
    digest = site.digest()
    found_rows = rows_of(site, "", "-R")
    assert found_rows.keys() == wanted.keys()
    for path_, row in wanted.items():
        assert {name: found_rows[path_][name] for name in row} == row
    with (site.tmp / "out").open("wb") as out:
        arguments = [find_program("pkernfs"), "cat", f"{site.region}:/top/file", f"{site.region}:top/sparse"]
        subprocess.run(arguments, stdout=out, check=True, timeout=PATIENCE)
    assert (site.tmp / "out").read_bytes() == b"content\n" + content
    assert site.digest() == digest


def test_ls(site: Site) -> None:
    make_files(site)
    site.umount()
    region = site.region
    assert site.run_ok("pkernfs", "ls", region).split() == ["iommu", "top"]
    assert site.run_ok("pkernfs", "ls", f"{region}:/top/below").splitlines() == ["second name"]
    line = site.run_ok("pkernfs", "ls", "-n", f"{region}:top/file")
    for word in ("-rwSr-----", " 2 ", "1000", "1002", " 8 ", "2001-09-0", "file"):
        assert word in line
    text = site.run_ok("pkernfs", "ls", "-l", f"{region}:/top")
    assert "link -> below/second name" in text
    assert "10, 229" in text
    assert text.count("\n") >= 7
    recursive = site.run_ok("pkernfs", "ls", "-R", region)
    assert "/top/below:\nsecond name" in recursive
    assert re.match(r" *\d+ file\n", site.run_ok("pkernfs", "ls", "-i", f"{region}:/top/file"))


def test_ls_of_a_mounted_region_says_so(site: Site) -> None:
    make_files(site)
    result = run("pkernfs", "ls", f"{site.region}:/top")
    assert result.returncode == 0
    assert "file" in result.stdout
    assert "mounted" in result.line


def test_ls_and_cat_errors(site: Site) -> None:
    make_files(site)
    site.umount()
    region = str(site.region)
    fails(run("pkernfs", "ls", "/missing"), 2, "/missing")
    fails(run("pkernfs", "ls", f"{region}:/missing"), 1, "missing", "No such file")
    fails(run("pkernfs", "ls", f"{region}:/top/file/x"), 1, "Not a directory")
    fails(run("pkernfs", "ls", "/etc/passwd:/x"), 1, "/etc/passwd")
    fails(run("pkernfs", "cat", f"{region}:/missing"), 1, "missing", "No such file")
    fails(run("pkernfs", "cat", f"{region}:/top"), 1, "top", "Is a directory")
    fails(run("pkernfs", "cat", f"{region}:/top/fifo"), 1, "top/fifo")
    fails(run("pkernfs", "cat", region), 1)
    fails(run("pkernfs", "nonsense"), 2)


def test_region_path_with_colons(unmounted: Site) -> None:
    path = unmounted.shm / "a:b:c"
    os.link(unmounted.region, path)
    assert unmounted.run_ok("pkernfs", "ls", f"{path}:/iommu").split() == ["root-pgtables"]
    assert unmounted.run_ok("pkernfs", "ls", path).split() == ["iommu"]


# -- qemu-args ------------------------------------------------------------------------------------------------------


def options_of(text: str) -> dict[str, str]:
    """The parts of the option, from what the command printed."""
    arguments = shlex.split(text)
    assert arguments[0] == "-object"
    kind, *rest = arguments[1].replace(",,", "\0").split(",")
    assert kind == "memory-backend-file"
    return dict(part.replace("\0", ",").split("=", 1) for part in rest)


def test_qemu_args(site: Site) -> None:
    path = site.mnt / "guest,ram"
    path.touch()
    os.truncate(path, 8 * MiB)
    through = options_of(site.run_ok("pkernfs", "qemu-args", "--path", path))
    assert through["mem-path"] == str(path)
    assert through["id"] == "pc.ram"
    assert through["share"] in ("on", "yes")
    assert "offset" not in through
    assert json.loads(os.getxattr(path, "user.pkernfs.direct")) is False
    site.run_ok("pkernfs", "direct", path, "on")
    direct = options_of(site.run_ok("pkernfs", "qemu-args", "--direct", "--id", "ram0", path))
    (extent,) = json.loads(os.getxattr(path, "user.pkernfs.extents"))
    assert direct["mem-path"] == str(site.region)
    assert int(direct["offset"], 0) == extent["region_offset"]
    assert direct["id"] == "ram0"
    assert json.loads(os.getxattr(path, "user.pkernfs.direct")) is True
    properties = json.loads(site.run_ok("pkernfs", "qemu-args", "--json", "--direct", path))
    assert properties["offset"] == extent["region_offset"]
    assert properties["size"] == 8 * MiB
    assert properties["mem-path"] == str(site.region)


def test_qemu_args_errors(site: Site) -> None:
    (site.mnt / "empty").touch()
    (site.mnt / "odd").write_bytes(b"x" * 5000)
    with (site.mnt / "pieces").open("wb") as file:
        file.seek(20 * MiB)
        file.write(bytes(4096))
        file.seek(0)
        file.write(bytes(4096))
    fails(run("pkernfs", "qemu-args", site.mnt / "empty"), 2, "truncate -s")
    fails(run("pkernfs", "qemu-args", site.mnt / "odd"), 2, "8192")
    fails(run("pkernfs", "qemu-args", "--direct", site.mnt / "pieces"), 2, "2 extents")
    assert options_of(site.run_ok("pkernfs", "qemu-args", site.mnt / "pieces"))["mem-path"] == str(site.mnt / "pieces")
    fails(run("pkernfs", "qemu-args", site.mnt), 2, "regular file")
    fails(run("pkernfs", "qemu-args", site.mnt / "missing"), 2, "missing")
    fails(run("pkernfs", "qemu-args", "/etc/passwd"), 2, "pkernfs mount")
    fails(run("pkernfs", "qemu-args", "--path", "--direct", site.mnt / "odd"), 2)


def test_facts_cannot_be_changed(site: Site) -> None:
    path = site.mnt / "f"
    path.touch()
    calls: list[Callable[[], None]] = [
        lambda: os.setxattr(path, "user.pkernfs.direct", b"true"),
        lambda: os.setxattr(path, "user.pkernfs.mine", b"x"),
        lambda: os.removexattr(path, "user.pkernfs.direct"),
    ]
    for call in calls:
        with pytest.raises(PermissionError):
            call()
    assert os.listxattr(path) == []


def test_control_socket_is_the_owners(site: Site) -> None:
    """Another user gets no verb in."""
    address = os.fsdecode(os.getxattr(site.mnt, "user.pkernfs.control"))
    code = (
        f"import os, socket; os.setresuid(1000, 1000, 1000); s = socket.socket(socket.AF_UNIX); s.connect({address!r})"
    )
    result = run(sys.executable, "-c", code)
    assert "PermissionError" in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"{}", id="no-verb"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"nonsense", id="not-json"),
        pytest.param(b'{"verb": "nonsense"}', id="unknown-verb"),
        pytest.param(b'{"verb": ["x"]}', id="verb-is-a-list"),
        pytest.param(b'{"verb": "file", "ino": -1}', id="negative-inode"),
        pytest.param(b'{"verb": "file", "ino": 99999999}', id="inode-beyond-the-region"),
        pytest.param(b"[" * 5000, id="deep"),
        pytest.param(b"x" * 70_000, id="long"),
    ],
)
def test_control_socket_answers_nonsense(shared: Site, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(os.getxattr(shared.mnt, "user.pkernfs.control"))
        connection.sendall(line + b"\n")
        reply = json.loads(connection.makefile("rb").readline())
    assert "error" in reply
    assert shared.complaints() == []
    assert Path(shared.mnt).is_dir()
