"""The core of fsck.pkernfs -y: check, repair, check again.

    repair_region(region) -> Outcome

``stages`` is the order; the other modules hold the stages by subject, and ``work`` what they share.
"""

from pkernfs.fsck.repair.metadata import finish_transaction
from pkernfs.fsck.repair.stages import Outcome, repair_region
from pkernfs.fsck.repair.work import Repair

__all__ = ["Outcome", "Repair", "finish_transaction", "repair_region"]
