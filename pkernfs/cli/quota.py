"""pkernfs quota: what a directory and all that is below it may use."""

import argparse
import json
import os
from pathlib import PurePath

from pkernfs.cli.arguments import size
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import human
from pkernfs.errors import UsageError, printable, quoted

DESCRIPTION = """\
Limit what a directory of a mount and all that is below it may use; beyond that, EDQUOT ("Disk quota exceeded").

  pkernfs quota /mnt/pkernfs/tenant 10G      set it, also when more is used already
  pkernfs quota /mnt/pkernfs/tenant          print it
  pkernfs quota /mnt/pkernfs/tenant none     take it away

What counts: 4 KiB for each page of content, names and attributes, and 256 bytes for each file.  Large files take whole
blocks of 2 MiB where the quota has room for them.  A quota holds within those of enclosing directories.  Files do not
move and have no links from one quota to another: rename(2) and link(2) give EXDEV, and mv copies, as between
filesystems.  Setting a quota marks everything below, which keeps the mount busy: about 20 us a file.
"""


def limit(word: str) -> int:
    """SIZE or "none".  For argparse."""
    number = 0 if word == "none" else size(word)
    if number >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected less than 8 EiB, found {quoted(word)}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT/DIR and the limit."""
    parser.add_argument("directory", metavar="MOUNT/DIR", help="the directory")
    parser.add_argument(
        "limit", metavar="SIZE", nargs="?", type=limit, help="bytes, or with K, M, G, T; none takes it away"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Set if asked to, and print.  Raises PkernfsError."""
    from pkernfs import client

    path = os.path.realpath(arguments.directory)
    if not os.path.isdir(path):
        raise UsageError(f"{arguments.directory}: expected a directory in a pkernfs mount")
    quota = client.quota(path, arguments.limit)
    enclosing = (path, *map(str, PurePath(path).parents))
    place = next((place for place in enclosing if os.stat(place).st_ino == quota.ino), path)
    if arguments.json:
        found = {"directory": place, "limit": quota.limit, "used": quota.used} if quota.ino else None
        print(json.dumps({"quota": found}, indent=2))
    elif not quota.ino:
        print(f"{printable(path)}: no quota")
    else:
        print(f"{printable(place)}: {human(quota.used)} of {human(quota.limit)} used")
    return 0


VERBS = {"quota": Verb(DESCRIPTION, add_arguments, run)}
