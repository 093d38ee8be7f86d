"""Parsers of command lines: one line for an error, and verbs that load their module when they are asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from pkernfs import __version__
from pkernfs.errors import printable

WIDTH = 120  #: of help
FORMS = 23  #: width of the left column of a listing


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions; leaves the arguments as much room as the descriptions have."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=FORMS + 5)


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps its layout, and whose errors are one line with the exit code of wrong usage."""

    usage_exit = 2

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Formatter, "allow_abbrev": False, **settings})
        self.verbs: dict[str, VerbParser] = {}  #: by name, those that are not listed too; they may have to be loaded

    def add_verbs(self, listed: Mapping[str, tuple[str, str]], hidden: Mapping[str, str] | None = None) -> None:
        """The verbs of a command: name -> (module, what it is for); ``hidden``: name -> module, of those not listed."""
        chosen = self.add_subparsers(
            title="verbs", metavar="VERB", required=True, prog=self.prog, parser_class=VerbParser
        )
        for name, (module, help_text) in listed.items():
            self.verbs[name] = chosen.add_parser(name, help=help_text, verb=name, module=module)
        for name, module in (hidden or {}).items():
            self.verbs[name] = chosen.add_parser(name, verb=name, module=module)

    def arguments(self) -> list[argparse.Action]:
        """What it takes, without its verbs.  argparse has no public way to ask for that."""
        return [one for one in self._actions if one.nargs != argparse.PARSER]

    def error(self, message: str) -> NoReturn:
        """One line, and out."""
        print(f"{self.prog}: {printable(message)}: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(self.usage_exit)


class Verb(NamedTuple):
    """What a module declares of each verb, in its VERBS."""

    description: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int] | None  #: None: it has verbs of its own


class VerbParser(Parser):
    """The parser of a verb.  It imports the verb's module and takes its arguments when it is first asked.

    So the parsers of all verbs cost a millisecond, and `pkernfs info` imports nothing of `pkernfs iommu`.  Tried: to
    build all of them at each start costs thirty times as much, twice the start of Python itself; a word VERB and the
    rest of the line for a second parser is as cheap as this, but no tool can ask such a parser for its verbs.
    """

    def __init__(self, *, verb: str, module: str, **settings: Any) -> None:
        super().__init__(add_help=False, **settings)  # half of what a parser costs is its --help
        self._verb = verb
        self._module = module
        self._loaded = False

    def load(self) -> None:
        """Take the description and the arguments from the module."""
        if self._loaded:
            return
        self._loaded = True
        verb: Verb = importlib.import_module(self._module).VERBS[self._verb]
        self.add_argument("-h", "--help", action="help", help="show this help and exit")
        self.description = verb.description
        verb.add_arguments(self)
        if verb.run is not None:
            self.set_defaults(run=verb.run)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """What argparse calls for the verb that was chosen.  What is not known is this verb's error."""
        self.load()
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def add_version(parser: argparse.ArgumentParser) -> None:
    """The option --version."""
    parser.add_argument(
        "-V", "--version", action="version", version=f"%(prog)s {__version__}", help="show the version and exit"
    )


def add_mount(parser: argparse.ArgumentParser) -> None:
    """The mount that a verb is about."""
    parser.add_argument("mount", metavar="MOUNT|REGION", help="where it is mounted, or the region, wherever that is")


def add_json(parser: argparse.ArgumentParser, note: str = "") -> None:
    """The option --json; ``note``: in what units."""
    parser.add_argument("--json", action="store_true", help=f"for programs{note and '; '}{note}")


def listing(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns for a help: how something is written, and what it means."""
    lines = []
    for forms, meaning in rows:
        text = textwrap.fill(meaning, WIDTH, initial_indent=" " * FORMS, subsequent_indent=" " * FORMS)
        lines.append(f"  {forms:{FORMS - 2}}{text[FORMS:]}" if len(forms) < FORMS - 2 else f"  {forms}\n{text}")
    return "\n".join(lines)
