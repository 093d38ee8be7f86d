"""pkernfs ls: list files in a region, without a mount."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.cli.arguments import region_and_path
from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import printable
from pkernfs.errors import CorruptError
from pkernfs.format import FLAG_HELD, Ino, Inode

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import Filesystem

DESCRIPTION = """\
List a directory (or a file) of a region that need not be mounted.  Nothing is written; what its journal still holds is
replayed in memory.

  pkernfs ls -l /dev/shm/pkernfs.img
  pkernfs ls -lR /dev/shm/pkernfs.img:/vms
"""


class Row(NamedTuple):
    """A file.  The names of its fields are those of --json."""

    folder: str
    name: str
    ino: Ino
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    rdev: int
    allocated: int
    atime: int
    mtime: int
    ctime: int
    target: str | None  #: of a symbolic link
    awaiting: int  #: bytes of its content, at most, that hardware may have cached though nothing maps them
    held: dict[str, object] | None  #: why nobody can change it (pkernfs hold)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """REGION[:PATH]."""
    parser.add_argument("target", metavar="REGION[:PATH]", help="a region and a path in it (default: its root)")
    parser.add_argument("-l", "--long", action="store_true", help="mode, links, owner, size, time of change")
    parser.add_argument("-i", "--inode", action="store_true", help="print inode numbers")
    parser.add_argument("-n", "--numeric", action="store_true", help="-l with numbers for owner and group")
    parser.add_argument("-R", "--recursive", action="store_true", help="directories below as well")
    add_json(parser, "times in ns since the epoch")


def run(arguments: argparse.Namespace) -> int:
    """List.  Raises PkernfsError (no such path, damage)."""
    from pkernfs.cli.offline import with_filesystem

    region, path = region_and_path(arguments.target)
    rows, damage = with_filesystem(region, lambda fs: _collect(fs, path, arguments.recursive))
    for error in damage:
        print(f"pkernfs: {printable(str(error))}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return 1 if damage else 0
    folder = None
    for row in rows:
        if arguments.recursive and row.folder != folder:
            print(f"{'' if folder is None else chr(10)}{printable(row.folder)}:")
            folder = row.folder
        print(_line(row, arguments))
    return 1 if damage else 0


def _collect(fs: Filesystem, path: str, recursive: bool) -> tuple[list[Row], list[CorruptError]]:
    """The rows, and what could not be listed because it is damaged."""
    raw = os.fsencode(path)
    ino = fs.resolve(raw)
    if not stat.S_ISDIR(fs.getattr(ino).mode):
        return [_row(fs, ino, raw.rstrip(b"/").rpartition(b"/")[2], os.path.dirname(path) or "/")], []
    rows: list[Row] = []
    damage: list[CorruptError] = []
    todo = [("/" + path.strip("/"), ino)]
    seen = {ino}
    while todo:
        folder, ino = todo.pop()
        below = []
        try:
            directory = fs.names.directory(ino)
            entries = sorted(directory.scan(bad=damage.append), key=lambda entry: entry.name)
        except CorruptError as error:
            damage.append(error)
            continue
        for entry in entries:
            try:
                directory.target(entry)
                rows.append(_row(fs, entry.ino, entry.name, folder))
            except CorruptError as error:
                damage.append(error)
                continue
            if stat.S_ISDIR(entry.mode) and entry.ino not in seen:
                seen.add(entry.ino)
                below.append((f"{folder.rstrip('/')}/{os.fsdecode(entry.name)}", entry.ino))
        if recursive:
            todo += reversed(below)
    return rows, damage


def _row(fs: Filesystem, ino: Ino, name: bytes, folder: str) -> Row:
    from pkernfs.fs.guard import pins

    inode = fs.getattr(ino)
    return Row(
        folder=folder,
        name=os.fsdecode(name),
        ino=ino,
        mode=inode.mode,
        nlink=inode.nlink,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size,
        rdev=inode.rdev,
        allocated=inode.pages * 4096,
        atime=inode.atime,
        mtime=inode.mtime,
        ctime=inode.ctime,
        target=os.fsdecode(fs.readlink(ino)) if stat.S_ISLNK(inode.mode) else None,
        awaiting=max((one.length for one in fs.guard.describe_awaiting(ino)), default=0) if pins(inode) else 0,
        held=_held(fs, ino, inode) if inode.flags & FLAG_HELD else None,
    )


def _held(fs: Filesystem, ino: Ino, inode: Inode) -> dict[str, object]:
    from pkernfs.api import to_builtins
    from pkernfs.fs.facts import held_facts

    found: dict[str, object] = to_builtins(held_facts(fs, ino, inode))
    return found


def _line(row: Row, arguments: argparse.Namespace) -> str:
    name = printable(row.name) + (f"  (held: {printable(str(row.held['reason']))})" if row.held else "")
    prefix = f"{row.ino:>10} " if arguments.inode else ""
    if not (arguments.long or arguments.numeric):
        return prefix + name
    target = f" -> {printable(row.target)}" if row.target is not None else ""
    target += " (waiting for invalidation)" if row.awaiting else ""
    device = stat.S_ISBLK(row.mode) or stat.S_ISCHR(row.mode)
    size = f"{os.major(row.rdev)}, {os.minor(row.rdev)}" if device else row.size
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.mtime / 1e9))
    owner, group = (row.uid, row.gid) if arguments.numeric else (_user(row.uid), _group(row.gid))
    return f"{prefix}{stat.filemode(row.mode)} {row.nlink:>4} {owner:<8} {group:<8} {size:>12} {when} {name}{target}"


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


VERBS = {"ls": Verb(DESCRIPTION, add_arguments, run)}
