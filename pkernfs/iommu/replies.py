"""Control verbs in the reply cache (fs/replies.py): their replies are records of root-pgtables.

So they are committed together with what the verbs change.  ``key`` is what the client has drawn for its call, 0 when
nobody sends it again.
"""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.format import REQUEST_KEY, REQUEST_SLOTS, ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.replies import RecordedReplies
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.records import Records


def replies(roots: Records) -> RecordedReplies:
    """The reply cache in the records of root-pgtables."""
    return RecordedReplies(roots, REQUEST_KEY, REQUEST_SLOTS)


def replayed(fs: Filesystem, key: int) -> int | None:
    """The result of a verb that comes again and was executed; None: it is to be executed."""
    return replies(Records(fs.volume, ROOT_PGTABLES_INO)).begin(key)


def record_reply(tx: Transaction, roots: Records, key: int, result: int = 0) -> None:
    """The transaction executes the verb; ``roots``, the records of root-pgtables, are finished."""
    replies(roots).record(tx, key, result)
    roots.finish(tx)


def commit(fs: Filesystem, key: int, change: Callable[[Transaction, Records, bool], int]) -> int:
    """Execute a verb with ``change(tx, roots, compact)``, in one transaction, unless it was; the result.

    ``roots`` are the records of root-pgtables.
    """
    result = replayed(fs, key)
    if result is not None:
        return result

    def all_of_it(tx: Transaction, compact: bool) -> int:
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        result = change(tx, roots, compact)
        record_reply(tx, roots, key, result)
        return result

    return fs.volume.compacting(all_of_it)
