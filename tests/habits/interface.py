"""Every interface that others build upon, as text: so that none changes without a new version.

The region's format; the commands with their arguments, and the options of a mount; the control protocol, which --json
prints too; the Python API.  ``interface.txt`` has them as they were when the version became what its first line says.
After a change raise ``__version__`` in pkernfs/__init__.py, say in the changelog what has changed, and run

    python -m tests.habits.interface
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from msgspec import Struct

import pkernfs
from pkernfs import api, client, vfio
from pkernfs.cli import fsck, mkfs, mount
from pkernfs.cli.main import parser as main_parser
from pkernfs.cli.parsers import Parser, VerbParser
from pkernfs.format import COMPAT_KNOWN, INCOMPAT_KNOWN, RO_COMPAT_KNOWN, VERSION
from pkernfs.options import descriptions

RECORDED = Path(__file__).with_name("interface.txt")


def of_format() -> Iterator[str]:
    """The version of the region's format, whose details tests/golden watches."""
    yield f"format {VERSION}, features {COMPAT_KNOWN:#x} {RO_COMPAT_KNOWN:#x} {INCOMPAT_KNOWN:#x}"


def of_command(parser: Parser) -> Iterator[str]:
    """A command's arguments, and those of its verbs."""
    if isinstance(parser, VerbParser):
        parser.load()
    yield f"command {parser.prog}"
    for one in parser.arguments():
        if isinstance(one, argparse._HelpAction | argparse._VersionAction):
            continue
        value = "" if one.nargs == 0 else f" {one.metavar or one.dest}"
        more = "" if one.nargs in (None, 0) else f" x{one.nargs}"
        choices = f" of {', '.join(map(str, one.choices))}" if one.choices else ""
        yield f"    {', '.join(one.option_strings)}{value}{more}{choices}"
    for verb in parser.verbs.values():
        yield from of_command(verb)


def of_mount() -> Iterator[str]:
    """The options after -o."""
    yield "options of a mount"
    for forms, _ in descriptions():
        yield f"    {forms}"


def of_protocol() -> Iterator[str]:
    """Verbs with the fields of their requests, and the fields of all structures of replies."""
    yield f"control protocol {api.API_VERSION}"
    for name, verb in api.VERBS.items():
        yield f"verb {name} -> {getattr(verb.reply, '__name__', verb.reply)}, from the {verb.server.value}"
        yield from fields(verb.request)
    requests = {verb.request for verb in api.VERBS.values()}
    for name, value in vars(api).items():
        if isinstance(value, type) and issubclass(value, Struct) and not issubclass(value, api.Request):
            assert value not in requests
            yield f"structure {name}"
            yield from fields(value)


def fields(structure: type[Struct]) -> Iterator[str]:
    """The fields of a structure of the protocol, sorted, with their types."""
    hints = get_type_hints(structure)
    for attribute, name in sorted(
        zip(structure.__struct_fields__, structure.__struct_encode_fields__, strict=True), key=lambda pair: pair[1]
    ):
        kind = hints[attribute]
        yield f"    {name}: {getattr(kind, '__name__', kind) if isinstance(kind, type) else kind}"


def of_python() -> Iterator[str]:
    """What the modules that programs import say that they have."""
    for module in (client, vfio):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            yield f"{module.__name__}.{name}{inspect.signature(value) if callable(value) else ''}"
            if inspect.isclass(value):
                for member, function in sorted(vars(value).items()):
                    if inspect.isfunction(function) and not member.startswith("_"):
                        yield f"    {member}{inspect.signature(function)}"


def interface() -> str:
    """All of it."""
    lines = [*of_format()]
    for parser in (mkfs.parser, fsck.parser, mount.parser, main_parser):
        lines += of_command(parser())
    lines += [*of_mount(), *of_protocol(), *of_python()]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def write() -> int:
    """Record the interface of this version; the exit code."""
    version, _, text = RECORDED.read_text().partition("\n") if RECORDED.exists() else ("", "", "")
    if text == interface():
        print(f"nothing has changed since {version}")
        return 0
    if version == pkernfs.__version__:
        print(f"the interface has changed since {version}: raise __version__ in pkernfs/__init__.py")
        return 1
    RECORDED.write_text(f"{pkernfs.__version__}\n{interface()}")
    return 0


if __name__ == "__main__":
    sys.exit(write())
