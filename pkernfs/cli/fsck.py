"""fsck.pkernfs: check a region, and repair it with -y or -p.  Without these it only reads."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.cli.words import Parser, add_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkernfs.fs.check import Checker, Problem
    from pkernfs.fs.repair.work import Repair
    from pkernfs.region import FileRegion

DESCRIPTION = """\
Check a pkernfs region: every structure, and that they agree.  Prints one line for each problem.

With -y or -p problems are repaired: a superblock is restored from its copy, what cannot be read is taken out, counts
are made right, memory that nobody owns is freed, and files that lost their names get one in /lost+found.  Files that
are sound are not touched.  A repair that was interrupted is continued by the next one.  A transaction that a crash
left in the journal is replayed with -y or -p, else in memory only.

A region that is in use is refused, unless -n is given: what changes meanwhile may then seem damaged.
"""
EPILOG = """\
exit status, as fsck(8) has it; they add up:
  0  clean                    1  problems were corrected, or the journal was replayed
  4  problems were left (without -y and -p: all)
  8  it could not be checked: no region, in use, cannot be read          16  wrong usage
"""
CORRECTED, LEFT, FAILED, USAGE = 1, 4, 8, 16


class FsckParser(Parser):
    """Wrong usage is 16 here."""

    usage_exit = USAGE


class Outcome(NamedTuple):
    """What one run found."""

    problems: list[Problem]  #: what the first check found
    left: list[Problem]  #: what is there at the end
    repairs: list[Repair]
    checker: Checker | None  #: None: the volume could not be opened
    records: int  #: records of the journal that were replayed
    stored: bool  #: they are in the region now, not in memory only
    warnings: list[str]

    @property
    def code(self) -> int:
        """The exit code."""
        return CORRECTED * bool(self.repairs or (self.records and self.stored)) | LEFT * bool(self.left)


def parser() -> Parser:
    """The parser of fsck.pkernfs."""
    made = FsckParser(prog="fsck.pkernfs", description=DESCRIPTION, epilog=EPILOG)
    add_version(made)
    made.add_argument("region", metavar="REGION", help="file or device")
    answer = made.add_mutually_exclusive_group()
    answer.add_argument("-n", "--no", action="store_true", help="change nothing; check a region that is in use, too")
    answer.add_argument("-y", "--yes", action="store_true", help="correct what can be corrected")
    answer.add_argument("-p", "-a", "--auto", action="store_true", help="the same, as fsck(8) wants it at boot")
    made.add_argument("-f", "--force", action="store_true", help="accepted: every check is a full one")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``fsck.pkernfs``; its exit code."""
    arguments = parser().parse_args(argv)
    from pkernfs.errors import PkernfsError

    try:
        outcome = _run(arguments)
    except PkernfsError as error:
        print(f"fsck.pkernfs: {error}", file=sys.stderr)
        return FAILED
    _report(arguments, outcome)
    return outcome.code


def _run(arguments: argparse.Namespace) -> Outcome:
    """Open, check, perhaps repair.  A clean region is not opened for writing.  Raises PkernfsError."""
    from pkernfs.errors import RegionBusyError
    from pkernfs.fs.check import check_region
    from pkernfs.fs.repair import repair_region
    from pkernfs.region import open_region

    warnings = []
    try:
        opened = open_region(arguments.region, readonly=True)
    except RegionBusyError as error:
        if not arguments.no:
            raise RegionBusyError(error.text, hint="unmount it, or look only with -n") from None
        warnings.append(f"{error.text}: what changes meanwhile may seem damaged")
        opened = open_region(arguments.region, readonly=True, locked=False)
    with _progress(arguments) as tell:
        with opened as region:
            records = _waiting(region)
            problems, checker = check_region(region, progress=tell)
            if not (arguments.yes or arguments.auto) or not (records or problems):
                return Outcome(problems, problems, [], checker, records, False, warnings)
        with open_region(arguments.region) as region:
            done = repair_region(region, progress=tell)
        return Outcome(problems, done.left, done.repairs, done.checker, done.records, True, warnings)


@contextmanager
def _progress(arguments: argparse.Namespace) -> Iterator[Callable[[str], None] | None]:
    """A line that says what is done now, while it lasts; None: no terminal to show it on."""
    if arguments.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("open") as status:
        yield status.update


def _waiting(region: FileRegion) -> int:
    """How many records of the journal wait to be applied; 0 also when that cannot be told: the check says why."""
    from pkernfs.errors import PkernfsError
    from pkernfs.fs.journal import Journal
    from pkernfs.region import read_superblock

    try:
        journal = Journal(region, read_superblock(region, readonly=True))
        seal = region.word(journal.header_at)
        return len(list(journal.records(seal >> 1))) if seal & 1 else 0
    except PkernfsError:
        return 0


def _report(arguments: argparse.Namespace, outcome: Outcome) -> None:
    name = arguments.region
    problems, left, checker = outcome.problems, outcome.left, outcome.checker
    if arguments.json:
        found = {
            "region": os.path.realpath(name),
            "exit": outcome.code,
            "clean": not left,
            "replayed": outcome.records if outcome.stored else 0,
            "files": checker.files if checker else None,
            "directories": checker.directories if checker else None,
            "warnings": outcome.warnings,
            "problems": [problem._asdict() for problem in problems],
            "repaired": [repair._asdict() for repair in outcome.repairs],
            "left": [problem._asdict() for problem in left],
        }
        print(json.dumps(found, indent=2))
        return
    for warning in outcome.warnings:
        print(f"fsck.pkernfs: warning: {warning}", file=sys.stderr)
    if outcome.records:
        where = "replayed" if outcome.stored else "replayed in memory only, the next mount (or -y) does it for good"
        print(f"{name}: the journal held an unfinished transaction of {outcome.records} records: {where}")
    for problem in problems:
        print(f"{name}: {problem.code}: {problem.text}")
    for repair in outcome.repairs:
        print(f"{name}: repaired: {repair.text}")
    if outcome.stored and left and left != problems:
        for problem in left:
            print(f"{name}: left: {problem.code}: {problem.text}")
    if problems:
        count = _count(problems, "problem")
        if outcome.stored:
            print(f"{name}: {count} found, {_count(outcome.repairs, 'repair')} made, {_count(left, 'problem')} left")
        else:
            print(f"{name}: {count} found; -y repairs what can be repaired")
    elif checker:
        print(f"{name}: clean, {checker.files} files, {checker.directories} directories{_space(checker)}")


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}" + "s" * (len(items) != 1)


def _space(checker: Checker) -> str:
    volume = checker.volume
    blocks, first = volume.allocator.blocks, volume.allocator.first_block
    return f", {blocks - first - volume.allocator.free_blocks} of {blocks - first} blocks in use"
