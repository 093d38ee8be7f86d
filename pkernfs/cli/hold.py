"""pkernfs hold, pkernfs release: files that nobody may change meanwhile."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pkernfs.cli.arguments import mounted_file
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import printable, show
from pkernfs.errors import PkernfsError, UsageError

if TYPE_CHECKING:
    from pkernfs import api

HOLD = """\
Hold files of a mount, as the memory and the state of a saved guest, which nobody maps: until `pkernfs release` nobody,
root neither, can write to them, truncate, remove, rename or replace them, give them another name or other attributes
(EPERM, as with chattr +i).  They can be read.  It stays so over takeovers, mounts and crashes.  For root only.

  pkernfs hold /mnt/pkernfs/guest-ram /mnt/pkernfs/guest-state --reason "g1 is saved"
  pkernfs hold --list /mnt/pkernfs

A file that a process has open for writing, or mapped so through the mount, is refused (EBUSY).  Not seen are processes
in a container outside this one, and users within the kernel (loop devices, io_uring): what these write is refused from
then on.  Not held back are those who store into the region past the mount: a guest that maps it directly, and devices
that a domain maps the file for already.
"""
RELEASE = """\
Release files that are held: they can be changed again.  For root only.

  pkernfs release /mnt/pkernfs/guest-ram /mnt/pkernfs/guest-state
"""


def _hold_arguments(parser: argparse.ArgumentParser) -> None:
    """Files and the reason, or --list and the mount."""
    parser.add_argument("files", metavar="MOUNT/FILE", nargs="+", help="regular files; with --list the mount")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reason", metavar="TEXT", help="why, for those who meet it: up to 255 bytes")
    what.add_argument("--list", action="store_true", help="print the held files of the mount")
    add_json(parser, "times in ns since the epoch")


def _hold(arguments: argparse.Namespace) -> int:
    """Raises PkernfsError."""
    from pkernfs import client

    if arguments.list:
        return _list(arguments)
    return _each(arguments, lambda path: client.hold(path, arguments.reason))


def _release_arguments(parser: argparse.ArgumentParser) -> None:
    """Files."""
    parser.add_argument("files", metavar="MOUNT/FILE", nargs="+", help="regular files")
    add_json(parser, "times in ns since the epoch")


def _release(arguments: argparse.Namespace) -> int:
    """Raises PkernfsError."""
    from pkernfs import client

    return _each(arguments, client.release)


def _each(arguments: argparse.Namespace, change: Callable[[str], api.FileInfo]) -> int:
    """Change all files that can be; 1 when there is one that cannot."""
    done: list[dict[str, object]] = []
    lines = []
    status = 0
    for name in arguments.files:
        try:
            found = change(mounted_file(name))
        except PkernfsError as error:
            print(f"pkernfs: {printable(str(error))}", file=sys.stderr)
            status = error.exit_code
            continue
        held = found.held
        since_and_why = {"since": held.since, "reason": held.reason} if held else None
        done.append({"file": name, "ino": found.ino, "held": since_and_why})
        lines.append(f"{printable(name)}: {about(held)}" if held else f"{printable(name)}: not held")
    if done or arguments.json:
        show(arguments, done, lines)
    return status


def _list(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    if len(arguments.files) > 1:
        raise UsageError(f"--list: expected one mount, found {len(arguments.files)} words")
    found = client.ask(arguments.files[0], api.Holds()).files
    mount = client.mount_of(arguments.files[0])
    top = mount.mountpoint if mount else arguments.files[0]
    lines = [f"{_name(top, one)}: {about(one)}" for one in found]
    if lines or arguments.json:
        show(arguments, found, lines)
    return 0


def _name(top: str, one: api.HeldFile) -> str:
    return printable(os.path.join(top, one.file)) if one.file is not None else f"inode {one.ino}"


def about(held: api.Held) -> str:
    """Why a file is held, and since when."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held.since / 1e9))
    return f"held since {when}: {printable(held.reason)}"


VERBS = {"hold": Verb(HOLD, _hold_arguments, _hold), "release": Verb(RELEASE, _release_arguments, _release)}
