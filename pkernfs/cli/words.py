"""Words on command lines: sizes and addresses, a region with a path in it, and how they are printed."""

import argparse
import os
import re
import sys

from pkernfs import __version__
from pkernfs.errors import UsageError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps its layout, and whose errors are one line with the exit code of wrong usage."""

    usage_exit = 2

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, and out."""
        print(f"{self.prog}: {message}: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(self.usage_exit)


def add_version(parser: argparse.ArgumentParser) -> None:
    """The option --version."""
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")


def size(word: str) -> int:
    """A size or an address in bytes: 4096, 0x1000, 512M, 1GiB (powers of 1024).  For argparse."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)(?:([KMGTP])(?:i?B)?)?", word, re.IGNORECASE | re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4096, 0x1000, 512M or 1G, found {word!r}")
    return int(match[1], 0 if match[1][:2].lower() == "0x" else 10) * UNITS[(match[2] or "").upper()]


def human(count: int) -> str:
    """A size for people: 1.5 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def printable(name: str) -> str:
    """A name as part of a line on a terminal or in a pipe: what is no printable UTF-8 becomes an escape."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def region_and_path(word: str) -> tuple[str, str]:
    """Split REGION[:PATH]; the region is the longest part before a colon that exists.  Raises UsageError."""
    at = len(word)
    while at > 0:
        if os.path.exists(word[:at]):
            return word[:at], word[at + 1 :]
        at = word.rfind(":", 0, at)
    raise UsageError(f"{word}: expected REGION or REGION:PATH, found no such region", hint="mkfs.pkernfs makes one")
