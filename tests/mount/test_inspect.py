"""fsck(8), pkernfs scrub and pkernfs explain, as they are called: on regions, on mounts, and while files change."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pkernfs.format import BLOCK, EXTENT_VALUE, PAGE, Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.xattrs import Xattrs
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import open_region
from tests.mount.site import PATIENCE, PROGRAMS, MiB, Result, Site, find_program, run

PHYS_BASE = 0x1200000000


def flip(region: Path, offset: int) -> None:
    """Damage one byte, or make it right again, behind everybody's back."""
    fd = os.open(region, os.O_RDWR)
    byte = os.pread(fd, 1, offset)[0]
    os.pwrite(fd, bytes([byte ^ 0x10]), offset)
    os.close(fd)


def look(site: Site, ask: Callable[[Filesystem], int]) -> int:
    """Something about the region as it is now."""
    with open_region(str(site.region), readonly=True, locked=False) as region:
        return ask(open_filesystem(region))


def populate(site: Site) -> Path:
    """A file with two names, an attribute in pages of its own, and other content around it."""
    folder = site.mnt / "some dir"
    folder.mkdir()
    path = folder / "file"
    path.write_bytes(b"content" * 1000)
    os.link(path, site.mnt / "other name")
    os.setxattr(path, "user.large", b"v" * 9000)
    for n in range(50):
        (folder / f"n{n}").touch()
    return path


# -- fsck(8) ----------------------------------------------------------------------------------------------------------


