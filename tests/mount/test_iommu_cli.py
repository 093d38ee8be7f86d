"""pkernfs iommu, as a person or a script calls it: arguments, exit codes, help, and what is printed."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest

from pkernfs import client, mountinfo
from pkernfs.api import Invalidation
from pkernfs.cli.iommu import LISTED as VERBS
from pkernfs.cli.iommu import walk
from pkernfs.cli.iommu.invalidations import commands, covering
from pkernfs.cli.main import run as pkernfs
from pkernfs.errors import UsageError
from pkernfs.format import IOMMU_INO
from tests.mount.site import MiB, Result, Site, find_program, run

BASE = 0x1000000000
PAGE = 4096
EACH_VERB = pytest.mark.parametrize("verb", VERBS)


def iommu(*arguments: str | Path) -> Result:
    """The command's result."""
    return run("pkernfs", "iommu", *arguments)


def says(*arguments: str | Path) -> str:
    """What a command prints that works."""
    done = iommu(*arguments)
    assert done.returncode == 0, done
    assert done.stderr == ""
    return done.stdout


def told(*arguments: str | Path) -> dict[str, Any]:
    """The same with --json."""
    found: dict[str, Any] = json.loads(says(*arguments, "--json"))
    return found


def fails(status: int, *arguments: str | Path) -> str:
    """The one line of a command that does not work."""
    done = iommu(*arguments)
    assert done.returncode == status, done
    assert done.stdout == ""
    return done.line


@pytest.fixture
def dom(site: Site) -> Path:
    """A domain; beside it 16 MiB of guest RAM and a small file."""
    with (site.mnt / "guest-ram").open("wb") as file:
        file.truncate(16 * MiB)
    (site.mnt / "rom").write_bytes(b"x" * 3 * PAGE)
    path = site.mnt / "iommu" / "dom-0"
    says("create", path)
    return path


# -- arguments ------------------------------------------------------------------------------------------------------


def test_help() -> None:
    text = says("--help")
    assert all(re.search(rf"^    {verb}\s+\S", text, re.MULTILINE) for verb in VERBS)
    assert max(map(len, text.splitlines())) <= 120


