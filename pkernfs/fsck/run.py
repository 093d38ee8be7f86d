"""One run of fsck: look, ask, repair, look again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from pkernfs.errors import PkernfsError, RegionBusyError
from pkernfs.format import PAGE, SUPERBLOCK, Ino
from pkernfs.fs.journal import Journal
from pkernfs.fs.paths import a_path_of
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import Check, Progress, check_region
from pkernfs.fsck.findings import Finding
from pkernfs.fsck.repair import Repair, finish_transaction, mend_part, repair_region
from pkernfs.region import FileRegion, check_unmapped, open_region, read_superblock

#: Structures without which a volume cannot be opened: superblock, journal, block table.  Each may hide the next one.
METADATA = 3


class Result(NamedTuple):
    """What one run found and did."""

    problems: list[Finding]  #: what the first check found
    left: list[Finding]  #: what is there at the end
    repairs: list[Repair]
    check: Check | None  #: the last one; None: the volume could not be opened
    records: int  #: records of the journal that were replayed
    stored: bool  #: they are in the region now, not in memory only: it was opened for writing
    warnings: list[str]
    paths: dict[Ino, str]  #: of the inodes concerned, where they have one


def fsck(
    path: str,
    agree: Callable[[Result], bool] | None,
    *,
    in_use: bool = False,
    even_if_mapped: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Check the region at ``path``, and repair it if there is something to do and ``agree`` says so.

    ``agree`` is called with what was found, when there are problems or a transaction to replay; None: look only.  A
    clean region is not opened for writing.  ``in_use``: look even though somebody else has the region open.
    ``even_if_mapped``: repair even though a process maps the region's memory, as a guest on the direct map does.
    ``progress`` is called with what is done now.  Raises PkernfsError; after a KeyboardInterrupt the region is whole.
    """
    warnings = []
    try:
        opened = open_region(path, readonly=True)
    except RegionBusyError as error:
        if not in_use:
            raise RegionBusyError(error.text, hint="unmount it, or look only with -n") from None
        warnings.append(f"{error.text}: what changes meanwhile may seem damaged")
        opened = open_region(path, readonly=True, locked=False)
    with opened as region:
        if agree is not None and not even_if_mapped:
            warnings += filter(None, [check_unmapped(region.fd, region.path)])
        before = _state_of(region)
        records = _waiting(region)
        problems, check = check_region(region, progress, for_repair=agree is not None)
        as_it_is = check is not None
        if not as_it_is:
            problems, check = _go_on_in_memory(region, problems, progress)
        paths = _paths(check.volume, problems) if check else {}
    found = Result(problems, problems, [], check, records, False, warnings, paths)
    if not (records or problems) or agree is None or not agree(found):
        return found
    with open_region(path) as region:
        # The lock was given up meanwhile, for flock(2) cannot turn a shared one into an exclusive one in one step: what
        # was found holds only if nobody wrote.
        check = check if as_it_is and _state_of(region) == before else None
        try:
            done = repair_region(region, progress, before=check)
        except KeyboardInterrupt:
            finish_transaction(region)
            raise
        paths |= _paths(Volume(region), [*done.found, *done.left, *done.repairs])
    # What could not be opened in memory either has shown its metadata only.
    return Result(
        problems=found.problems if found.check else found.problems + done.found,
        left=done.left,
        repairs=done.repairs,
        check=done.check,
        records=done.records,
        stored=True,
        warnings=warnings,
        paths=paths,
    )


def _go_on_in_memory(
    region: FileRegion, problems: list[Finding], progress: Callable[[Progress], None] | None
) -> tuple[list[Finding], Check | None]:
    """Mend, in memory only, what keeps the volume from being opened, and check what is behind that: all problems."""
    scratch = region.scratch()
    noted, check = list(problems), None
    # A region that must not be repaired raises: its metadata are all that there is to tell.
    with suppress(PkernfsError):
        for _ in range(METADATA):
            mend_part(scratch, problems[0].code)
            problems, check = check_region(scratch, progress)
            noted += problems
            if check is not None:
                break
    return noted, check


def _state_of(region: FileRegion) -> tuple[bytes, bytes]:
    """What is different after anybody wrote: a mount counts itself in the superblock, a transaction in the journal."""
    try:
        at = Journal(region, read_superblock(region, readonly=True)).header_at
    except PkernfsError:
        return region.read(0, SUPERBLOCK.size), b""
    return region.read(0, SUPERBLOCK.size), region.read(at, PAGE)


def _waiting(region: FileRegion) -> int:
    """How many records of the journal wait to be applied; 0 also when that cannot be told: the check says why."""
    try:
        return len(Journal(region, read_superblock(region, readonly=True)).waiting())
    except PkernfsError:
        return 0


def _paths(volume: Volume, concerned: Sequence[Finding | Repair]) -> dict[Ino, str]:
    """Of the inodes that are concerned, those that have one: a walk over all names, so not for nothing."""
    inos = {one.ino for one in concerned} - {0}
    return a_path_of(volume, inos) if inos else {}
