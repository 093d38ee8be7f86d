"""Repairing: check, repair, check again, until nothing is left or nothing changes any more.

    repair_region(region) -> Outcome

``stages`` is the order; the other modules hold the stages by subject, and ``work`` what they share.  Which stage mends
which problem stands in the table of ``problems``.
"""

from pkernfs.fsck.repair.metadata import finish_transaction, mend_part
from pkernfs.fsck.repair.stages import Outcome, repair_region
from pkernfs.fsck.repair.work import Repair

__all__ = ["Outcome", "Repair", "finish_transaction", "mend_part", "repair_region"]