@EACH_VERB
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pkernfs(["iommu", verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: pkernfs iommu {verb} " in text
    assert f"\n  pkernfs iommu {verb} /" in text  # an example
    assert "--json" in text
    assert max(map(len, text.splitlines())) <= 120


@EACH_VERB
@pytest.mark.parametrize("arguments", [[], ["--nonsense", "x", "y", "z"]], ids=["none", "wrong"])
def test_wrong_usage(verb: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pkernfs(["iommu", verb, *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"see pkernfs iommu {verb} --help")


def test_wrong_verb() -> None:
    assert "--help" in fails(2)
    assert "invalid choice" in fails(2, "frobnicate")


@pytest.mark.parametrize("arguments", [["--help"], ["map", "--help"], ["map-picture", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = run(sys.executable, find_program("pkernfs"), "iommu", *arguments, env=environment)
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.returncode == 0, result
    assert "argparse" in loaded
    assert not {"trio", "pyfuse3", "rich", "xml.etree", "pkernfs.fs", "pkernfs.fs.filesystem"} & loaded


@pytest.mark.parametrize("device", ["00:20.0", "00:05.8", "00:05", "g0:05.0", "10000:00:05.0", "100:05.0x", ""])
def test_wrong_device(device: str) -> None:
    """Before anything else is looked at."""
    for arguments in (["attach", "/nowhere/iommu/dom-0", device], ["detach", "/nowhere", device]):
        with pytest.raises(UsageError, match=r"\[SSSS:\]BB:DD\.F in hexadecimal, such as 00:05\.0"):
            pkernfs(["iommu", *arguments])
    with pytest.raises(UsageError, match=r"\[SSSS:\]BB:DD\.F in hexadecimal"):
        pkernfs(["iommu", "walk", "/nowhere", device, "0"])


def test_wrong_words(site: Site, dom: Path) -> None:
    ram, outside = site.mnt / "guest-ram", site.tmp / "file"
    outside.write_bytes(b"x" * PAGE)
    assert "[SSSS:]BB:DD.F" in fails(2, "attach", dom, "00:20.0")
    assert "64 bits" in fails(2, "map", dom, "0x10000000000000000", ram)
    assert "64 bits" in fails(2, "unmap", dom, "0", "16384P")
    assert "expected a size" in fails(2, "map", dom, "1X", ram)
    assert "expected a size" in fails(2, "map", dom, "0", ram, "--offset", "0xKB")
    assert "not allowed with" in fails(2, "map", dom, "0", ram, "--ro", "--wo")
    assert "same mount" in fails(2, "map", dom, "0", outside)
    assert "in a pkernfs mount" in fails(2, "map", outside, "0", ram)
    assert "MOUNT/iommu/NAME" in fails(2, "create", site.mnt / "dom-1")
    assert "invalid choice" in fails(2, "create", site.mnt / "iommu" / "dom-1", "--levels", "6")
    assert "invalid choice" in fails(2, "create", site.mnt / "iommu" / "dom-1", "--format", "arm")
    assert "invalid choice" in fails(2, "replace", dom, "--leaf", "3")
    assert "65535" in fails(2, "root", site.mnt, "--segment", "64K")
    for token in ("0", "-1", "x", "\u0661", ""):
        assert "--ack: expected" in fails(2, "invalidations", site.mnt, "--ack", token)
    assert "MOUNT or REGION" in fails(2, "list", f"{site.region}:/iommu")
    assert "MOUNT DEVICE IOVA" in fails(2, "walk", site.mnt, "x", "00:05.0", "0")
    assert "expected a domain" in fails(2, "walk", site.mnt, "0")
    assert "expected a domain" in fails(2, "map-picture", ram)
    assert "standard output" in fails(2, "map-picture", dom, "--svg", "-", "--json")
    assert told("list", site.mnt)["domains"][0]["mappings"] == []
    assert sorted(os.listdir(site.mnt / "iommu")) == ["dom-0", "root-pgtables"]


def test_errors(site: Site, dom: Path) -> None:
    ram = site.mnt / "guest-ram"
    assert "pkernfs iommu create" in fails(1, "map", site.mnt / "iommu" / "dom-9", "0", ram)
    assert "No such file" in fails(1, "map", dom, "0", site.mnt / "nothing")
    assert "Invalid argument" in fails(1, "map", dom, "0", ram, "--length", "0")
    assert "Invalid argument" in fails(1, "map", dom, "5", ram)
    assert "Invalid argument" in fails(1, "map", dom, "0xfee00000", ram)
    assert "Invalid argument" in fails(1, "map", dom, "0xffffffffffffffff", ram)
    assert "File exists" in fails(1, "create", dom)
    assert "No such file" in fails(1, "detach", site.mnt, "00:05.0")
    assert "No such file" in fails(1, "unmap", dom, "0", "4K", "--json")
    assert "cannot write" in fails(1, "map-picture", dom, "--svg", site.tmp / "no" / "file")


# -- verbs ----------------------------------------------------------------------------------------------------------


def test_from_create_to_destroy(site: Site, dom: Path) -> None:
    ram, rom = site.mnt / "guest-ram", site.mnt / "rom"
    assert says("map", dom, "0", ram) == f"0x0 to 0xffffff translates to {ram}, offset 0x0, rw\n"
    assert "it was mapped already" in says("map", dom, "0", ram, "--live-update")
    assert "File exists" in fails(1, "map", dom, "15M", ram)
    assert says("map", dom, "4G", rom, "--ro", "--length", "8K").startswith("0x100000000 to 0x100001fff translates to ")
    assert says("attach", dom, "0:5.0", "--persistent").startswith("0000:00:05.0: attached to dom-0, domain id ")

    root = says("root", site.mnt)
    assert root == f"{int(root, 16):#x}\n"
    facts = told("root", site.mnt)
    assert (facts["format"], facts["register"], facts["physical"]) == ("vtd", "RTADDR", int(root, 16))

    listing = says("list", site.mnt).splitlines()
    assert "  device 0000:00:05.0 attached, persistent" in listing
    assert [line.split() for line in listing[-3:]] == [
        ["IOVA", "to", "length", "offset", "file"],
        ["0x0", "0xffffff", "16", "MiB", "rw", "0x0", "guest-ram"],
        ["0x100000000", "0x100001fff", "8", "KiB", "ro", "0x0", "rom"],
    ]
    assert len({line.rstrip().rindex("  ") for line in listing[-3:]}) == 1  # aligned

    assert "no problems" in says("audit", site.mnt)
    assert told("audit", site.mnt)["problems"] == []

    assert "1 MiB unmapped\n" in says("unmap", dom, "1M", "1M")
    needed = says("invalidations", site.mnt)
    assert "VT-d: IOTLB invalidation, page-selective within domain: domain id 1, address 0x" in needed
    assert f"pkernfs iommu invalidations {site.mnt} --ack " in needed
    assert "acknowledged" in says("invalidations", site.mnt, "--ack", "all")
    assert says("invalidations", site.mnt) == "nothing to invalidate\n"

    assert " compared\n" in says("replace", dom, "--leaf", "4k")
    assert "busy" in fails(1, "destroy", dom)
    assert says("detach", site.mnt, "00:05.0").startswith("0000:00:05.0: detached\n")
    assert says("destroy", dom) == f"{dom}: destroyed\n"
    assert "\nno domains\n" in says("list", site.mnt)
    assert says("list", site.mnt).endswith("invalidations are pending: pkernfs iommu invalidations MOUNT\n")


def test_walk(site: Site, dom: Path) -> None:
    says("map", dom, "4G", site.mnt / "guest-ram", "--offset", "2M", "--wo")
    says("attach", dom, "01:02.3")
    lines = says("walk", site.mnt, "01:02.3", "0x100001234").splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["table", "root", "context", "level 4"]
    assert lines[-1].startswith("IOVA 0x100001234 is physical 0x")
    assert lines[-1].endswith("write only, page of 2 MiB: guest-ram, offset 0x201234")
    same = told("walk", dom, "0x100001234")
    assert f"physical {same['physical']:#x}," in lines[-1]
    assert same["device"] is None
    faulty = iommu("walk", dom, "8G")
    assert (faulty.returncode, faulty.stderr) == (1, "")
    assert faulty.stdout.splitlines()[-1].startswith("IOVA 0x200000000 faults: ")
    assert json.loads(iommu("walk", dom, "8G", "--json").stdout)["fault"]
    assert "not attached" in fails(1, "walk", site.mnt, "00:05.0", "0")


def test_the_only_mount(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """`walk DEVICE IOVA` asks the one mount, and none where there are two."""
    here = [mount for mount in mountinfo.mounts() if mount.mountpoint == str(site.mnt)]
    monkeypatch.setattr(mountinfo, "mounts", lambda: iter(here))
    assert walk.only_mount() == str(site.mnt)
    twice = [here[0]._replace(mountpoint="/other"), *here]
    monkeypatch.setattr(mountinfo, "mounts", lambda: iter(twice))
    assert walk.only_mount() == str(site.mnt)
    for wrong in ([], [*here, here[0]._replace(mountpoint="/other", device="0:0")]):
        monkeypatch.setattr(mountinfo, "mounts", lambda wrong=wrong: iter(wrong))
        with pytest.raises(UsageError, match="expected MOUNT DEVICE IOVA"):
            walk.only_mount()


def test_without_a_mount(site: Site, dom: Path) -> None:
    """list, walk, audit, root and map-picture say the same of the region; through its path also while it is mounted."""
    says("map", dom, "0", site.mnt / "guest-ram")
    says("attach", dom, "00:05.0", "--persistent")
    questions = [["list"], ["audit"], ["root"], ["walk", "00:05.0", "0x3000"], ["walk", "0x3000"], ["map-picture"]]

    def answers(place: str, inside: str) -> list[dict[str, Any]]:
        where = [inside if arguments in (["walk", "0x3000"], ["map-picture"]) else place for arguments in questions]
        return [told(arguments[0], place, *arguments[1:]) for arguments, place in zip(questions, where, strict=True)]

    mounted = answers(str(site.mnt), str(dom))
    assert answers(str(site.region), f"{site.region}:/iommu/dom-0") == mounted
    site.umount()
    assert answers(str(site.region), f"{site.region}:/iommu/dom-0") == mounted
    assert "in a pkernfs mount" in fails(2, "create", f"{site.region}:/iommu/dom-1")
    assert "expected a domain" in fails(1, "walk", f"{site.region}:/guest-ram", "0")


def test_map_picture(site: Site, dom: Path) -> None:
    odd = site.mnt / "<&> \"'\n"
    odd.write_bytes(b"x" * PAGE)
    says("map", dom, "0", site.mnt / "guest-ram")
    says("map", dom, "4G", odd, "--ro")
    os.unlink(odd)
    text = says("map-picture", dom)
    assert "16 MiB rw  guest-ram  offset 0x0\n" in text
    assert "leaves 2 MiB  physical 0x" in text
    assert "4 KiB ro  inode " in text
    assert run("pkernfs", "iommu", "map-picture", dom, env={**os.environ, "PYTHONIOENCODING": "ascii"}).stdout.isascii()
    picture = site.tmp / "dom-0.svg"
    assert says("map-picture", dom, "--svg", picture) == ""
    assert says("map-picture", dom, "--svg", "-") == picture.read_text()
    titles = [element.text or "" for element in xml.parse(picture).iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("0x100000000 to 0x100000fff (4 KiB, ro): inode ") for title in titles)
    facts = told("map-picture", dom)
    assert [block["leaves"] for block in facts["blocks"]] == [[2 * MiB], [PAGE]]


# -- what the server gets, and replies that a mount does not give at will ---------------------------------------------


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a server gets that replies as ``ANSWERS`` says."""
    questions: list[dict[str, Any]] = []

    def exchange(_address: bytes, line: bytes, _timeout: float | None) -> bytes:
        questions.append(json.loads(line))
        return json.dumps({"result": ANSWERS[questions[-1]["verb"]]}).encode() + b"\n"

    monkeypatch.setattr(client, "exchange", exchange)
    return questions


PENDING = [
    {"kind": "context", "id": 7, "device": "0001:3b:00.1", "iova": None, "length": None},
    {"kind": "iotlb", "id": 7, "device": None, "iova": 0x3000, "length": 0x2000},
    {"kind": "iotlb", "id": 8, "device": None, "iova": None, "length": None},
]
PROBLEM = {
    "kind": "foreign",
    "domain": "dom\x1b",
    "device": None,
    "iova": 0x1000,
    "text": "translates to a block of another",
}
ROOT = {"format": "vtd", "segment": 0, "physical": BASE, "register": "RTADDR", "entries": 256}
DOMAIN = {
    **{"name": "dom-0", "ino": 16, "format": "amd", "levels": 4, "aperture": 1 << 48, "reserved": [], "id": 8},
    **{"leaf": 1 << 30, "root": None, "size": 2 * MiB, "tables": 1, "stale": 0, "mappings": [], "devices": []},
}
ANSWERS: dict[str, dict[str, Any]] = {
    "iommu-map": {**{"iova": 0, "length": 4096, "ino": 20, "offset": 8192, "access": "wo", "entries": 0}, "stale": []},
    "iommu-audit": {"devices": 1, "domains": 1, "mappings": 2, "tables": 5, "bytes": 4096, "problems": [PROBLEM]},
    "iommu-invalidations": {"stale": PENDING, "token": 77, "freed": 0},
    "iommu-list": {"phys_base": BASE, "domains": [DOMAIN], "roots": [ROOT], "damaged": [], "stale": PENDING},
}


def test_map_asks_as_the_protocol_has_it(site: Site, dom: Path, questions: list[dict[str, Any]]) -> None:
    arguments = ["iommu", "map", str(dom), "0x1B000", str(site.mnt / "rom"), "--offset", "8K", "--wo", "--live-update"]
    for _ in range(2):
        assert pkernfs(arguments) == 0
    requests = [question.pop("key") for question in questions]
    assert questions[0] == questions[1]
    assert questions[0] == {
        "verb": "iommu-map",
        "version": 1,
        "ino": dom.stat().st_ino,
        "iova": 0x1B000,
        "file_ino": (site.mnt / "rom").stat().st_ino,
        "offset": 8192,
        "length": 0,
        "access": "wo",
        "live_update": True,
    }
    assert requests[0] != requests[1]
    assert all(0 < request < 1 << 64 for request in requests)


@pytest.mark.usefixtures("questions")
def test_audit_with_problems(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert pkernfs(["iommu", "audit", str(site.mnt)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "foreign: dom\\x1b, IOVA 0x1000: translates to a block of another",
        f"{site.mnt}: 1 device, 1 domain, 2 mappings, 5 tables, 4 KiB of translations audited: 1 problem",
    ]
    assert pkernfs(["iommu", "audit", str(site.mnt), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == ANSWERS["iommu-audit"]


@pytest.mark.usefixtures("questions")
def test_what_a_driver_queues(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert pkernfs(["iommu", "invalidations", str(site.mnt)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "device 0001:3b:00.1: its context has changed",
        "  VT-d: context-cache invalidation, device-selective: source id 0x3b01 of segment 0x1, function mask 0,"
        " domain id 7",
        "  VT-d: IOTLB invalidation, domain-selective: domain id 7",
        "domain id 7: 0x3000 to 0x4fff (8 KiB)",
        "  VT-d: IOTLB invalidation, page-selective within domain: domain id 7, address 0x0, address mask 3,"
        " invalidation hint 0",
        "domain id 8: all translations",
        "  AMD: INVALIDATE_IOMMU_PAGES: domain id 8, address 0x7ffffffffffff000, S=1, PDE=1 (all)",
        "where an address mask is above the unit's CAP.MAMV: domain-selective instead",
        f"then: pkernfs iommu invalidations {site.mnt} --ack 77",
    ]


@pytest.mark.parametrize(
    ("new", "old", "sent"),
    [
        ([], [], None),
        (["--ack", "all"], ["--done"], 0),
        (["--ack", "77"], ["--done", "--token", "77"], 77),
    ],
    ids=["look", "all", "token"],
)
def test_acknowledge(
    site: Site,
    questions: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    new: list[str],
    old: list[str],
    sent: int | None,
) -> None:
    """The command's old name and options do the same for one release, and no help lists them."""
    printed = []
    for arguments in (["invalidations", *new], ["iotlb-needed", *old]):
        questions.clear()
        assert pkernfs(["iommu", *arguments, str(site.mnt), "--json"]) == 0
        printed.append(capsys.readouterr().out)
        (question,) = questions
        assert question["acknowledge"] == sent
    assert printed[0] == printed[1]
    assert "iotlb-needed" not in says("--help")
    assert "deprecated" in says("invalidations", "--help")


@pytest.mark.parametrize(
    ("iova", "pages", "amd"),
    [
        (0x5000, 1, "address 0x5000, S=0"),
        (0x6000, 2, "address 0x6000, S=1"),
        (0x4000, 4, "address 0x5000, S=1"),
        (0x200000, 512, "address 0x2ff000, S=1"),
        (0x7000, 2, "address 0x7000, S=1"),
    ],
)
def test_the_range_of_an_invalidation(iova: int, pages: int, amd: str) -> None:
    """Covers what is pending, is aligned to its size, could not be half of it; AMD: the lowest zero tells the size."""
    length = pages * PAGE
    address, order = covering(iova, length)
    size = PAGE << order
    assert address % size == 0
    assert address <= iova < iova + length <= address + size
    assert order == 0 or iova // (size // 2) != (iova + length - 1) // (size // 2)
    pending = Invalidation(kind="iotlb", id=3, device=None, iova=iova, length=length)
    (command,) = commands("amd", pending)
    assert amd in command
    coded = int(command.split("address ")[1].split(",")[0], 16)
    if order:
        lowest = next(bit for bit in range(12, 64) if not coded >> bit & 1)
        assert 1 << (lowest + 1) == size


def test_names_that_the_kernel_has_looked_up(site: Site) -> None:
    """It keeps names for a day, also those that were not there."""
    folder = site.mnt / "iommu"
    for n in range(3):
        path = folder / f"dom-{n}"
        assert not path.exists()
        assert folder.stat().st_size == (3 + n) * 20
        says("create", path)
        assert path.stat().st_size == 2 * MiB
        assert folder.stat().st_size == (4 + n) * 20
    says("destroy", folder / "dom-1")
    assert not (folder / "dom-1").exists()
    assert sorted(os.listdir(folder)) == ["dom-0", "dom-2", "root-pgtables"]
    (folder / "dom-1").touch()
    assert (folder / "dom-1").stat().st_size == 0


def test_create_is_about_the_directory(site: Site) -> None:
    assert (site.mnt / "iommu").stat().st_ino == IOMMU_INO
    facts = told("create", site.mnt / "iommu" / "five", "--levels", "5")
    assert (facts["name"], facts["levels"], facts["format"]) == ("five", 5, "vtd")
    facts = told("create", f"{site.mnt}/iommu/amd/", "--format", "amd")
    assert (facts["name"], facts["levels"], facts["format"]) == ("amd", 4, "amd")