def fsck8(*words: str | os.PathLike[str]) -> Result:
    """util-linux' fsck, which finds our helper by PATH."""
    return run("fsck", *words, env={**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"})


def test_fsck_through_util_linux(unmounted: Site) -> None:
    region, second = unmounted.region, unmounted.shm / "second"
    unmounted.run_ok("mkfs.pkernfs", "--size", "16M", second)
    for words in (["-n"], ["-a"], ["-f", "-y"]):
        result = fsck8("-t", "pkernfs", region, *words)
        assert result.returncode == 0, result
        assert f"{region}: clean, " in result.stdout
    both = fsck8("-t", "pkernfs", "-V", region, second, "--", "-n")
    assert both.returncode == 0, both
    assert both.stdout.count(": clean, ") == 2
    flip(region, 60)
    assert fsck8("-t", "pkernfs", region, second, "-n").returncode == 4
    assert fsck8("-t", "pkernfs", region).returncode == 4, "nobody to ask: it only looks"
    assert fsck8("-t", "pkernfs", region, second, "-y").returncode == 1
    assert fsck8("-t", "pkernfs", region, second, "-y").returncode == 0
    assert fsck8("-t", "pkernfs", unmounted.shm / "missing", "-n").returncode == 8
    assert fsck8("-t", "pkernfs", region, "--", "--nonsense").returncode == 16


def test_fsck_of_a_mounted_region(site: Site) -> None:
    for option in ("-y", "-p"):
        result = fsck8("-t", "pkernfs", site.region, option)
        assert result.returncode == 8
        assert "unmount it, or look only with -n" in result.stderr
    result = run("fsck.pkernfs", "-n", site.region)
    assert result.returncode == 0, result
    assert "what changes meanwhile may seem damaged" in result.line


# -- scrub ------------------------------------------------------------------------------------------------------------


def scrub(target: Path) -> dict[str, Any]:
    """What it prints for programs; the exit status says the same."""
    result = run("pkernfs", "scrub", "--json", target)
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.stderr == ""
    assert result.returncode == (0 if found["clean"] else 4)
    assert found["clean"] == (not found["problems"])
    return found


def attribute_value(fs: Filesystem, ino: int) -> int:
    """The offset of the attribute's value."""
    (attribute,) = Xattrs(fs.volume, Ino(ino), fs.getattr(Ino(ino))).all()
    return EXTENT_VALUE.unpack(attribute.payload).page * PAGE


#: Structure -> where it is, from the filesystem and the inode of the file; and the path that must be named.
PLACES: dict[str, tuple[Callable[[Filesystem, int], int], str | None]] = {
    "superblock": (lambda fs, ino: 60, None),
    "copy": (lambda fs, ino: fs.volume.sb.journal_offset + 60, None),
    "journal-header": (lambda fs, ino: fs.volume.journal.header_at + 20, None),
    "journal-body": (lambda fs, ino: fs.volume.journal.body_at + 20, None),
    "block-table": (lambda fs, ino: PAGE + 1000, None),
    "slab-header": (lambda fs, ino: ino * 256 // BLOCK * BLOCK + 100, None),
    "inode": (lambda fs, ino: ino * 256 + 50, "/other name"),
    "root": (lambda fs, ino: 256 + 50, "/"),
    "node": (lambda fs, ino: fs.getattr(fs.resolve(b"some dir")).root * PAGE + 200, "/some dir"),
    "attribute": (attribute_value, "/other name"),
}


def offset_of(place: Callable[[Filesystem, int], int], ino: int, fs: Filesystem) -> int:
    """One of these places, for ``look``."""
    return place(fs, ino)


def test_scrub_finds_what_is_damaged_under_a_mount(site: Site) -> None:
    path = populate(site)
    ino = path.stat().st_ino
    structures = scrub(site.mnt)["structures"]
    assert structures > 50
    site.expected = re.compile("is damaged: ")
    for name, (place, wanted) in PLACES.items():
        offset = look(site, partial(offset_of, place, ino))
        flip(site.region, offset)
        found = scrub(site.mnt)
        text = run("pkernfs", "scrub", site.mnt) if name in ("inode", "copy") else None
        flip(site.region, offset)
        assert len(found["problems"]) == 1, name
        (problem,) = found["problems"]
        assert problem["path"] == wanted, name
        assert problem["offset"] <= offset or name == "attribute"
        if text:
            assert (text.returncode, text.stderr) == (4, "")
            first, last = text.stdout.splitlines()
            assert first == (f"{wanted}: " if wanted else "") + problem["text"]
            assert last.endswith(", 1 damaged")
    for target in (site.region, path):
        assert scrub(target)["structures"] == structures, "the same mount"


def test_scrub_of_a_region_that_is_not_mounted(site: Site) -> None:
    ino = populate(site).stat().st_ino
    site.umount()
    structures = scrub(site.region)["structures"]
    flip(site.region, ino * 256 + 50)
    (problem,) = scrub(site.region)["problems"]
    assert (problem["ino"], problem["path"]) == (ino, "/other name")
    flip(site.region, ino * 256 + 50)
    assert scrub(site.region)["structures"] == structures
    flip(site.region, PAGE + 1000)
    assert "the block table" in scrub(site.region)["problems"][0]["text"]
    flip(site.region, PAGE + 1000)
    flip(site.region, 60)
    assert scrub(site.region)["problems"][0]["text"].startswith(
        "looks like a pkernfs region whose superblock is damaged (superblock checksum: "
    )
    flip(site.region, 60)
    for target in (site.tmp / "missing", site.server_log):
        result = run("pkernfs", "scrub", target)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.line


def test_scrub_while_files_change(site: Site) -> None:
    """No false alarm."""
    done = threading.Event()
    rounds = 0

    def work() -> None:
        nonlocal rounds
        while not done.is_set():
            folder = site.mnt / f"folder{rounds % 3}"
            folder.mkdir(exist_ok=True)
            path = folder / f"file{rounds % 40}"
            path.write_bytes(b"x" * (rounds * 777 % 300_000))
            os.setxattr(path, "user.value", b"v" * (rounds * 999 % 20_000))
            path.rename(site.mnt / f"moved{rounds % 50}")
            if rounds % 7 == 0:
                for other in list(site.mnt.glob("moved*"))[:20]:
                    other.unlink()
            rounds += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(8):
            before = rounds
            assert scrub(site.mnt)["problems"] == []
        assert rounds > before
    finally:
        done.set()
        worker.join(PATIENCE)


def on_terminal(*words: str | os.PathLike[str]) -> str:
    """What a command that succeeds prints on a terminal."""
    fd, inner = pty.openpty()
    process = subprocess.Popen([find_program(str(words[0])), *words[1:]], stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    seen = b""
    try:
        while chunk := os.read(fd, 65536):
            seen += chunk
    except OSError:  # EIO: nobody has it open any more
        pass
    os.close(fd)
    assert process.wait(PATIENCE) == 0, seen
    return seen.decode()


def test_progress_is_for_a_terminal(site: Site) -> None:
    populate(site)
    for target in (site.mnt, site.region):
        assert "verifying" in on_terminal("pkernfs", "scrub", target)
        result = run("pkernfs", "scrub", target)
        assert result.stderr == ""
        assert len(result.stdout.splitlines()) == 1
    assert "\x1b" not in on_terminal("pkernfs", "scrub", "--json", site.mnt)


# -- explain ----------------------------------------------------------------------------------------------------------


def explain(target: Path, *words: str) -> dict[str, Any]:
    """What it prints for programs."""
    result = run("pkernfs", "explain", "--json", target, *words)
    assert result.returncode == 0, result
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def tenant() -> Any:
    """A mounted region at a physical address, with files."""
    made = Site()
    try:
        made.run_ok("mkfs.pkernfs", "--force", "--size", "64M", "--phys-base", hex(PHYS_BASE), made.region)
        made.mount()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("mounted", [True, False], ids=["mounted", "not-mounted"])
def test_explain(tenant: Site, mounted: bool) -> None:
    """Every kind of place."""
    path = populate(tenant)
    ram = tenant.mnt / "guest ram"
    ram.touch()
    os.truncate(ram, 6 * MiB)
    ino = path.stat().st_ino
    (extent,) = json.loads(os.getxattr(ram, "user.pkernfs.extents"))
    (small,) = json.loads(os.getxattr(path, "user.pkernfs.extents"))
    value = look(tenant, lambda fs: attribute_value(fs, ino))
    node = look(tenant, lambda fs: fs.getattr(fs.resolve(b"some dir")).root * PAGE)
    body = look(tenant, lambda fs: fs.volume.journal.body_at)
    copy = look(tenant, lambda fs: fs.volume.sb.journal_offset)
    if not mounted:
        tenant.umount()
    target = tenant.mnt if mounted else tenant.region
    at = explain(target, hex(extent["physical"] + 3 * MiB + 17))
    assert at["path"] == "/guest ram"
    assert at["file_offset"] == 3 * MiB + 17
    assert at["physical"] == PHYS_BASE + at["offset"]
    assert at["extent"] == extent
    assert not at["beyond_end"]
    assert explain(target, str(extent["region_offset"] // BLOCK))["file_offset"] == 0
    name = f"{small['region_offset'] // PAGE:#x}"
    for words in (["--page", name], ["--offset", hex(small["region_offset"])], [hex(small["physical"])]):
        at = explain(target, *words)
        assert (at["structure"], at["ino"], at["file_offset"]) == ("data", ino, 0)
        assert at["paths"] == ["/other name", "/some dir/file"]
    assert explain(target, "--offset", str(ino * 256))["structure"] == "inode"
    at = explain(target, "--offset", str(value))
    assert (at["structure"], at["attribute"], at["ino"]) == ("attribute value", "user.large", ino)
    at = explain(target, "--offset", str(node))
    assert (at["structure"], at["tree"], at["path"]) == ("tree node", "directory", "/some dir")
    at = explain(target, "--offset", str(body))
    assert at["structure"] == "journal record 0 of the last transaction"
    assert at["record"]["kind"] == "store"
    assert explain(target, "--offset", str(copy))["structure"] == "copy of the superblock"
    assert explain(target, hex(PHYS_BASE))["structure"] == "superblock"
    assert explain(target, "20")["structure"] == "free"
    text = run("pkernfs", "explain", target, hex(small["physical"] + 5)).stdout.splitlines()
    assert text[0].startswith(f"offset {small['region_offset'] + 5:#x}, physical {small['physical'] + 5:#x}: block ")
    assert text[1] == f"data of inode {ino}, /other name, at file offset 0x5"
    assert text[2] == "also /some dir/file"
    assert text[3].startswith("extent: file offset 0x0 to 0x1fff at region offset 0x")
    assert len(text) == 4


def test_explain_an_orphan(tenant: Site) -> None:
    """Removed, and still open."""
    with (tenant.mnt / "gone").open("w+b") as file:
        file.write(b"x" * MiB * 2)
        file.flush()
        os.fsync(file.fileno())
        (extent,) = json.loads(os.getxattr(tenant.mnt / "gone", "user.pkernfs.extents"))
        os.unlink(tenant.mnt / "gone")
        at = explain(tenant.region, hex(extent["physical"]))
        assert (at["path"], at["paths"], at["orphan"]) == (None, [], True)
        assert "removed and is still open" in run("pkernfs", "explain", tenant.mnt, hex(extent["physical"])).stdout


def test_explain_names_that_are_no_text(tenant: Site) -> None:
    path = os.fsencode(tenant.mnt) + b"/\xff\nname"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)
    result = run(
        "pkernfs", "explain", tenant.mnt, "--offset", str(os.stat(path).st_ino * 256), env={**os.environ, "LC_ALL": "C"}
    )
    assert result.returncode == 0, result
    assert result.stdout.splitlines()[1].endswith(", /\\xff\\nname")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param(["32"], "block 32: expected one of the region, 0 to 31", id="block"),
        pytest.param(["0x1234567890"], "expected one of the region, 0x1200000000 to 0x1203ffffff", id="address"),
        pytest.param(["0x11ffffffff"], "address 0x11ffffffff: expected one of", id="address-below"),
        pytest.param(["--page", "0x4000"], "page 0x4000: expected one of the region, 0x0 to 0x3fff", id="page"),
        pytest.param(["--offset", "64M"], "offset 0x4000000: expected one of", id="offset"),
        pytest.param(["64M"], "expected a unit for this number: --offset or --physical", id="no-unit"),
        pytest.param(["12ab34"], "begins with 0x", id="hex-without-0x"),
        pytest.param(["-5"], "", id="negative"),
        pytest.param(["file"], "expected a block such as 17, or an address such as 0x", id="word"),
        pytest.param(["--block", "--page", "1"], "not allowed with", id="two-units"),
    ],
)
def test_explain_refuses(tenant: Site, words: list[str], text: str) -> None:
    result = run("pkernfs", "explain", tenant.mnt, *words)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert text in result.stderr.splitlines()[-1]
    assert len([line for line in result.stderr.splitlines() if "changing" not in line]) == 1


def test_explain_words_out_of_a_log(tenant: Site) -> None:
    """As they stand there."""
    plain = explain(tenant.mnt, "0x1200000000")
    for word in (
        "0X1200000000",
        "address=0x1200000000,",
        "[0x0000001200000000]",
        "DMAR: [DMA Write NO_PASID] Request device [00:02.0] fault addr 0x1200000000",
    ):
        assert explain(tenant.mnt, word) == plain, word
    assert run("pkernfs", "explain", tenant.mnt, "domain=0x0000 address=0x1200000000").returncode == 2
