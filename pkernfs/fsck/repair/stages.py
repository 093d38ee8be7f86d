"""The rounds of a repair, and the order of its stages.

``STEPS`` is the order.  What memory is used for comes first, so that what is stored later never takes memory that is
in use; then inodes, what they hold, and what follows from that; memory is freed, and lost inodes are named, when
everything can be read.  A step whose stages changed something ends its round: the next check sees what is true then.
Stages of one step do not touch what the others go by.  Every stage works through transactions, so that a crash leaves a
region that the next repair goes on with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pkernfs.fs.volume import Volume
from pkernfs.fsck.check import Checker, Problem, Progress
from pkernfs.fsck.check.passes import PASSES
from pkernfs.fsck.repair.content import contents, lost
from pkernfs.fsck.repair.inodes import bad_inodes, fields, free_slots, orphans
from pkernfs.fsck.repair.iommu import bitmaps, domain_ids, records
from pkernfs.fsck.repair.metadata import mend_metadata
from pkernfs.fsck.repair.quotas import projects
from pkernfs.fsck.repair.seals import seals
from pkernfs.fsck.repair.space import block_kinds, leaks, page_kinds, slab_headers, slots
from pkernfs.fsck.repair.work import Repair, Work
from pkernfs.region import Region

MAX_ROUNDS = 40  #: a round makes one step's changes; damage that is not gone after so many stays

STEPS: tuple[tuple[Callable[[Work], None], ...], ...] = (
    (block_kinds,),
    (slab_headers,),
    (page_kinds,),
    (slots,),
    (seals, bad_inodes),
    (contents,),
    (records, domain_ids, bitmaps),
    (fields, free_slots, orphans, leaks, lost),
    (projects,),
)


class Outcome(NamedTuple):
    """What a repair did."""

    found: list[Problem]  #: by the first check that could be made
    repairs: list[Repair]
    left: list[Problem]  #: what the last check found
    checker: Checker
    records: int  #: records of the journal that were replayed


def repair_region(region: Region, progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Repair the region, which must be open for writing.

    ``progress`` is called with what is done now.  Raises FormatError when no superblock can be used.
    """
    repairs, records = mend_metadata(region)
    found: list[Problem] = []
    done: list[Repair] = []
    seen: set[tuple[tuple[Problem, ...], tuple[Repair, ...]]] = set()
    for number in range(1, MAX_ROUNDS + 1):

        def tell(at: Progress, number: int = number) -> None:
            if progress:
                progress(at._replace(name=f"round {number}: {at.name}"))

        checker = Checker(Volume(region), salvage=True, progress=tell)
        problems = checker.run()
        # What was not noted as a problem of its own may have been repaired: the same again is what leads nowhere.
        state = tuple(problems), tuple(done)
        found = found or problems
        if not problems or state in seen:
            break
        seen.add(state)
        done = _one_step(checker, tell)
        if not done:
            break
        repairs += done
    region.flush()
    return Outcome(found, repairs, problems, checker, records)


def _one_step(checker: Checker, tell: Callable[[Progress], None]) -> list[Repair]:
    """The first step that changes something."""
    number = len(PASSES)
    for step in STEPS:
        done: list[Repair] = []
        for stage in step:
            number += 1
            tell(Progress(number, f"repair, {stage.__name__.replace('_', ' ')}", 0, 0))
            work = Work(Volume(checker.region), checker)
            stage(work)
            done += work.repairs
        if done:
            return done
    return []
