"""Address spaces: mapping files to IOVAs, and taking them away.

Raises FsError with the errno that VFIO gives: EEXIST, EINVAL, ENOENT, ENOSPC, EPERM.
"""

from __future__ import annotations

import errno
import stat
from typing import NamedTuple

from pkernfs.errors import FsError, quoted
from pkernfs.format import (
    ACCESS_NAMES,
    GUARDED,
    MAPPING,
    MAX_PHYSICAL,
    PAGE,
    PAGES_PER_BLOCK,
    RO_COMPAT_AWAITING,
    ROOT_PGTABLES_INO,
    WRITE,
    FilePage,
    Ino,
    Iova,
    IovaPage,
    Mapping,
)
from pkernfs.fs.chunks import allocate
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.holds import check_not_held
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu import awaiting
from pkernfs.iommu.domain import Domain
from pkernfs.iommu.formats import IOVA_START
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import commit, replayed
from pkernfs.iommu.translations import differences, in_portions, pieces_of

BATCH = 1000  #: mappings that one transaction takes away
ACCESS = {name: access for access, name in ACCESS_NAMES.items() if access}


def hexadecimal(*numbers: int) -> str:
    """A range for an error."""
    return " to ".join(f"{number:#x}" for number in numbers)


def check_range(domain: Domain, iova: int, length: int) -> Iova:
    """The IOVA that a number from outside is.  Raises FsError(EINVAL), with the rule, where no mapping can be."""
    end = iova + length
    if iova % PAGE or length % PAGE:
        raise FsError(errno.EINVAL, f"IOVA {iova:#x}, length {length:#x}: expected multiples of 4 KiB")
    if not length:
        raise FsError(errno.EINVAL, f"IOVA {iova:#x}: expected a length, found 0")
    if not 0 <= iova < end <= domain.aperture:
        rule = f"IOVAs of {domain.record.levels} levels are below {domain.aperture:#x}"
        raise FsError(errno.EINVAL, f"IOVAs {hexadecimal(iova, end - 1)}: {rule}")
    return Iova(iova)


class Mapped(NamedTuple):
    """What a ``map`` has done."""

    iova: Iova
    length: int
    stored: int  #: leaves; 0 when the mapping was there already


