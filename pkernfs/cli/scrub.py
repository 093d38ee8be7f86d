"""pkernfs scrub: verify every checksum of a region, mounted or not."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pkernfs.cli.parsers import Verb, add_json
from pkernfs.cli.text import printable
from pkernfs.errors import PkernfsError

if TYPE_CHECKING:
    from pkernfs.cli.progress import Advance

DESCRIPTION = """\
Verify every checksum of a region: of the superblock and its copy, the journal, the block table, slabs, inodes, tree
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
    parser.add_argument("target", metavar="MOUNT|REGION")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Scrub, and name the files that are concerned.  Raises PkernfsError."""
    from pkernfs.cli.progress import bar
    from pkernfs.client import mount_of
    from pkernfs.mountinfo import mountpoints_of

    target = arguments.target
    mounted = mountpoints_of(os.path.realpath(target))
    mount = mount_of(target) or (mount_of(mounted[-1]) if mounted else None)
    with bar(quiet=arguments.json) as advance:
        if mount:
            region, (structures, problems) = mount.source, _all(_online(mount.mountpoint), advance)
        else:
            region, (structures, problems) = target, _offline(target, advance)
    paths = _paths(region, {problem["ino"] for problem in problems} - {0})
    for problem in problems:
        problem["path"] = paths.get(problem["ino"])
    if arguments.json:
        print(json.dumps({"structures": structures, "clean": not problems, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print((f"{printable(problem['path'])}: " if problem["path"] else "") + problem["text"])
        print(f"{target}: {structures} structures verified, {len(problems)} damaged")
    return DAMAGED if problems else 0


Step = tuple[dict[str, Any], int]  #: what a step found; the number of pages of the region


def _online(mountpoint: str) -> Iterator[Step]:
    """Ask the server for one step after the other."""
    from pkernfs.client import control
    from pkernfs.format import PAGES_PER_BLOCK

    pages = control(mountpoint, "info")["blocks"] * PAGES_PER_BLOCK
    page = 0
    while page < pages:
        step = control(mountpoint, "scrub", page=page)
        yield step, pages
        page = step["next"]


def _offline(path: str, advance: Advance | None) -> tuple[int, list[dict[str, Any]]]:
    from pkernfs.cli.offline import keep_quiet
    from pkernfs.errors import CorruptError, FormatError
    from pkernfs.fsck.repair.metadata import find_copy
    from pkernfs.fsck.scrub import Damage, scrub_all
    from pkernfs.iommu.guard import open_filesystem
    from pkernfs.region import open_region

    keep_quiet()
    with open_region(path, readonly=True) as region:
        try:
            fs = open_filesystem(region)
        except CorruptError as error:
            return 1, [Damage.of(error)._asdict()]
        except FormatError as error:
            if find_copy(region) is None:
                raise
            return 1, [Damage(error.text.removeprefix(f"{region.path}: "), 0, 0)._asdict()]
        pages = fs.volume.total_pages
        steps = ({**step._asdict(), "problems": [p._asdict() for p in step.problems]} for step in scrub_all(fs))
        return _all(((step, pages) for step in steps), advance)


def _all(steps: Iterable[Step], advance: Advance | None) -> tuple[int, list[dict[str, Any]]]:
    structures, problems = 0, []
    for step, pages in steps:
        structures += step["structures"]
        problems += step["problems"]
        if advance:
            advance("verifying", step["next"], pages)
    return structures, problems


def _paths(region_path: str, inos: set[int]) -> dict[int, str]:
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
