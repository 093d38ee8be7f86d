"""fsck.pkernfs: its output and its exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkernfs.cli.fsck import main
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fsck.check import Check
from pkernfs.fsck.problems import PROBLEMS, Code
from pkernfs.fsck.run import Result, fsck
from pkernfs.iommu.audit import Audit, audit
from pkernfs.region import open_region, read_superblock
from tests.core.support import MiB, digest, mkfile, open_fs, patch_inode, sparse_file

OPTIONS = [["-n"], ["-y"], ["-p"], ["-a"], ["-f", "-n"], ["-f", "-y"]]
Capture = pytest.CaptureFixture[str]


def damage(path: str) -> int:
    """One wrong count; the inode that has it."""
    with open_region(path) as region:
        fs = open_fs(region)
        ino = fs.resolve(b"f")
        patch_inode(fs, ino, pages=99)
    return ino


def commit_again(path: str) -> None:
    """Leave a transaction that is committed and not applied: the creation of "late"."""
    with open_region(path) as region:
        fs = open_fs(region)
        journal = fs.volume.journal
        applied: list[tuple[int, bytes]] = []
        real = region.store

        def store(offset: int, data: bytes | bytearray | memoryview) -> None:
            if offset in (journal.body_at, journal.header_at + 8):
                real(offset, data)
            else:
                applied.append((offset, bytes(data)))

        region.store = store  # type: ignore[method-assign]
        mkfile(fs, b"late")
        assert applied
        region.store_word(journal.header_at, 2 * journal.sequence + 1)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_clean_region(made: str, options: list[str], capsys: Capture) -> None:
    before = digest(made)
    assert main([*options, made]) == 0
    out, err = capsys.readouterr()
    assert out == f"{made}: clean, 2 files, 2 directories, 1 of 14 blocks in use\n"
    assert err == ""
    assert digest(made) == before


@pytest.mark.parametrize("options", [["-n"], ["-f", "-n"]], ids=" ".join)
def test_a_problem_is_left(made: str, options: list[str], capsys: Capture) -> None:
    ino = damage(made)
    before = digest(made)
    assert main([*options, made]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{made}: inode-pages: inode {ino}: ")
    assert lines[0].endswith(": expected 1 pages, found a count of 99 (/f)")
    assert lines[1] == f"{made}: 1 problem found; -y repairs what can be repaired"
    assert digest(made) == before


@pytest.mark.parametrize("options", [["-y"], ["-p"], ["-a"], ["-f", "-y"]], ids=" ".join)
def test_a_problem_is_repaired(made: str, options: list[str], capsys: Capture) -> None:
    ino = damage(made)
    assert main([*options, made]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{made}: inode-pages: inode {ino}: ")
    assert lines[1].startswith(f"{made}: repaired: inode {ino}: ")
    assert lines[1].endswith(": set pages 1 (/f)")
    assert lines[2] == f"{made}: 1 problem found, 1 repair made, 0 problems left"
    after = digest(made)
    assert main([*options, made]) == 0
    assert digest(made) == after


@pytest.mark.parametrize("options", [["-y"], ["-p"]], ids=" ".join)
def test_the_journal_is_replayed(made: str, options: list[str], capsys: Capture) -> None:
    commit_again(made)
    assert main([*options, made]) == 1
    assert "the journal held an unfinished transaction of" in capsys.readouterr().out
    assert main([*options, made]) == 0
    with open_region(made) as region:
        fs = open_fs(region)
        assert not fs.volume.recovered
        assert fs.resolve(b"late")


def test_the_journal_is_replayed_in_memory_only(made: str, capsys: Capture) -> None:
    commit_again(made)
    before = digest(made)
    assert main(["-n", made]) == 0
    out = capsys.readouterr().out
    assert "replayed in memory only" in out
    assert ": clean, 3 files" in out
    assert digest(made) == before


def test_replayed_and_repaired(made: str, capsys: Capture) -> None:
    damage(made)
    commit_again(made)
    assert main(["-y", "--json", made]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["replayed"] > 0
    assert [repair["text"].endswith(": set pages 1") for repair in found["repaired"]] == [True]
    assert found["left"] == []
    assert main(["-n", made]) == 0


def test_a_damaged_journal(made: str, capsys: Capture) -> None:
    commit_again(made)
    with open_region(made) as region:
        at = read_superblock(region).journal_offset + 2 * 4096
        region.store(at, b"damage")
    before = digest(made)
    assert main(["-n", made]) == 4
    assert capsys.readouterr().out.startswith(f"{made}: journal: the journal")
    assert digest(made) == before
    assert main(["-y", made]) == 1
    assert "repaired: dropped a transaction that cannot be trusted (the journal: " in capsys.readouterr().out
    assert main(["-n", made]) == 0


def test_a_damaged_superblock(made: str, capsys: Capture) -> None:
    """What else is wrong is found when it has been restored."""
    damage(made)
    with open_region(made) as region:
        region.store(100, b"damage")
    assert main(["-n", made]) == 4
    out = capsys.readouterr().out
    assert out.startswith(f"{made}: superblock: superblock checksum: expected ")
    assert "the copy at 0x200000 is sound" in out
    assert main(["-y", "--json", made]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [problem["checker"] for problem in found["problems"]] == ["superblock", "inode-pages"]
    assert main(["-n", made]) == 0


def test_json(made: str, capsys: Capture) -> None:
    assert main(["-n", "--json", made]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "region": os.path.realpath(made),
        "exit": 0,
        "clean": True,
        "replayed": 0,
        "files": 2,
        "directories": 2,
        "warnings": [],
        "problems": [],
        "repaired": [],
        "left": [],
    }
    damage(made)
    assert main(["-n", "--json", made]) == 4
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["text"].endswith(": expected 1 pages, found a count of 99")
    with open_region(made, readonly=True) as region:
        ino = open_fs(region).resolve(b"f")
    assert problem == {
        "checker": "inode-pages",
        "invariant": PROBLEMS[Code.INODE_PAGES].statement,
        "text": problem["text"],
        "ino": ino,
        "path": "/f",
        "offset": None,
        "block": None,
        "state": "found",
    }
    assert main(["-y", "--json", made]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [problem | {"state": "repaired"}]
    assert [(repair["ino"], repair["path"]) for repair in found["repaired"]] == [(ino, "/f")]


class Counts:
    """How often everything was checked, and how often the page tables were audited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checks = self.audits = 0

        def counted_check(*args: Any, **options: Any) -> Check:
            self.checks += 1
            return Check(*args, **options)

        def counted_audit(fs: Filesystem) -> Audit:
            self.audits += 1
            return audit(fs)

        monkeypatch.setattr("pkernfs.fsck.check.run.Check", counted_check)
        monkeypatch.setattr("pkernfs.fsck.check.tables.audit", counted_audit)

    def of(self, *words: str) -> tuple[int, int]:
        """Checks and audits of one run."""
        self.checks = self.audits = 0
        main(words)
        return self.checks, self.audits


