"""Control verbs that come twice: what a request has done is noted in the transaction that does it.

A client whose server died before the reply sends its request again, by the same key.  The record of a key stands in
root-pgtables, in slot key % REQUEST_SLOTS: it goes when another request needs the slot, and at the next mount.
"""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.format import REQUEST, REQUEST_KEY, REQUEST_SLOTS, ROOT_PGTABLES_INO, Request
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.records import Records


def done_before(fs: Filesystem, request: int) -> int | None:
    """The result of a request that comes again; None: it has not been executed."""
    last = Records(fs.volume, ROOT_PGTABLES_INO).record(REQUEST, REQUEST_KEY + request % REQUEST_SLOTS)
    return last.result if last and request and last.key == request else None


def executed(tx: Transaction, roots: Records, request: int, result: int) -> None:
    """Note that a request is executed by the transaction; ``roots``, of root-pgtables, are finished."""
    if request:
        roots.put(tx, REQUEST_KEY + request % REQUEST_SLOTS, REQUEST.pack(Request(request, result)))
    roots.finish(tx)


def commit(fs: Filesystem, request: int, change: Callable[[Transaction, Records, bool], int]) -> int:
    """Run ``change(tx, roots, compact)`` in one transaction, with its result noted as that of the request; the result.

    ``roots`` are the records of root-pgtables.
    """
    again = done_before(fs, request)
    if again is not None:
        return again

    def all_of_it(tx: Transaction, compact: bool) -> int:
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        result = change(tx, roots, compact)
        executed(tx, roots, request, result)
        return result

    return fs.volume.compacting(all_of_it)


def recorded(roots: Records) -> list[int]:
    """The keys of the records of requests: at the next mount nobody waits for a reply any more, and they go."""
    return [key for key, _ in roots.scan(REQUEST_KEY)]
