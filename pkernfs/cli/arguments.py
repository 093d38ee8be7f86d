"""Arguments of several commands: sizes, lengths of time, a region with a path in it."""

import argparse
import os
import re
from collections.abc import Callable

from pkernfs.errors import UsageError, quoted

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
ID_END = (1 << 32) - 1  #: user and group ids are below: this one means "no change" to chown(2)


def size(word: str) -> int:
    """A size or an address in bytes: 4096, 0x1000, 512M, 1GiB (powers of 1024).  For argparse."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)(?:([KMGTP])(?:i?B)?)?", word, re.IGNORECASE | re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4096, 0x1000, 512M or 1G, found {quoted(word)}")
    return int(match[1], 0 if match[1][:2].lower() == "0x" else 10) * UNITS[(match[2] or "").upper()]


def mounted_file(name: str, hint: str = "") -> str:
    """The real path of a regular file, which is to be in a mount.  Raises UsageError."""
    if not os.path.isfile(name):
        raise UsageError(f"{name}: expected a regular file in a pkernfs mount", hint=hint)
    return os.path.realpath(name)


def seconds(word: str) -> float:
    """A length of time.  For argparse."""
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0.01 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds, 0.01 to 86400, found {quoted(word)}")
    return number


def user(word: str) -> int:
    """A user, by name or number.  For argparse."""
    import pwd

    return _id(word, "user", lambda: pwd.getpwnam(word).pw_uid)


def group(word: str) -> int:
    """A group, by name or number.  For argparse."""
    import grp

    return _id(word, "group", lambda: grp.getgrnam(word).gr_gid)


def _id(word: str, what: str, look_up: Callable[[], int]) -> int:
    try:
        number = int(word) if word.isascii() and word.isdigit() else look_up()
    except (KeyError, ValueError, OSError):
        number = -1
    if not 0 <= number < ID_END:
        raise argparse.ArgumentTypeError(f"expected a {what} of this machine, or a number, found {quoted(word)}")
    return number


def mode(word: str) -> int:
    """Permission bits in octal.  For argparse."""
    if not re.fullmatch("0?[0-7]{1,4}", word, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected permissions in octal such as 0711, found {quoted(word)}")
    return int(word, 8)


def region_and_path(word: str) -> tuple[str, str]:
    """Split REGION[:PATH]; the region is the longest part before a colon that exists.  Raises UsageError."""
    at = len(word)
    while at > 0:
        if os.path.exists(word[:at]):
            return word[:at], word[at + 1 :]
        at = word.rfind(":", 0, at)
    raise UsageError(f"{word}: expected REGION or REGION:PATH, found no such region", hint="mkfs.pkernfs makes one")