def test_a_check_before_and_a_check_after(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is the first round's, too; page tables are audited where nothing else was found."""
    counts = Counts(monkeypatch)
    assert counts.of("-y", made) == (1, 1)
    damage(made)
    assert counts.of("-n", made) == (1, 0)
    assert counts.of("-y", made) == (2, 1)
    assert counts.of("-n", made) == (1, 1)
    with open_region(made) as region:
        region.store(100, b"damage")
    assert counts.of("-y", made) == (2, 2), "in memory with a copy of the superblock, and then as it is"


def test_what_is_written_before_the_answer_is_checked_anew(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds the lock while somebody thinks."""
    damage(made)

    def repaired_by_another(found: Result) -> bool:
        assert [problem.code for problem in found.problems] == [Code.INODE_PAGES]
        assert main(["-y", made]) == 1
        with open_region(made) as region:
            fs = open_fs(region)
            patch_inode(fs, fs.resolve(b"f"), nlink=5)
        return True

    counts = Counts(monkeypatch)
    done = fsck(made, repaired_by_another)
    assert counts.checks == 1 + 2 + 2
    assert ([repair.code for repair in done.repairs], done.left) == ([Code.LINK_COUNT], [])
    assert main(["-n", made]) == 0


def test_a_region_in_use(made: str, hold: Callable[..., subprocess.Popen[str]], capsys: Capture) -> None:
    process = hold(made)
    for options in (["-y"], ["-p"]):
        assert main([*options, made]) == 8
        out, err = capsys.readouterr()
        assert out == ""
        assert f"the region is in use by process {process.pid}, " in err
        assert err.endswith(": unmount it, or look only with -n\n")
        assert err.count("\n") == 1
    assert main(["-n", made]) == 0
    out, err = capsys.readouterr()
    assert ": clean, " in out
    assert f"warning: {made}: the region is in use by process {process.pid}" in err
    assert main(["-n", "--json", made]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 1


def test_readers_do_not_keep_it_out(made: str, hold: Callable[..., subprocess.Popen[str]]) -> None:
    hold(made, "readonly")
    assert main(["-n", made]) == 0


def test_what_cannot_be_checked(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "region")
    sparse_file(path, 16 * MiB)
    for name, text in {
        path: "not a pkernfs region",
        f"{path}-": "no such region",
        str(tmp_path): "expected a file",
    }.items():
        assert main(["-n", name]) == 8
        out, err = capsys.readouterr()
        assert out == ""
        assert text in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [[], ["a", "b"], ["-n", "-y", "a"], ["-p", "-y", "a"], ["--what", "a"], ["-C", "77", "a"], ["-C", "x", "a"]],
    ids=" ".join,
)
def test_wrong_usage(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 16
    assert capsys.readouterr().err.startswith("fsck.pkernfs: ")


def test_the_command_starts_without_trio_and_pyfuse3(made: str) -> None:
    script = (
        "import sys; from pkernfs.cli import main_fsck; sys.argv[:1] = ['fsck.pkernfs', '-n']; code = main_fsck();"
        "assert not {'trio', 'pyfuse3', 'rich'} & set(sys.modules); raise SystemExit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, made],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ": clean, " in done.stdout


def test_the_command_is_one_line_for_an_error(tmp_path: Path) -> None:
    script = "import sys; from pkernfs.cli import main_fsck; raise SystemExit(main_fsck())"
    done = subprocess.run(
        [sys.executable, "-c", script, "-n", str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 8
    assert done.stderr.count("\n") == 1
