"""The rounds of a repair, and the order of its stages.

``STEPS`` is the order.  What memory is used for comes first, so that what is stored later never takes memory that is
in use; then inodes, what they hold, and what follows from that; memory is freed, and lost inodes are named, when
everything can be read; page tables are built when all else is sound.  A step whose stages changed something ends its
round: the next check sees what is true then.  Stages of one step do not touch what the others go by.  Every stage works
through transactions, so that a crash leaves a region that the next repair goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import PASSES, Check, Progress, run_check
from pkernfs.fsck.check.passes import Pass
from pkernfs.fsck.findings import Finding
from pkernfs.fsck.problems import Stage
from pkernfs.fsck.repair.checksums import checksums
from pkernfs.fsck.repair.content import contents
from pkernfs.fsck.repair.holds import holds
from pkernfs.fsck.repair.inodes import bad_inodes, fields, free_slots, orphans
from pkernfs.fsck.repair.iommu import bitmaps, domain_ids, records
from pkernfs.fsck.repair.lost import lost
from pkernfs.fsck.repair.metadata import mend_metadata
from pkernfs.fsck.repair.quotas import projects
from pkernfs.fsck.repair.space import block_kinds, leaks, page_kinds, slab_headers, slots
from pkernfs.fsck.repair.tables import page_tables
from pkernfs.fsck.repair.work import Repair, Work
from pkernfs.region import Region

MAX_ROUNDS = 40  #: a round makes one step's changes; damage that is not gone after so many stays

#: What a stage does; METADATA is made before a volume can be opened, and so is none of these.
STAGES: dict[Stage, Callable[[Work], None]] = {
    Stage.BLOCK_KINDS: block_kinds,
    Stage.SLAB_HEADERS: slab_headers,
    Stage.PAGE_KINDS: page_kinds,
    Stage.SLOTS: slots,
    Stage.CHECKSUMS: checksums,
    Stage.BAD_INODES: bad_inodes,
    Stage.CONTENTS: contents,
    Stage.RECORDS: records,
    Stage.DOMAIN_IDS: domain_ids,
    Stage.BITMAPS: bitmaps,
    Stage.FIELDS: fields,
    Stage.FREE_SLOTS: free_slots,
    Stage.ORPHANS: orphans,
    Stage.LEAKS: leaks,
    Stage.LOST: lost,
    Stage.PROJECTS: projects,
    Stage.HOLDS: holds,
    Stage.TABLES: page_tables,
}
STEPS: tuple[tuple[Stage, ...], ...] = (
    (Stage.BLOCK_KINDS,),
    (Stage.SLAB_HEADERS,),
    (Stage.PAGE_KINDS,),
    (Stage.SLOTS,),
    (Stage.CHECKSUMS, Stage.BAD_INODES),
    (Stage.CONTENTS,),
    (Stage.RECORDS, Stage.DOMAIN_IDS, Stage.BITMAPS),
    (Stage.FIELDS, Stage.FREE_SLOTS, Stage.ORPHANS, Stage.LEAKS, Stage.LOST),
    (Stage.PROJECTS,),
    (Stage.HOLDS,),
    (Stage.TABLES,),
)

Tell = Callable[[Progress], None]


class Outcome(NamedTuple):
    """What a repair did."""

    found: list[Finding]  #: by the first check that could be made
    repairs: list[Repair]
    left: list[Finding]  #: what the last check found
    check: Check  #: the last one
    records: int  #: records of the journal that were replayed


def repair_region(
    region: Region,
    progress: Tell | None = None,
    *,
    passes: Sequence[Pass] = PASSES,
    before: Check | None = None,
) -> Outcome:
    """Repair the region, which must be open for writing.

    ``progress`` is called with what is done now.  ``before``: a check for a repair of what the region holds: the first
    round makes none then.  Raises FormatError when no superblock can be used.
    """
    repairs, records = mend_metadata(region)
    found: list[Finding] = []
    done: list[Repair] = []
    seen: set[tuple[tuple[Finding, ...], tuple[Repair, ...]]] = set()
    # What was mended so far (a superblock, kinds of blocks) is not what the check before went by.
    check = None if repairs else before
    for number in range(1, MAX_ROUNDS + 1):

        def tell(at: Progress, number: int = number) -> None:
            if progress:
                progress(at._replace(name=f"round {number}: {at.name}"))

        check = check or run_check(Volume(region), passes, for_repair=True, progress=tell)
        problems = check.findings.shown()
        # What was not noted as a problem of its own may have been repaired: the same again will not change any more.
        state = tuple(problems), tuple(done)
        found = found or problems
        last = check
        if not problems or state in seen:
            break
        seen.add(state)
        done = _one_step(region, check, len(passes), tell)
        if not done:
            break
        repairs += done
        check = None
    region.flush()
    return Outcome(found, repairs, problems, last, records)


def _one_step(region: Region, check: Check, number: int, tell: Tell) -> list[Repair]:
    """The first step that changes something.  ``number``: of the passes that were made."""
    for step in STEPS:
        done: list[Repair] = []
        for stage in step:
            number += 1
            tell(Progress(number, f"repair, {stage}", 0, 0))
            work = Work(stage, Volume(region), check)
            STAGES[stage](work)
            done += work.repairs
        if done:
            return done
    return []
