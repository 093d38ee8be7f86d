"""Running a check: all passes over a volume, or over a region that has to be opened first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import BLOCK, SUPERBLOCK, geometry
from pkernfs.fs.journal import Journal
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.passes import EACH_INODE, PASSES, Pass
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import NO_INO, Finding, Tally
from pkernfs.fsck.problems import Code
from pkernfs.region import Region, check_superblock, read_superblock


class Progress(NamedTuple):
    """How far a check is."""

    number: int  #: of the pass, from 1
    name: str  #: of the pass
    done: int  #: inodes that were reached so far
    total: int  #: inodes in use, as the headers of slabs say; 0: not known yet


Tell = Callable[[Progress], None]  #: is called at each pass, and every STEP inodes


def run_check(
    volume: Volume, passes: Sequence[Pass] = PASSES, *, for_repair: bool = False, progress: Tell | None = None
) -> Check:
    """All passes over a volume.  Never raises on a damaged region, and never writes.

    No transaction may be open.  What is in the region counts, not what the volume holds decoded.
    """
    number = 0

    def tell() -> None:
        if progress:
            total = sum(slab.inodes for slab in state.memory.slabs.values())
            done = state.reached.files + state.reached.directories
            progress(Progress(number, passes[number - 1].__name__.replace("_", " "), done, total))

    state = Check(volume, EACH_INODE, for_repair=for_repair, tell=tell)
    for number, one in enumerate(passes, 1):  # noqa: B007 (tell uses it)
        tell()
        state.findings.tally = Tally(NO_INO)
        one(state)
    return state


def check(volume: Volume, passes: Sequence[Pass] = PASSES) -> list[Finding]:
    """What a check of a volume finds."""
    return run_check(volume, passes).findings.shown()


def check_region(
    region: Region,
    progress: Tell | None = None,
    *,
    passes: Sequence[Pass] = PASSES,
    for_repair: bool = False,
) -> tuple[list[Finding], Check | None]:
    """Open the volume in ``region`` and check it.  The journal is replayed: in memory, when the region is read-only.

    Where the superblock, the journal or the block table is damaged the volume cannot be opened: that is the one
    finding then, and the Check is None.  Raises FormatError when neither copy of the superblock can be used.
    """
    opened = open_volume(region)
    if isinstance(opened, Finding):
        return [opened], None
    done = run_check(opened, passes, for_repair=for_repair, progress=progress)
    return done.findings.shown(), done


def open_volume(region: Region) -> Volume | Finding:
    """The volume in ``region``, or what keeps it from being opened.

    Raises FormatError when neither copy of the superblock can be used.
    """
    try:
        sb = read_superblock(region, readonly=region.readonly)
    except FormatError as error:
        return _superblock(region, error)
    try:
        Journal(region, sb).waiting()
    except CorruptError as error:
        return Finding(Code.JOURNAL, f"{error.what}: {error.found}", NO_INO, error.offset)
    try:
        return Volume(region)
    except CorruptError as error:
        return Finding(Code.BLOCK_TABLE, f"{error.what}: {error.found}", NO_INO, error.offset)


def _superblock(region: Region, error: FormatError) -> Finding:
    """The finding that the superblock cannot be used, where its copy can; else the error is raised."""
    copy_at = geometry(region.size // BLOCK).journal_offset
    try:
        check_superblock(region.read(copy_at, SUPERBLOCK.size), region.size, "copy", readonly=True)
    except FormatError:
        raise error from None
    text = error.text.removeprefix(f"{region.path}: ")
    return Finding(Code.SUPERBLOCK, f"{text}; the copy at {copy_at:#x} is sound")
