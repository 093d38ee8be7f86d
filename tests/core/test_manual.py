"""The manual: every option of every command stands in its page, the pages are clean, and completion completes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs import format, options
from pkernfs.cli import iommu
from pkernfs.cli.main import VERBS
from pkernfs.cli.manual.__main__ import files, write
from pkernfs.cli.manual.commands import PAGES, Page
from pkernfs.cli.manual.roff import prose
from pkernfs.cli.parsers import Parser
from pkernfs.layout import Layout

CHECKOUT = Path(__file__).resolve().parents[2]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
#: What each page has, as man-pages(7) wants it.
SECTIONS = {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "FILES", "NOTES", "EXAMPLES", "SEE ALSO"}


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, in files."""
    directory = tmp_path_factory.mktemp("share")
    write(directory)
    return directory


def plain(text: str) -> str:
    """What a reader sees of roff that the pages use."""
    text = re.sub(r"\\f[BIR]|\\[,/&]", "", text)
    for written, shown in ((r"\-", "-"), (r"\(ha", "^"), (r"\(ti", "~"), (r"\(aq", "'"), (r"\ ", " "), (r"\e", "\\")):
        text = text.replace(written, shown)
    return text


def headings(text: str) -> list[str]:
    """The sections of a page, in their order."""
    return re.findall(r"^\.SH (.*)$", text, re.MULTILINE)


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser, and those of its verbs; what stands in a page of its own is left out."""
    yield parser
    for verb in parser.verbs.values():
        verb.load()
        if not verb.verbs:
            yield from parsers(verb)


def test_each_command_has_a_page() -> None:
    made = files()
    assert {page.name for page in PAGES} == {
        "pkernfs",
        "pkernfs-iommu",
        "mkfs.pkernfs",
        "mount.pkernfs",
        "fsck.pkernfs",
    }
    assert {f"man/man{page.section}/{page.name}.{page.section}" for page in PAGES} | {"man/man5/pkernfs.5"} == {
        path for path in made if path.startswith("man/")
    }


@EACH_PAGE
def test_every_option_is_in_the_page(page: Page, manual: Path) -> None:
    """With what stands for its value and its help; the verbs too, those that are not listed as well."""
    text = plain((manual / f"man/man{page.section}/{page.name}.{page.section}").read_text())
    read = " ".join(text.split())
    for parser in parsers(page.parser()):
        assert parser.prog in read
        for action in parser.arguments():
            if parser.prog.count(" ") > page.name.count("-") and "--help" in action.option_strings:
                continue  # once a page
            for option in action.option_strings:
                assert re.search(rf"^{re.escape(option)}\b|, {re.escape(option)}\b", text, re.MULTILINE), option
            assert action.help, f"{parser.prog}: {action.dest} is not explained"
            assert " ".join((action.help % {"prog": parser.prog}).split()) in read, action.dest


def test_every_verb_is_in_a_page(manual: Path) -> None:
    for name, listed in (("pkernfs.1", VERBS), ("pkernfs-iommu.1", {**iommu.LISTED, **iommu.DEPRECATED})):
        found = re.findall(r"^\.SS (.*)$", plain((manual / "man/man1" / name).read_text()), re.MULTILINE)
        assert found == list(listed)
    assert "Deprecated" in (manual / "man/man1/pkernfs-iommu.1").read_text()


def test_every_mount_option_is_in_the_page(manual: Path) -> None:
    """And in the help, and is accepted as it stands there; each word has one meaning."""
    text = plain((manual / "man/man8/mount.pkernfs.8").read_text())
    lines = text.splitlines()
    described = dict(options.descriptions())
    for forms, meaning in described.items():
        assert forms in lines
        assert meaning in " ".join(text.split()) or " ".join(meaning.split()) in " ".join(text.split())
    arguments = [form for forms in described for form in forms.split(", ")]
    assert len(arguments) == len(set(arguments))
    assert {form.partition("=")[0] for form in arguments if "=" in form} == {
        "uid",
        "gid",
        "mode",
        "log",
        "hang",
        "metrics",
    }
    options.parse_options([word for word in arguments if "=" not in word])


@EACH_PAGE
def test_sections(page: Page, manual: Path) -> None:
    found = headings((manual / f"man/man{page.section}/{page.name}.{page.section}").read_text())
    assert not SECTIONS - set(found)
    assert len(found) == len(set(found))
    assert (found[:4], found[-1]) == (["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"], "SEE ALSO")


def test_the_format_is_in_its_page(manual: Path) -> None:
    """Each record with each of its fields, and each number that the text names."""
    text = plain((manual / "man/man5/pkernfs.5").read_text())
    for layout in vars(format).values():
        if isinstance(layout, Layout):
            record = text[text.index(f".SS {layout.record.__name__}, {layout.size} bytes\n") :].split("\n.S")[0]
            for name, offset in layout.offsets.items():
                assert name.startswith("reserved") or re.search(rf"^{offset} +[ui\w]+ +{name}$", record, re.MULTILINE)
    for name in ("MAGIC", "NODE_MAGIC", "BLOCK_SLAB", "INLINE_EXTENTS", "DOMAIN_KEY"):
        assert re.search(rf"^{name}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments", [["groff", "-ww", "-t", "-man", "-Tutf8", "-z"], ["mandoc", "-Tlint"]], ids=lambda w: w[0]
)
def test_no_warnings(arguments: list[str], manual: Path) -> None:
    if shutil.which(arguments[0]) is None:
        pytest.skip(f"no {arguments[0]}: apt-get install {arguments[0]}")
    for path in sorted(manual.glob("man/*/*")):
        done = subprocess.run([*arguments, path], capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_text_to_roff() -> None:
    assert prose("One `word`, see mount(8) and a\\b.\n.dot") == [
        ".PP",
        r"One \fBword\fR, see \fBmount\fR(8) and a\eb. .dot",
    ]
    assert prose("'quoted'") == [".PP", r"\&'quoted'"]
    assert prose("text\n\n  cmd --x 'y'\n  .z") == [
        *(".PP", "text", ".PP", ".in +4n", ".EX", r"cmd \-\-x \(aqy\(aq", r"\&.z", ".EE", ".in"),
    ]
    assert prose("term\n    what it\n    means") == [".TP", "term", "what it means"]
    wide = "  a    " + "x" * 40 + "\n  b c  y\n       " + "z" * 80
    assert prose(wide) == [".TP", "a", "x" * 40, ".TP", "b c", "y", "z" * 80]
    assert prose("exit status:\n  0  fine          1  not") == [
        *(".PP", "Exit status:", ".TP", r"\fB0\fR", "fine", ".TP", r"\fB1\fR", "not"),
    ]


def offers(manual: Path, *arguments: str) -> list[str]:
    """What bash completes the last word to."""
    script = r"""
        set -u; . "$1/bash-completion/completions/$2"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
        how=$(complete -p "$1"); how=${how##*-F }
        "${how%% *}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", manual, *arguments],
        cwd=manual,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash(manual: Path) -> None:
    assert offers(manual, "pkernfs", "") == list(VERBS)
    assert offers(manual, "pkernfs", "iommu", "") == list(iommu.LISTED)
    assert offers(manual, "pkernfs", "iommu", "invalidations", "--a") == ["--ack"]
    assert sorted(offers(manual, "pkernfs", "info", "")) == sorted(path.name for path in manual.iterdir())
    assert offers(manual, "mount.pkernfs", "-o", "ro,hang=5,wri") == ["ro,hang=5,writeback"]
    assert "--phys-base" in offers(manual, "mkfs.pkernfs", "--")
    assert "--json" in offers(manual, "fsck.pkernfs", "--")


