"""fsck.pkernfs: check a region, and repair it with -y, -p, or when somebody at the terminal says so."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.cli.parsers import Parser, add_version

if TYPE_CHECKING:
    from pkernfs.fsck.check import Checker, Problem, Progress
    from pkernfs.fsck.repair import Repair
    from pkernfs.region import FileRegion

DESCRIPTION = """\
Check a pkernfs region: every structure, and that they agree.  Prints one line for each problem.

With -y or -p problems are repaired: a superblock is restored from its copy, what cannot be read is taken out, counts
are made right, memory that nobody owns is freed, and files that lost their names get one in /lost+found.  Files that
are sound are not touched.  A repair that was interrupted is continued by the next one.  A transaction that a crash
left in the journal is replayed, with -n in memory only.  Without -n, -y and -p it asks on a terminal, and only
looks elsewhere.

A region that is in use is refused, unless -n is given: what changes meanwhile may then seem damaged.
"""
EPILOG = """\
exit status, as fsck(8) has it; they add up:
  0  clean                    1  problems were corrected, or the journal was replayed
  4  problems were left       8  it could not be checked: no region, or in use
  16  wrong usage            32  cancelled by SIGINT or SIGTERM: what was repaired so far is whole

--json prints one object, where the region could be checked:
  region, exit, clean         the region's real path, the exit status, whether nothing is left
  replayed                    records of the journal that were replayed for good
  files, directories          how many there are; null where the region could not be opened before a repair
  problems                    what was found: checker and invariant (its name, what does not hold), text, ino, path,
                              offset, block (null where there is none), state: found (with -n), repaired or left
  repaired                    what was done: code, text, ino, path, offset, block
  left                        what the last check found, as problems
  warnings                    strings
"""
CORRECTED, LEFT, FAILED, USAGE, CANCELLED = 1, 4, 8, 16, 32


class FsckParser(Parser):
    """Wrong usage is 16 here."""

    usage_exit = USAGE


def _descriptor(word: str) -> int:
    """An open file descriptor.  For argparse."""
    try:
        os.fstat(int(word))
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(f"expected an open file descriptor, found {word!r}") from None
    return int(word)


class Outcome(NamedTuple):
    """What one run found."""

    problems: list[Problem]  #: what the first check found
    left: list[Problem]  #: what is there at the end
    repairs: list[Repair]
    checker: Checker | None  #: None: the volume could not be opened
    records: int  #: records of the journal that were replayed
    stored: bool  #: they are in the region now, not in memory only
    warnings: list[str]
    paths: dict[int, str]  #: of the inodes concerned, where they have one
    shown: bool = False  #: the problems were, with the question

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
    made.add_argument("-v", "--verbose", action="store_true", help="say how much there is of everything")
    made.add_argument(
        "-C", type=_descriptor, metavar="FD", help='write "PASS DONE TOTAL REGION" lines to this descriptor; 0: do not'
    )
    made.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``fsck.pkernfs``; its exit code."""
    arguments = parser().parse_args(argv)
    from pkernfs.cli.fsck_report import report
    from pkernfs.errors import PkernfsError

    try:
        outcome = _run(arguments)
    except PkernfsError as error:
        print(f"fsck.pkernfs: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("fsck.pkernfs: cancelled: what was repaired so far is whole; run it again", file=sys.stderr)
        return CANCELLED
    report(arguments, outcome)
    return outcome.code


def _run(arguments: argparse.Namespace) -> Outcome:
    """Open, check, perhaps repair.  A clean region is not opened for writing.  Raises PkernfsError."""
    from pkernfs.errors import RegionBusyError
    from pkernfs.fsck.check import check_region
    from pkernfs.fsck.tables import check_tables
    from pkernfs.region import open_region

    told = arguments.no or arguments.yes or arguments.auto
    ask = not told and not arguments.json and sys.stdin.isatty() and sys.stdout.isatty()
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
        with _progress(arguments) as tell:
            problems, checker = check_region(region, progress=tell)
        if checker and not problems:
            problems = check_tables(region)
        paths = _paths(checker, {problem.ino for problem in problems})
    found = Outcome(problems, problems, [], checker, records, False, warnings, paths)
    if not (records or problems) or not (ask or arguments.yes or arguments.auto):
        return found
    if ask and problems:
        agreed = _agreed(arguments.region, found)
        found = found._replace(shown=True)
        if not agreed:
            return found
    return _repaired(arguments, found)


def _repaired(arguments: argparse.Namespace, found: Outcome) -> Outcome:
    from pkernfs.fsck.repair import finish_transaction, repair_region
    from pkernfs.fsck.tables import check_tables, mend_tables
    from pkernfs.region import open_region

    with open_region(arguments.region) as region:
        try:
            with _progress(arguments) as tell:
                done = repair_region(region, progress=tell)
            if not done.left and check_tables(region):
                done = done._replace(repairs=done.repairs + mend_tables(region), left=check_tables(region))
        except KeyboardInterrupt:
            finish_transaction(region)
            raise
        concerned = {problem.ino for problem in (*done.found, *done.left)} | {repair.ino for repair in done.repairs}
        paths = found.paths | _paths(done.checker, concerned)
    # A region that could not be opened has shown one problem only, until its metadata was mended.
    problems = found.problems if found.checker else found.problems + done.found
    return found._replace(
        problems=problems,
        left=done.left,
        repairs=done.repairs,
        checker=done.checker,
        records=done.records,
        stored=True,
        paths=paths,
    )


def _agreed(region: str, found: Outcome) -> bool:
    """Show what was found, and ask."""
    from pkernfs.cli.fsck_report import count, lines

    for line in lines(region, found.problems, found.paths):
        print(line)
    try:
        return input(f"{region}: {count(found.problems, 'problem')} found: repair (y/N)? ").lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _paths(checker: Checker | None, inos: set[int]) -> dict[int, str]:
    from pkernfs.fs.paths import a_path_of

    return a_path_of(checker.volume, inos - {0}) if checker and inos - {0} else {}


@contextmanager
def _progress(arguments: argparse.Namespace) -> Iterator[Callable[[Progress], None] | None]:
    """What to tell how far it is: a bar on a terminal, and the descriptor of -C; None: nobody wants to know."""
    from pkernfs.cli.progress import bar

    with bar(quiet=arguments.json) as advance:

        def tell(at: Progress) -> None:
            if advance:
                advance(at.name, at.done, at.total)
            if arguments.C:
                with suppress(OSError):  # nobody reads any more
                    os.write(arguments.C, f"{at.number} {at.done} {at.total} {arguments.region}\n".encode())

        yield tell if advance or arguments.C else None


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
