"""What hardware may have cached and must forget: kept in the region until somebody says that it has been invalidated.

Not present entries are not cached (VT-d without caching mode; AMD-Vi without NpCache), so mapping alone leaves nothing
to invalidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pkernfs.format import (
    GENERATION,
    GENERATION_KEY,
    IOVA_PAGE_BITS,
    PAGE,
    STALE,
    STALE_CONTEXT_KEY,
    STALE_IOTLB_KEY,
    Generation,
    Stale,
)
from pkernfs.iommu import pci
from pkernfs.iommu.records import Records

MOST = 64  #: ranges that are kept of one domain id; more become all of it


class Invalidation(NamedTuple):
    """``requester`` -1: translations of a domain id, [iova, iova + length) or, length 0, all of them.  Else the context
    of a device, which led to that domain id."""

    id: int
    requester: int = -1
    iova: int = 0
    length: int = 0  #: bytes

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        if self.requester >= 0:
            return {"kind": "context", "id": self.id, "device": pci.text(self.requester), "iova": None, "length": None}
        return {"kind": "iotlb", "id": self.id, "device": None, "iova": self.iova, "length": self.length or None}


def pending(records: Records) -> Iterator[Invalidation]:
    """What is to be invalidated.  ``records``: of root-pgtables."""
    for key, value in records.scan(STALE_CONTEXT_KEY, GENERATION_KEY - 1):
        stale = records.decode(STALE, key, value)
        if key < STALE_IOTLB_KEY:
            yield Invalidation(stale.id, requester=key - STALE_CONTEXT_KEY)
        else:
            page = key & (1 << IOVA_PAGE_BITS) - 1
            yield Invalidation(stale.id, iova=page * PAGE, length=stale.length * PAGE)


def generation(records: Records) -> int:
    """How often something was added: names what is pending; 0: nothing ever was."""
    record = records.record(GENERATION, GENERATION_KEY)
    return record.number if record else 0


def add(records: Records, what: Invalidation) -> None:
    """Note it, within the open transaction; what one range covers is not kept twice."""
    records.put(records.volume.open_tx, GENERATION_KEY, GENERATION.pack(Generation(generation(records) + 1)))
    if what.requester >= 0:
        records.put(records.volume.open_tx, STALE_CONTEXT_KEY + what.requester, STALE.pack(Stale(0, what.id)))
        return
    base = STALE_IOTLB_KEY + (what.id << IOVA_PAGE_BITS)
    found = records.scan(base, base + (1 << IOVA_PAGE_BITS) - 1)
    known = [(key, records.decode(STALE, key, value).length) for key, value in found]
    first, end = base + what.iova // PAGE, base + (what.iova + what.length) // PAGE
    if known == [(base, 0)]:
        return
    if not what.length or len(known) >= MOST:
        for key, _ in known:
            records.delete(records.volume.open_tx, key)
        first = end = base
    else:
        for key, length in known:
            if key <= end and first <= key + length:
                first, end = min(first, key), max(end, key + length)
                records.delete(records.volume.open_tx, key)
    records.put(records.volume.open_tx, first, STALE.pack(Stale(end - first, what.id)))


def clear(records: Records) -> list[Invalidation]:
    """Everything has been invalidated; what that was."""
    done = list(pending(records))
    for key in [key for key, _ in records.scan(STALE_CONTEXT_KEY, GENERATION_KEY - 1)]:
        records.delete(records.volume.open_tx, key)
    return done
