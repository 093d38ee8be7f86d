"""Pending invalidations: what hardware may have cached, kept in the region until somebody acknowledges that it is gone.

pkernfs programs no IOMMU.  Whoever does lists what is pending, queues the commands, and acknowledges the list by its
token; until then ids, pages of tables and content (awaiting.py) are not used again.

Not present entries are not cached (VT-d without caching mode; AMD-Vi without NpCache), so mapping alone leaves nothing
to invalidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.format import (
    AWAITING_KEY,
    GENERATION,
    GENERATION_KEY,
    IOVA_PAGE_BITS,
    PAGE,
    PENDING,
    PENDING_CONTEXT_KEY,
    PENDING_IOTLB_KEY,
    DomainId,
    Generation,
    Iova,
    PendingInvalidation,
    Requester,
)
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.records import Records

#: Ranges that are kept of one domain id; more become all of it, so that the records of an id take less than half a leaf
#: of their tree however scattered the changes are.
MOST = 64


class Invalidation(NamedTuple):
    """``requester`` None: translations of a domain id, [iova, iova + length) or, length 0, all of them.

    Else the context of a device, which pointed to the tables of that domain id.
    """

    id: DomainId
    requester: Requester | None = None
    iova: Iova = Iova(0)
    length: int = 0  #: bytes


def pending(roots: Records) -> Iterator[Invalidation]:
    """What is to be invalidated.  ``roots``: the records of root-pgtables."""
    for key, value in roots.scan(PENDING_CONTEXT_KEY, AWAITING_KEY - 1):
        record = roots.decode(PENDING, key, value)
        if key < PENDING_IOTLB_KEY:
            yield Invalidation(DomainId(record.id), Requester(key - PENDING_CONTEXT_KEY))
        else:
            page = key & (1 << IOVA_PAGE_BITS) - 1
            yield Invalidation(DomainId(record.id), iova=Iova(page * PAGE), length=record.length * PAGE)


def generation(roots: Records) -> int:
    """How often something was added: the token that names what is pending; 0: nothing ever was."""
    record = roots.record(GENERATION, GENERATION_KEY)
    return record.number if record else 0


def add(tx: Transaction, roots: Records, what: Invalidation) -> None:
    """Note it; what one range covers is not kept twice."""
    roots.put(tx, GENERATION_KEY, GENERATION.pack(Generation(generation(roots) + 1)))
    if what.requester is not None:
        roots.put(tx, PENDING_CONTEXT_KEY + what.requester, PENDING.pack(PendingInvalidation(0, what.id)))
        return
    base = PENDING_IOTLB_KEY + (what.id << IOVA_PAGE_BITS)
    found = roots.scan(base, base + (1 << IOVA_PAGE_BITS) - 1)
    known = [(key, roots.decode(PENDING, key, value).length) for key, value in found]
    first, end = base + what.iova // PAGE, base + (what.iova + what.length) // PAGE
    if known == [(base, 0)]:
        return
    if not what.length or len(known) >= MOST:
        for key, _ in known:
            roots.delete(tx, key)
        first = end = base
    else:
        for key, length in known:
            if key <= end and first <= key + length:
                first, end = min(first, key), max(end, key + length)
                roots.delete(tx, key)
    roots.put(tx, first, PENDING.pack(PendingInvalidation(end - first, what.id)))


def clear(tx: Transaction, roots: Records) -> None:
    """Everything was acknowledged."""
    for key in [key for key, _ in roots.scan(PENDING_CONTEXT_KEY, AWAITING_KEY - 1)]:
        roots.delete(tx, key)


def is_pending(roots: Records, domain_id: DomainId) -> bool:
    """Whether hardware may have cached something of a domain id."""
    first = PENDING_IOTLB_KEY + (domain_id << IOVA_PAGE_BITS)
    if next(roots.scan(first, first + (1 << IOVA_PAGE_BITS) - 1), None):
        return True
    contexts = roots.scan(PENDING_CONTEXT_KEY, PENDING_IOTLB_KEY - 1)
    return any(roots.decode(PENDING, key, value).id == domain_id for key, value in contexts)
