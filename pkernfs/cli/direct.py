"""pkernfs direct: the mark of a file whose memory is mapped from the region, past the mount."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pkernfs.cli.arguments import mounted_file
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import show
from pkernfs.errors import printable

if TYPE_CHECKING:
    from pkernfs import api

DESCRIPTION = """\
Show or change whether a file is marked as region-mapped: its memory may be mapped from the region, past the mount.

  pkernfs direct /mnt/pkernfs/guest-ram on       a guest can be given the file with the direct map (qemu-args)
  pkernfs direct /mnt/pkernfs/guest-ram show     is it marked, and who maps it?
  pkernfs direct /mnt/pkernfs/guest-ram off      it is mapped through the mount again

The memory of a marked file stays where it is, and is not freed while somebody maps it: rm, truncate and rename over the
file fail with EBUSY.  read(2) and write(2) go past the page cache, so that they and the guest see what the other has
stored; mmap(2) through the mount with MAP_SHARED fails with ENODEV, as its pages would be others than the guest's
(private mappings are possible, and show what was there when they were first read).

on is refused while a process maps the file through the mount, or with -o writeback; off while one maps it directly.
The mark outlives mounts, and whoever mapped the file: off takes one away that nobody needs any more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT/FILE and what to do."""
    parser.add_argument("file", metavar="MOUNT/FILE", help="a regular file in a mount")
    parser.add_argument(
        "action", nargs="?", choices=("on", "off", "show"), default="show", help="mark it, or no longer (default show)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Change the mark if asked to, and show it.  Raises PkernfsError."""
    from pkernfs import client
    from pkernfs.api import to_builtins

    path = mounted_file(arguments.file)
    facts = client.file(path) if arguments.action == "show" else client.set_direct(path, arguments.action == "on")
    found = {"direct": facts.direct, "mapped_by": to_builtins(facts.mapped_by)}
    show(arguments, found, [f"{printable(path)}: {text}" for text in lines(facts)])
    return 0


def lines(facts: api.FileInfo) -> list[str]:
    """The mark and who maps the file, for people."""
    mark = "region-mapped" if facts.direct else "not region-mapped"
    users = mapped_by(facts)
    if facts.direct and not any(one.map == "direct" for one in facts.mapped_by):
        mark += ", but nobody maps it directly"
    return [mark, *users]


def mapped_by(facts: api.FileInfo) -> list[str]:
    """Who maps a file, a line each."""
    return [f"mapped {WAYS[one.map]} by {printable(one.text)}" for one in facts.mapped_by]


#: How a process maps a file, in words.
WAYS = {"direct": "directly", "path": "through the mount"}

VERBS = {"direct": Verb(DESCRIPTION, add_arguments, run)}
