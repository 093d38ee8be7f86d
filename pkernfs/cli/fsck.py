"""fsck.pkernfs: check a region.  Reads only, but for a journal that -y or -p may replay."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.cli.words import Parser, add_version

if TYPE_CHECKING:
    from pkernfs.fs.check import Checker, Problem
    from pkernfs.region import FileRegion

DESCRIPTION = """\
Check a pkernfs region: every structure, and that they agree.  Prints one line for each problem.

A region that is in use is refused, unless -n is given: what changes meanwhile may then seem damaged.  Problems are
found but not repaired yet; a transaction that a crash left in the journal is replayed with -y or -p, else in memory
only.
"""
EPILOG = """\
exit status, as fsck(8) has it; they add up:
  0  clean                    1  the journal was replayed                 4  problems were left
  8  it could not be checked: no region, in use, cannot be read          16  wrong usage
"""
CORRECTED, LEFT, FAILED, USAGE = 1, 4, 8, 16


class FsckParser(Parser):
    """Wrong usage is 16 here."""

    usage_exit = USAGE


class Outcome(NamedTuple):
    """What one run found."""

    problems: list[Problem]
    checker: Checker | None  #: None: the volume could not be opened
    records: int  #: records of the journal that were replayed
    stored: bool  #: they are in the region now, not in memory only
    warnings: list[str]

    @property
    def code(self) -> int:
        """The exit code."""
        return CORRECTED * bool(self.records and self.stored) | LEFT * bool(self.problems)


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
    """Open, perhaps replay, check.  Raises PkernfsError."""
    from pkernfs.errors import RegionBusyError
    from pkernfs.fs.check import check_region
    from pkernfs.region import open_region

    warnings = []
    try:
        opened = open_region(arguments.region, readonly=True)
    except RegionBusyError as error:
        if not arguments.no:
            raise RegionBusyError(error.text, hint="unmount it, or look only with -n") from None
        warnings.append(f"{error.text}: what changes meanwhile may seem damaged")
        opened = open_region(arguments.region, readonly=True, locked=False)
    with opened as region:
        records = _waiting(region)
        if not records or not (arguments.yes or arguments.auto):
            problems, checker = check_region(region)
            return Outcome(problems, checker, records, False, warnings)
    with open_region(arguments.region) as region:
        problems, checker = check_region(region)
        region.flush()
        return Outcome(problems, checker, records if checker else 0, True, warnings)


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
    problems, checker = outcome.problems, outcome.checker
    if arguments.json:
        found = {
            "region": os.path.realpath(name),
            "exit": outcome.code,
            "clean": not problems,
            "replayed": outcome.records if outcome.stored else 0,
            "files": checker.files if checker else None,
            "directories": checker.directories if checker else None,
            "warnings": outcome.warnings,
            "problems": [problem._asdict() for problem in problems],
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
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        print(f"{name}: {count} found; this version finds problems and cannot repair them yet")
    elif checker:
        print(f"{name}: clean, {checker.files} files, {checker.directories} directories{_space(checker)}")


def _space(checker: Checker) -> str:
    volume = checker.volume
    blocks, first = volume.allocator.blocks, volume.allocator.first_block
    return f", {blocks - first - volume.allocator.free_blocks} of {blocks - first} blocks in use"
