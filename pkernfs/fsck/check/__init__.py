"""Checking: all invariants of the format.

    check(volume) -> [Finding, ...]

``passes`` is the list of what is looked at, ``run`` goes through it, ``state`` is what one check knows: what owns which
memory (``memory``), what was reached, what was found.  ``trees`` walks; the other modules hold the checks, by subject,
each a function that notes what does not hold.  Nothing is written and no damage raises; where a structure cannot be
read, ``Findings.incomplete`` keeps the last passes from taking what is below it for lost.
"""

from __future__ import annotations

from pkernfs.fsck.check.passes import FILESYSTEM, PASSES
from pkernfs.fsck.check.run import Progress, check, check_region, run_check
from pkernfs.fsck.check.state import Check

__all__ = ["FILESYSTEM", "PASSES", "Check", "Progress", "check", "check_region", "run_check"]
