"""Running a check: all passes over a volume, or over a region that has to be opened first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import PAGE, SUPERBLOCK, TABLE_MAGIC, Superblock
from pkernfs.fs.journal import Journal
from pkernfs.fs.pages import check_page
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.passes import EACH_INODE, PASSES, Pass
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import NO_INO, Finding, Tally
from pkernfs.fsck.problems import Code
from pkernfs.region import Region, check_superblock, copies_of, find_copies, read_superblock


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

    Where the superblock, the journal or the block table is damaged the volume cannot be opened: these are the findings
    then, and the Check is None.  Raises FormatError when no copy of the superblock can be used.
    """
    opened = open_volume(region)
    if isinstance(opened, list):
        return opened, None
    done = run_check(opened, passes, for_repair=for_repair, progress=progress)
    return done.findings.shown(), done


def open_volume(region: Region) -> Volume | list[Finding]:
    """The volume in ``region``, or what keeps it from being opened.

    Raises FormatError when no copy of the superblock can be used.
    """
    try:
        sb = read_superblock(region, readonly=region.readonly)
    except FormatError as error:
        return _superblocks(region, error)
    try:
        Journal(region, sb).waiting()
    except CorruptError as error:
        return [Finding(Code.JOURNAL, f"{error.what}: {error.found}", NO_INO, error.offset)]
    try:
        return Volume(region)
    except CorruptError as error:
        return _table(region, sb) or [Finding(Code.BLOCK_TABLE, f"{error.what}: {error.found}", NO_INO, error.offset)]


def _superblocks(region: Region, error: FormatError) -> list[Finding]:
    """The findings that the superblock, and which of its copies, cannot be used; when none can, the error is raised."""
    copies = find_copies(region)
    if not copies:
        raise error
    at, sb = copies[0]
    try:
        check_superblock(region.read(0, SUPERBLOCK.size), region.size, "", readonly=True)
    except FormatError as damaged:
        error = damaged
    text = error.text.removeprefix(": ").removeprefix("not a pkernfs region: ")
    found = [Finding(Code.SUPERBLOCK, f"{text}; the copy at {at:#x} is sound")]
    for other in copies_of(sb):
        if other not in dict(copies):
            found.append(
                Finding(Code.SUPERBLOCK, f"expected a copy at {other:#x}, found none that is sound", offset=other)
            )
    return found


def _table(region: Region, sb: Superblock) -> list[Finding]:
    """The pages of the block table that cannot be used."""
    found = []
    for index in range(sb.table_pages):
        offset = PAGE + index * PAGE
        try:
            check_page(region.read(offset, PAGE), TABLE_MAGIC, offset, index, f"page {index} of the block table")
        except CorruptError as error:
            found.append(Finding(Code.BLOCK_TABLE, f"{error.what}: {error.found}", NO_INO, offset))
    return found