def test_zsh(manual: Path) -> None:
    scripts = sorted(manual.glob("zsh/site-functions/_*"))
    assert [path.read_text().splitlines()[0] for path in scripts] == [f"#compdef {path.name[1:]}" for path in scripts]
    if shutil.which("zsh") is None:
        pytest.skip("no zsh: its scripts were not parsed")
    for path in scripts:
        subprocess.run(["zsh", "-n", path], timeout=60, check=True)


def test_what_is_installed_is_what_is_made() -> None:
    """The scripts that install and uninstall have a link for every file, and for every command."""
    script = f"""
        set -eu; PREFIX=/opt/some; . "{CHECKOUT}/mount_helpers/lib.sh"
        for link in "${{LINKS[@]}}"; do echo "$link $(target_of "$link")"; done
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    links = dict(line.split() for line in done.stdout.splitlines())
    assert links == {f"/opt/some/share/{name}": f"/opt/some/lib/pkernfs/share/{name}" for name in files()} | {
        "/opt/some/bin/pkernfs": "/opt/some/lib/pkernfs/venv/bin/pkernfs",
        "/sbin/mkfs.pkernfs": "/opt/some/lib/pkernfs/venv/bin/mkfs.pkernfs",
        "/sbin/fsck.pkernfs": "/opt/some/lib/pkernfs/venv/bin/fsck.pkernfs",
        "/sbin/mount.pkernfs": "/opt/some/lib/pkernfs/venv/bin/mount.pkernfs",
        "/sbin/mount.fuse.pkernfs": "/opt/some/lib/pkernfs/venv/bin/mount.pkernfs",
    }


def test_lazy_parsers_are_complete() -> None:
    """What the help lists of a verb that was not asked for is there when it is."""
    parser: Parser = PAGES[3].parser()
    assert parser.prog == "pkernfs"
    assert list(parser.verbs) == list(VERBS)
    for verb in parsers(parser):
        assert verb.description
