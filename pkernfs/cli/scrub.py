"""pkernfs scrub: verify every checksum of a region, mounted or not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import show
from pkernfs.errors import PkernfsError, printable
from pkernfs.format import Ino

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.cli.progress import Advance

DESCRIPTION = """\
Verify every checksum of a region: of the superblock and its copies, the journal, the block table, slabs, inodes, tree
nodes and values of attributes.  A mounted region goes on being used meanwhile.  Single structures are looked at;
whether they agree with each other is what fsck.pkernfs finds out, without a mount.

  pkernfs scrub /mnt/pkernfs
  pkernfs scrub /dev/shm/pkernfs.img

exit status:
  0  all is well          1  it failed          2  wrong usage          4  damage was found
"""
DAMAGED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT or REGION."""
    parser.add_argument("target", metavar="MOUNT|REGION", help="the region, mounted or not")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Scrub, and name the files that are concerned.  Raises PkernfsError."""
    from pkernfs import client
    from pkernfs.api import to_builtins
    from pkernfs.cli.progress import bar
    from pkernfs.client import mount_of
    from pkernfs.served import served

    target = arguments.target
    mount = mount_of(target)
    with bar(quiet=arguments.json) as advance:
        if mount or served(os.path.realpath(target)):
            region, (structures, problems) = client.info(target).region, _all(_online(target), advance)
        else:
            region, (structures, problems) = target, _offline(target, advance)
    paths = _paths(region, {problem.ino for problem in problems} - {0})
    lines = [(f"{printable(paths[Ino(one.ino)])}: " if one.ino in paths else "") + one.text for one in problems]
    lines.append(f"{printable(target)}: {structures} structures verified, {len(problems)} damaged")
    found = [to_builtins(one) | {"path": paths.get(Ino(one.ino))} for one in problems]
    show(arguments, {"structures": structures, "clean": not problems, "problems": found}, lines)
    return DAMAGED if problems else 0


def _online(path: str) -> Iterator[tuple[api.Scrubbed, int]]:
    """Each step of the server, and the number of pages of the region."""
    from pkernfs import api, client
    from pkernfs.format import PAGES_PER_BLOCK

    pages = client.info(path).blocks * PAGES_PER_BLOCK
    page = 0
    while page < pages:
        step = client.ask(path, api.Scrub(page=page))
        yield step, pages
        page = step.next


def _offline(path: str, advance: Advance | None) -> tuple[int, list[api.DamagedChecksum]]:
    from pkernfs import api
    from pkernfs.cli.offline import keep_quiet
    from pkernfs.errors import CorruptError, FormatError
    from pkernfs.fsck.scrub import Damage, scrub_all
    from pkernfs.iommu.guard import open_filesystem
    from pkernfs.region import find_copies, open_region

    keep_quiet()
    with open_region(path, readonly=True) as region:
        try:
            fs = open_filesystem(region)
        except CorruptError as error:
            return 1, [api.DamagedChecksum(*Damage.of(error))]
        except FormatError as error:
            if not find_copies(region):
                raise
            return 1, [api.DamagedChecksum(error.text.removeprefix(f"{region.path}: "), ino=0, offset=0)]
        pages = fs.volume.total_pages
        return _all(((step.reply(), pages) for step in scrub_all(fs)), advance)


def _all(steps: Iterable[tuple[api.Scrubbed, int]], advance: Advance | None) -> tuple[int, list[api.DamagedChecksum]]:
    structures, problems = 0, []
    for step, pages in steps:
        structures += step.structures
        problems += step.problems
        if advance:
            advance("verifying", step.next, pages)
    return structures, problems


def _paths(region_path: str, inos: set[int]) -> dict[Ino, str]:
    """A path of each inode that has one and whose directories can be read."""
    from pkernfs.fs.paths import a_path_of
    from pkernfs.fs.volume import Volume
    from pkernfs.region import open_region

    if not inos:
        return {}
    try:
        with open_region(region_path, readonly=True, locked=False) as region:
            return a_path_of(Volume(region), inos)
    except PkernfsError:
        return {}  # too much is damaged for names; what was found is told without them


VERBS = {"scrub": Verb(DESCRIPTION, add_arguments, run)}
