"""fsck.pkernfs: check a region, and repair it with -y, -p, or when somebody at the terminal says so."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from pkernfs.cli.parsers import Parser, add_version
from pkernfs.errors import printable, quoted

if TYPE_CHECKING:
    from pkernfs.cli.progress import Advance
    from pkernfs.fsck.check import Progress
    from pkernfs.fsck.run import Result

DESCRIPTION = """\
Check a pkernfs region: every structure, and that they agree.  Prints one line for each problem.

With -y or -p problems are repaired: a superblock is restored from a copy, what cannot be read is taken out, counts
are made right, memory that nobody owns is freed, and files that lost their names get one in /lost+found.  Files that
are sound are not touched.  A repair that was interrupted, also by a crash at any moment, is continued by the next one.
A transaction that a crash left in the journal is replayed, with -n in memory only.  Without -n, -y and -p it asks on a
terminal, and only looks elsewhere.

A region that is in use is refused, unless -n is given: what changes meanwhile may then seem damaged.  So is a repair
of one whose memory a process maps, as a guest on the direct map does while nothing is mounted: the error names it.
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
        raise argparse.ArgumentTypeError(f"expected an open file descriptor, found {quoted(word)}") from None
    return int(word)


def parser() -> Parser:
    """The parser of fsck.pkernfs."""
    made = FsckParser(prog="fsck.pkernfs", description=DESCRIPTION, epilog=EPILOG)
    add_version(made)
    made.add_argument("region", metavar="REGION", help="file or device")
    answer = made.add_mutually_exclusive_group()
    answer.add_argument("-n", "--no", action="store_true", help="change nothing; check a region that is in use, too")
    answer.add_argument("-y", "--yes", action="store_true", help="correct what can be corrected")
    answer.add_argument("-p", "-a", "--auto", action="store_true", help="the same, as fsck(8) wants it at boot")
    made.add_argument("--even-if-mapped", action="store_true", help="repair though processes map the region's memory")
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
    from pkernfs.fsck.run import fsck

    session = _Session(arguments)
    try:
        with session:
            result = fsck(
                arguments.region,
                session.agree,
                in_use=arguments.no,
                even_if_mapped=arguments.even_if_mapped,
                progress=session.progress,
            )
    except PkernfsError as error:
        print(f"fsck.pkernfs: {printable(str(error))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("fsck.pkernfs: cancelled: what was repaired so far is whole; run it again", file=sys.stderr)
        return CANCELLED
    code = CORRECTED * bool(result.repairs or (result.records and result.stored)) | LEFT * bool(result.left)
    report(arguments, result, code, shown=session.prompted)
    return code


class _Session:
    """Somebody who may look on, and be asked: a bar on a terminal, the descriptor of -C, and a question."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.region: str = arguments.region
        self.prompted = False  #: the problems were shown, with the question
        self._quiet: bool = arguments.json
        self._descriptor: int = arguments.C or 0
        self._bar = ExitStack()
        self._advance: Advance | None = None
        told = arguments.yes or arguments.auto
        ask = not (told or arguments.no or arguments.json) and sys.stdin.isatty() and sys.stdout.isatty()
        #: whether to repair what was found; None: look only
        self.agree: Callable[[Result], bool] | None = self._ask if ask else (lambda _: True) if told else None
        self.progress: Callable[[Progress], None] | None = None  #: None: nobody wants to know

    def __enter__(self) -> None:
        self._show_bar()
        self.progress = self._tell if self._advance or self._descriptor else None

    def _show_bar(self) -> None:
        from pkernfs.cli.progress import bar

        self._advance = self._bar.enter_context(bar(quiet=self._quiet))

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _tell(self, at: Progress) -> None:
        if self._advance:
            self._advance(at.name, at.done, at.total)
        if self._descriptor:
            with suppress(OSError):  # nobody reads any more
                os.write(self._descriptor, os.fsencode(f"{at.number} {at.done} {at.total} {self.region}\n"))

    def _ask(self, found: Result) -> bool:
        """Show what was found, and ask.  A transaction that waits is replayed without a question."""
        from pkernfs.cli.fsck_report import count, lines

        if not found.problems:
            return True
        self.prompted = True
        self._bar.close()  # it would be drawn over the question
        for line in lines(self.region, found.problems, found.paths):
            print(line)
        try:
            answer = input(f"{printable(self.region)}: {count(found.problems, 'problem')} found: repair (y/N)? ")
        except EOFError:
            print()
            return False
        self._show_bar()
        return answer.lower() in ("y", "yes")
