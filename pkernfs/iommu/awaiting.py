"""Content that awaits an invalidation: what hardware may have cached of files since a mapping of them was taken away.

It is pinned as a mapping would pin it, so that its memory is not given out again: a removed file stays an orphan, and
what is cut off a file is put aside (fs/reclaim.py).  With the acknowledgement of what is pending all of it is released.

One record for each file and domain id, and not for each mapping: however many an unmap takes away, it costs one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    AWAITING,
    AWAITING_KEY,
    DOMAIN,
    DOMAIN_ID_BITS,
    DOMAIN_KEY,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    MAX_FILE_SIZE,
    PAGE,
    ROOT_PGTABLES_INO,
    AwaitingContent,
    DomainId,
    FilePage,
    Ino,
    Inode,
    Mapping,
)
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.iommu.directory import named_domains
from pkernfs.iommu.invalidations import Invalidation, is_pending, pending
from pkernfs.iommu.invalidations import add as add_invalidation
from pkernfs.iommu.records import Records

LAST_KEY = AWAITING_KEY + (1 << 60) - 1


class Awaited(NamedTuple):
    """Pages [first, end) of a file, under a domain id."""

    ino: Ino
    id: DomainId
    first: FilePage
    end: FilePage


def _scan(roots: Records, first: int, last: int) -> Iterator[Awaited]:
    for key, value in roots.scan(first, last):
        record = roots.decode(AWAITING, key, value)
        end = record.start + record.length
        if not record.start < end <= MAX_FILE_SIZE // PAGE:
            raise roots.bad_record(key, f"{record.length} pages from page {record.start} on, which no file has")
        ino, domain_id = divmod(key - AWAITING_KEY, 1 << DOMAIN_ID_BITS)
        yield Awaited(Ino(ino), DomainId(domain_id), record.start, FilePage(end))


def awaiting(roots: Records) -> Iterator[Awaited]:
    """All content that awaits an invalidation, by inode.  ``roots``: the records of root-pgtables."""
    return _scan(roots, AWAITING_KEY, LAST_KEY)


def of_file(volume: Volume, ino: Ino) -> list[Awaited]:
    """What awaits one of inode ``ino``.  Raises CorruptError."""
    return _of_file(Records(volume, ROOT_PGTABLES_INO), ino)


def _of_file(roots: Records, ino: Ino) -> list[Awaited]:
    base = AWAITING_KEY + (ino << DOMAIN_ID_BITS)
    return list(_scan(roots, base, base + (1 << DOMAIN_ID_BITS) - 1))


def _key(one: Awaited) -> int:
    return AWAITING_KEY + (one.ino << DOMAIN_ID_BITS) + one.id


def _put(tx: Transaction, roots: Records, one: Awaited) -> None:
    """Put a record, which pins the file if it is a new one."""
    if roots.get(_key(one)) is None:
        tx.pin(one.ino, 1)
    roots.put(tx, _key(one), AWAITING.pack(AwaitingContent(one.first, one.end - one.first)))


def _drop(tx: Transaction, roots: Records, one: Awaited) -> None:
    tx.pin(one.ino, -1)
    roots.delete(tx, _key(one))


def add(tx: Transaction, roots: Records, domain_id: DomainId, mappings: Iterable[Mapping]) -> None:
    """Mappings of a domain are taken away, which hardware may have cached."""
    added: dict[Ino, Awaited] = {}
    for mapping in mappings:
        ino = mapping.ino
        new = Awaited(ino, domain_id, mapping.start, FilePage(mapping.start + mapping.length))
        for one in [added[ino]] if ino in added else _of_file(roots, ino):
            if one.id == domain_id:
                new = new._replace(first=min(new.first, one.first), end=max(new.end, one.end))
        added[ino] = new
    for one in added.values():
        _put(tx, roots, one)
    if added and not is_pending(roots, domain_id):
        # The tables did not say what was mapped, so that nothing of them has changed.
        add_invalidation(tx, roots, Invalidation(domain_id))


def awaits(volume: Volume, ino: Ino, first: FilePage) -> bool:
    """Whether something awaits an invalidation of what is in a file from page ``first`` on.  Raises CorruptError."""
    return any(one.end > first for one in of_file(volume, ino))


def hand_on(tx: Transaction, volume: Volume, ino: Ino, to: Ino, first: FilePage) -> None:
    """Inode ``to`` has got memory of inode ``ino`` from page ``first`` on, and what awaits an invalidation with it."""
    roots = Records(volume, ROOT_PGTABLES_INO)
    for one in _of_file(roots, ino):
        if one.end > first:
            _put(tx, roots, one._replace(ino=to, first=max(one.first, first)))
    roots.finish(tx)


def cut(tx: Transaction, volume: Volume, ino: Ino, first: FilePage) -> None:
    """Inode ``ino`` has no memory from page ``first`` on any more: that is others' by now."""
    roots = Records(volume, ROOT_PGTABLES_INO)
    for one in _of_file(roots, ino):
        if one.first >= first:
            _drop(tx, roots, one)
        elif one.end > first:
            _put(tx, roots, one._replace(end=first))
    roots.finish(tx)


def release(tx: Transaction, roots: Records, found: Iterable[Awaited]) -> None:
    """Hardware has invalidated all that was pending: drop records.  Those that name no file stay, for fsck."""
    for one in found:
        try:
            if _inode(roots.volume, one.ino):
                _drop(tx, roots, one)
        except CorruptError as error:
            roots.volume.damage.complain(error)


def kept_bytes(volume: Volume) -> int:
    """Memory without a name that only awaits an acknowledgement: of removed files and domains, and what was put aside.

    Raises CorruptError.
    """
    roots = Records(volume, ROOT_PGTABLES_INO)
    pages = 0
    for ino, count in Counter(one.ino for one in awaiting(roots)).items():
        inode = _inode(volume, ino)
        pages += inode.pages if inode and not inode.nlink and inode.iommu == count else 0
    ids = {one.id for one in pending(roots)} - {_id_of(volume, ino) for _, ino in named_domains(volume)}
    # The list of orphans can be long, and this is asked often: it is read only where a removed domain is on it.
    for ino in Orphans(volume).inos() if ids else ():
        inode = volume.inode(ino)
        if inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES and not inode.nlink and _id_of(volume, ino) in ids:
            pages += inode.pages
    return pages * PAGE


def _id_of(volume: Volume, ino: Ino) -> DomainId | None:
    with suppress(CorruptError):
        record = Records(volume, ino).record(DOMAIN, DOMAIN_KEY)
        return DomainId(record.id) if record else None
    return None


def _inode(volume: Volume, ino: Ino) -> Inode | None:
    """The inode that a record names; None: it is free, which keeps no other record from being used."""
    with suppress(FsError):
        return volume.inode(ino)
    return None