def map_file(
    fs: Filesystem,
    ino: Ino,
    iova: int,
    file_ino: Ino,
    offset: int = 0,
    length: int = 0,
    access: str = "rw",
    *,
    live_update: bool = False,
    key: int = 0,
) -> Mapped:
    """Map ``length`` bytes (0: up to the end) of a file from ``offset`` on to ``iova`` of a domain.

    ``iova`` is any number that somebody sends: ``check_range`` makes an Iova of it.

    Holes get memory.  ``live_update``: check that just this is there already, in the tables too, and change nothing.
    """
    volume = fs.volume
    domain = Domain(volume, ino)
    domain.check_named()
    inode = volume.inode(file_ino)
    if inode.flags & GUARDED:
        raise FsError(errno.EPERM, f"inode {file_ino} holds page tables: no device may write to them")
    if not stat.S_ISREG(inode.mode) or access not in ACCESS:
        where = f"inode {file_ino}, access {quoted(access)}"
        raise FsError(errno.EINVAL, f"{where}: expected a regular file, and rw, ro or wo")
    if not inode.nlink:
        raise FsError(errno.ENOENT, f"inode {file_ino} has no name any more")
    whole = -(-inode.size // PAGE) * PAGE
    length = length or max(whole - offset, 0)
    if offset % PAGE or offset + length > whole or offset < 0:
        rule = f"expected a multiple of 4 KiB, and up to {whole:#x}, where the file ends"
        raise FsError(errno.EINVAL, f"offset {offset:#x}, length {length:#x}: {rule}")
    iova = check_range(domain, iova, length)
    for reserved in domain.form.reserved:
        if iova < reserved.stop and reserved.start < iova + length:
            rule = f"{hexadecimal(reserved.start, reserved.stop - 1)} never reaches the tables"
            raise FsError(errno.EINVAL, f"IOVAs {hexadecimal(iova, iova + length - 1)}: {rule}")
    if volume.sb.phys_base + volume.region.size > MAX_PHYSICAL:
        raise FsError(errno.EINVAL, "physical addresses beyond 52 bits: no table can hold them")
    mapping = Mapping(file_ino, FilePage(offset // PAGE), length // PAGE, ACCESS[access])
    again = replayed(fs, key)
    if again is not None:
        return Mapped(iova, length, again)
    first, last = IovaPage(iova // PAGE), IovaPage((iova + length) // PAGE - 1)
    if live_update:
        check_mapped(domain, first, mapping)
        return Mapped(iova, length, 0)
    if mapping.access & WRITE:
        check_not_held(file_ino, inode)
    for at, other in domain.records.mappings(first, last):
        found = hexadecimal(at * PAGE, (at + other.length) * PAGE - 1)
        raise FsError(errno.EEXIST, f"IOVAs {hexadecimal(iova, iova + length - 1)}: {found} are mapped already")

    def change(tx: Transaction, roots: Records, compact: bool) -> int:
        domain = Domain(volume, ino)
        filemap = FileMap(volume, file_ino, volume.inode(file_ino), compact=compact)
        allocate(tx, filemap, mapping.start, FilePage(mapping.start + mapping.length))
        tx.put_inode(file_ino, filemap.finish())
        tx.pin(file_ino, 1)
        _make_room(tx, domain, roots)
        domain.prepare(tx, roots)
        editor = domain.editor(tx)
        pieces = list(in_portions(pieces_of(volume, iova, mapping, filemap)))
        editor.enter(domain.record.levels, domain.root, IOVA_START, pieces)
        domain.edited(tx, editor, roots)
        domain.records.put(tx, first, MAPPING.pack(mapping))
        domain.save(tx)
        return editor.stored

    return Mapped(iova, length, commit(fs, key, change))


def _make_room(tx: Transaction, domain: Domain, roots: Records) -> None:
    """Use pages again that tables were in, when they are many and no hardware is looking at them.

    That reads all of the tables, so it waits until it brings half a block.
    """
    if domain.record.awaiting >= PAGES_PER_BLOCK // 2 and not domain.hw_may_access(roots):
        domain.reclaim(tx)


def check_mapped(domain: Domain, first: IovaPage, mapping: Mapping) -> None:
    """Raise FsError when pages from ``first`` on do not say what ``mapping`` says.

    ENOENT, or EEXIST when they say something else; CorruptError when the tables do not.
    """
    at, end = first, first + mapping.length
    for found, other in domain.records.mappings(first, IovaPage(end - 1)):
        if found > at:
            break
        same = (other.ino, other.start - found, other.access) == (mapping.ino, mapping.start - first, mapping.access)
        if not same or found < first or found + other.length > end:
            where = hexadecimal(found * PAGE, (found + other.length) * PAGE - 1)
            place = f"inode {other.ino} at {other.start * PAGE:#x}, {ACCESS_NAMES[other.access]}"
            raise FsError(errno.EEXIST, f"IOVAs {where} are mapped to {place}")
        at = IovaPage(found + other.length)
    if at < end:
        raise FsError(errno.ENOENT, f"IOVA {at * PAGE:#x} is not mapped: map it without --live-update")
    for text in differences(domain, Iova(first * PAGE), Iova(end * PAGE)):
        raise domain.pages.bad(text)


def unmap(fs: Filesystem, ino: Ino, iova: int, length: int, key: int = 0) -> int:
    """Take [iova, iova + length) from a domain, parts of mappings too; how many bytes were mapped.

    ``iova`` is any number that somebody sends, as for ``map_file``.
    """
    volume = fs.volume
    domain = Domain(volume, ino)
    iova = check_range(domain, iova, length)
    first, end = iova // PAGE, (iova + length) // PAGE
    again = replayed(fs, key)
    if again is not None:
        return again
    starts = [at for at, _ in domain.records.mappings(IovaPage(first), IovaPage(end - 1))]
    if not starts:
        raise FsError(errno.ENOENT, f"IOVAs {hexadecimal(iova, iova + length - 1)}: nothing is mapped there")
    if domain.hw_may_access(Records(volume, ROOT_PGTABLES_INO)):
        volume.enable(RO_COMPAT_AWAITING)
    unmapped = 0
    # As many at once as any journal holds.
    cuts = [*starts[BATCH::BATCH], end]
    if len(cuts) > 1:
        commit(fs, 0, lambda tx, _roots, _compact: _make_splits_possible(tx, fs, ino))
    for cut in cuts:
        unmapped = _unmap_part(fs, ino, range(first, cut), unmapped, key if cut == end else 0)
        first = cut
    return unmapped


def _make_splits_possible(tx: Transaction, fs: Filesystem, ino: Ino) -> int:
    """Have the pages that splitting leaves at both ends takes, so that the first and the last part do not fail."""
    domain = Domain(fs.volume, ino)
    if not domain.pages.has_free(2 * domain.record.levels):
        domain.pages.grow(tx)
        domain.save(tx)
    return 0


def _unmap_part(fs: Filesystem, ino: Ino, pages: range, before: int, key: int) -> int:
    """Take pages of IOVAs from a domain, in one transaction; how many bytes were mapped, added to ``before``."""
    volume = fs.volume
    first, end = pages.start, pages.stop
    files: set[Ino] = set()

    def change(tx: Transaction, roots: Records, _compact: bool) -> int:
        domain = Domain(volume, ino)
        _make_room(tx, domain, roots)
        cached: list[Mapping] = []
        editor = domain.editor(tx)
        editor.clear(domain.record.levels, domain.root, Iova(first * PAGE), Iova(end * PAGE))
        domain.edited(tx, editor, roots)
        unmapped = 0
        for at, mapping in list(domain.records.mappings(IovaPage(first), IovaPage(end - 1))):
            left, right = max(first - at, 0), max(at + mapping.length - end, 0)
            domain.records.delete(tx, at)
            if left:
                domain.records.put(tx, at, MAPPING.pack(mapping._replace(length=left)))
            if right:
                rest = mapping._replace(start=FilePage(mapping.start + mapping.length - right), length=right)
                domain.records.put(tx, end, MAPPING.pack(rest))
            tx.pin(mapping.ino, bool(left) + bool(right) - 1)
            gone = mapping.length - left - right
            cached.append(mapping._replace(start=FilePage(mapping.start + left), length=gone))
            files.add(mapping.ino)
            unmapped += gone
        if domain.hw_may_access(roots):
            awaiting.add(tx, roots, domain.id, cached)
        domain.save(tx)
        return before + unmapped * PAGE

    result = commit(fs, key, change)
    for file_ino in files:
        fs.reclaimer.reap(file_ino)
    return result
