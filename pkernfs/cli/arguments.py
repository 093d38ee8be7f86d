"""Arguments of several commands: sizes, lengths of time, a region with a path in it."""

import argparse
import os
import re

from pkernfs.errors import UsageError, quoted

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def size(word: str) -> int:
    """A size or an address in bytes: 4096, 0x1000, 512M, 1GiB (powers of 1024).  For argparse."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)(?:([KMGTP])(?:i?B)?)?", word, re.IGNORECASE | re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4096, 0x1000, 512M or 1G, found {quoted(word)}")
    return int(match[1], 0 if match[1][:2].lower() == "0x" else 10) * UNITS[(match[2] or "").upper()]


def seconds(word: str) -> float:
    """A length of time.  For argparse."""
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0.01 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds, 0.01 to 86400, found {quoted(word)}")
    return number


def region_and_path(word: str) -> tuple[str, str]:
    """Split REGION[:PATH]; the region is the longest part before a colon that exists.  Raises UsageError."""
    at = len(word)
    while at > 0:
        if os.path.exists(word[:at]):
            return word[:at], word[at + 1 :]
        at = word.rfind(":", 0, at)
    raise UsageError(f"{word}: expected REGION or REGION:PATH, found no such region", hint="mkfs.pkernfs makes one")
