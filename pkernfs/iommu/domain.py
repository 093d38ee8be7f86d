"""Domains: address spaces (IOAS), the tables that say the same (HWPT), and the devices that are led to them.

Each change is one transaction.  ``request`` names it: when the last change has that name it has been done already.
Raises FsError with the errno that VFIO gives: EEXIST, EINVAL, ENOENT, ENOSPC, EBUSY, EPERM.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    ATTACHMENT,
    ATTACHMENT_KEY,
    DEFERRED,
    DOMAIN,
    DOMAIN_KEY,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    INODE_SIZE,
    IOMMU_INO,
    MAPPING,
    PAGE,
    PAGES_PER_BLOCK,
    PERSISTENT,
    REQUEST,
    REQUEST_KEY,
    ROOT_PGTABLES_INO,
    TABLES_VTD,
    Attachment,
    Domain,
    Mapping,
    Request,
)
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.fs.records import TABLES, Records, pin
from pkernfs.fs.volume import Volume
from pkernfs.iommu import pci
from pkernfs.iommu.contexts import EMPTY, Contexts
from pkernfs.iommu.edit import Editor, Piece, tables_below
from pkernfs.iommu.formats import ACCESS_NAMES, BY_NAME, DEVICES, ENTRY_OF, FORMATS, MAX_PHYSICAL, TableFormat
from pkernfs.iommu.pages import TablePages
from pkernfs.iommu.stale import Invalidation, add, pending

UNUSED = Domain(tables=TABLES_VTD, levels=4, leaf=3, reserved=0, id=0, root=0, stale=0)
LAST_ID = 0xFFFE  #: 0 and 0xffff are not used, as Linux has it
ACCESS = {"rw": 3, "ro": 1, "wo": 2}


def hexadecimal(*numbers: int) -> str:
    """A range for an error."""
    return " to ".join(f"{number:#x}" for number in numbers)


class Hwpt:
    """A domain: its records, and its tables.  Changes need the open transaction, and end with ``save``."""

    def __init__(self, volume: Volume, ino: int) -> None:
        if not volume.inode(ino).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            raise FsError(errno.EINVAL, f"inode {ino}: expected a domain, a file in iommu/")
        self.volume = volume
        self.ino = ino
        self.records = Records(volume, ino)
        raw = self.records.get(DOMAIN_KEY)
        self.record = UNUSED if raw is None else self._checked(raw)
        self.pages = TablePages(volume, ino)

    def _checked(self, raw: bytes) -> Domain:
        record = DOMAIN.unpack(raw) if len(raw) == DOMAIN.size else UNUSED._replace(levels=0)
        if record.tables not in FORMATS or not 3 <= record.levels <= 5 or not 1 <= record.leaf <= 3:
            raise CorruptError(f"domain {self.ino}", self.ino * INODE_SIZE, f"{record}", ino=self.ino)
        return record

    @property
    def form(self) -> TableFormat:
        """The format of its tables."""
        return FORMATS[self.record.tables]

    @property
    def aperture(self) -> int:
        """IOVAs are below this."""
        return PAGE << 9 * self.record.levels

    @property
    def entry(self) -> tuple[int, ...]:
        """The words that lead a device to this domain."""
        record = self.record
        return ENTRY_OF[record.tables](self.pages.physical(record.root), record.levels, record.id)

    def prepare(self, roots: Records) -> None:
        """See to it that there are an id and a root table."""
        if not self.record.id:
            self.record = self.record._replace(id=new_id(self.volume, roots))
        if not self.record.root:
            page = self.pages.allocate()
            self.pages.store(page, EMPTY)
            self.record = self.record._replace(root=page)

    def is_hot(self, roots: Records) -> bool:
        """Whether hardware may be looking at the tables, or has cached what they say."""
        attached = any(attachment.domain == self.ino for _, attachment in roots.attachments())
        return attached or any(stale.id == self.record.id for stale in pending(roots))

    def editor(self, leaf: int = 0) -> Editor:
        """For changes of the tables."""
        return Editor(self.form, self.pages, leaf or self.record.leaf)

    def edited(self, editor: Editor, roots: Records) -> None:
        """Account for what an editor has given up."""
        self.record = self.record._replace(stale=self.record.stale + len(editor.given_up))
        if editor.end and self.is_hot(roots):
            add(roots, Invalidation(self.record.id, iova=editor.first, length=editor.end - editor.first))

    def sweep(self) -> int:
        """Free the pages that tables were in: hardware has forgotten them.  How many."""
        tables: set[int] = set()
        if self.record.root:
            tables.update(tables_below(self.form, self.pages, self.record.levels, self.record.root))
        self.record = self.record._replace(stale=0)
        return self.pages.use_only(tables)

    def save(self) -> None:
        """Put everything into the transaction."""
        self.pages.finish()
        self.records.put(DOMAIN_KEY, DOMAIN.pack(self.record))
        self.records.finish()


# -- all domains ----------------------------------------------------------------------------------------------------


def domains(fs: Filesystem) -> Iterator[tuple[bytes, int]]:
    """(name, inode) of all domains."""
    for entry in fs.directory(IOMMU_INO).scan(0):
        if fs.getattr(entry.ino).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            yield entry.name, entry.ino


def name_of(fs: Filesystem, ino: int) -> str:
    """What a domain is called, for messages."""
    found = next((name for name, of in domains(fs) if of == ino), f"inode {ino}".encode())
    return found.decode(errors="backslashreplace")


def new_id(volume: Volume, roots: Records) -> int:
    """The least domain id that is not in use, and that hardware has nothing cached of.  Raises FsError(ENOSPC)."""
    used = {stale.id for stale in pending(roots)} | {attachment.id for _, attachment in roots.attachments()}
    fs_entries = Filesystem(volume).directory(IOMMU_INO).scan(0)
    for entry in fs_entries:
        if volume.inode(entry.ino).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            raw = Records(volume, entry.ino).get(DOMAIN_KEY)
            used.add(DOMAIN.unpack(raw).id if raw else 0)
    for number in range(1, LAST_ID + 1):
        if number not in used:
            return number
    raise FsError(errno.ENOSPC, f"{LAST_ID} domain ids are in use")


# -- requests -------------------------------------------------------------------------------------------------------


def done_before(fs: Filesystem, request: int) -> int | None:
    """The result of a request that comes again; None: it has not been executed."""
    raw = Records(fs.volume, ROOT_PGTABLES_INO).get(REQUEST_KEY)
    last = REQUEST.unpack(raw) if raw else Request(0, 0)
    return last.result if request and last.key == request else None


def commit(fs: Filesystem, request: int, change: Callable[[Records, bool], int]) -> int:
    """Run ``change(roots, compact)`` in one transaction, with its result noted as that of the request; the result.

    ``roots`` are the records of root-pgtables.
    """
    again = done_before(fs, request)
    if again is not None:
        return again

    def all_of_it(compact: bool) -> int:
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        result = change(roots, compact)
        roots.put(REQUEST_KEY, REQUEST.pack(Request(request, result)))
        roots.finish()
        return result

    return fs.compacting(all_of_it)


# -- creating and removing ------------------------------------------------------------------------------------------


def create(fs: Filesystem, name: bytes, form: str, levels: int, caller: Caller, request: int = 0) -> int:
    """A new domain with its first 2 MiB; its inode."""
    if form not in BY_NAME or not 3 <= levels <= 5:
        raise FsError(errno.EINVAL, f"expected the format vtd or amd and 3 to 5 levels, found {form!r} and {levels!r}")
    again = done_before(fs, request)
    if again is not None:
        return again
    ino = fs.create(IOMMU_INO, name, stat.S_IFREG | 0o600, caller)

    def first_block(roots: Records, compact: bool) -> int:
        hwpt = Hwpt(fs.volume, ino)
        hwpt.record = hwpt.record._replace(tables=BY_NAME[form].number, levels=levels)
        hwpt.prepare(roots)
        hwpt.save()
        return ino

    try:
        return commit(fs, request, first_block)
    except FsError:
        fs.unlink(IOMMU_INO, name)
        raise


def destroy(fs: Filesystem, ino: int, request: int = 0) -> None:
    """Remove a domain that no device is attached to, and all its mappings."""
    if done_before(fs, request) is not None:
        return
    Hwpt(fs.volume, ino)
    name = next((name for name, of in domains(fs) if of == ino), None)
    if name is None:
        raise FsError(errno.ENOENT, f"inode {ino}: the domain has no name")
    fs.unlink(IOMMU_INO, name)
    commit(fs, request, lambda roots, compact: 0)


# -- mapping --------------------------------------------------------------------------------------------------------


def check_range(hwpt: Hwpt, iova: int, length: int) -> None:
    """Raise FsError(EINVAL), with the rule, for IOVAs that no mapping can have."""
    end = iova + length
    if iova % PAGE or length % PAGE:
        raise FsError(errno.EINVAL, f"IOVA {iova:#x}, length {length:#x}: expected multiples of 4 KiB")
    if not length:
        raise FsError(errno.EINVAL, f"IOVA {iova:#x}: expected a length, found 0")
    if not 0 <= iova < end <= hwpt.aperture:
        rule = f"IOVAs of {hwpt.record.levels} levels are below {hwpt.aperture:#x}"
        raise FsError(errno.EINVAL, f"IOVAs {hexadecimal(iova, end - 1)}: {rule}")


def pieces_of(volume: Volume, iova: int, mapping: Mapping, filemap: FileMap | None = None) -> Iterator[Piece]:
    """Where a mapping leads to, in pieces.  Raises CorruptError when the file has no memory there."""
    filemap = filemap or FileMap(volume, mapping.ino, volume.inode(mapping.ino))
    at, end = mapping.start, mapping.start + mapping.length
    while at < end:
        page, run = filemap.find(at)
        if not page:
            found = f"no memory at {at * PAGE:#x}, which is mapped to IOVA {iova:#x}"
            raise CorruptError(f"inode {mapping.ino}", mapping.ino * INODE_SIZE, found, ino=mapping.ino)
        run = min(run, end - at)
        # Extents are in one piece of the file each; two of them can go on in memory.
        yield Piece(iova, volume.sb.phys_base + page * PAGE, run * PAGE, mapping.access)
        at, iova = at + run, iova + run * PAGE


def joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same with what goes on in memory in one piece."""
    last: Piece | None = None
    for piece in pieces:
        if last and (last.iova + last.length, last.physical + last.length, last.access) == (
            piece[0],
            piece[1],
            piece[3],
        ):
            last = last._replace(length=last.length + piece.length)
        else:
            if last:
                yield last
            last = piece
    if last:
        yield last


class Mapped(NamedTuple):
    """What a ``map`` has done."""

    iova: int
    length: int
    stored: int  #: leaves; 0 when the mapping was there already


def map_file(
    fs: Filesystem,
    ino: int,
    iova: int,
    file_ino: int,
    offset: int = 0,
    length: int = 0,
    access: str = "rw",
    *,
    live_update: bool = False,
    request: int = 0,
) -> Mapped:
    """Map ``length`` bytes (0: up to the end) of a file from ``offset`` on to ``iova`` of a domain.

    Holes get memory.  ``live_update``: check that just this is there already, in the tables too, and change nothing.
    """
    volume = fs.volume
    hwpt = Hwpt(volume, ino)
    inode = volume.inode(file_ino)
    if inode.flags & TABLES:
        raise FsError(errno.EPERM, f"inode {file_ino} holds page tables: no device may write to them")
    if not stat.S_ISREG(inode.mode) or access not in ACCESS:
        raise FsError(errno.EINVAL, f"inode {file_ino}, access {access!r}: expected a regular file, and rw, ro or wo")
    if not inode.nlink:
        raise FsError(errno.ENOENT, f"inode {file_ino} has no name any more")
    whole = -(-inode.size // PAGE) * PAGE
    length = length or max(whole - offset, 0)
    if offset % PAGE or offset + length > whole or offset < 0:
        rule = f"expected a multiple of 4 KiB, and up to {whole:#x}, where the file ends"
        raise FsError(errno.EINVAL, f"offset {offset:#x}, length {length:#x}: {rule}")
    check_range(hwpt, iova, length)
    for reserved in hwpt.form.reserved:
        if iova < reserved.stop and reserved.start < iova + length:
            rule = f"{hexadecimal(reserved.start, reserved.stop - 1)} never reaches the tables"
            raise FsError(errno.EINVAL, f"IOVAs {hexadecimal(iova, iova + length - 1)}: {rule}")
    if volume.sb.phys_base + volume.region.size > MAX_PHYSICAL:
        raise FsError(errno.EINVAL, "physical addresses beyond 52 bits: no table can hold them")
    mapping = Mapping(file_ino, offset // PAGE, length // PAGE, ACCESS[access])
    again = done_before(fs, request)
    if again is not None:
        return Mapped(iova, length, again)
    first, last = iova // PAGE, (iova + length) // PAGE - 1
    if live_update:
        check_mapped(hwpt, first, mapping)
        return Mapped(iova, length, 0)
    for at, other in hwpt.records.mappings(first, last):
        found = hexadecimal(at * PAGE, (at + other.length) * PAGE - 1)
        raise FsError(errno.EEXIST, f"IOVAs {hexadecimal(iova, iova + length - 1)}: {found} are mapped already")

    def change(roots: Records, compact: bool) -> int:
        hwpt = Hwpt(volume, ino)
        filemap = FileMap(volume, file_ino, volume.inode(file_ino), compact=compact)
        filemap.allocate(mapping.start, mapping.start + mapping.length)
        volume.put_inode(file_ino, filemap.finish())
        pin(volume, file_ino, 1)
        _make_room(hwpt, roots)
        hwpt.prepare(roots)
        editor = hwpt.editor()
        editor.enter(hwpt.record.levels, hwpt.record.root, 0, list(joined(pieces_of(volume, iova, mapping, filemap))))
        hwpt.edited(editor, roots)
        hwpt.records.put(first, MAPPING.pack(mapping))
        hwpt.save()
        return editor.stored

    return Mapped(iova, length, commit(fs, request, change))


def _make_room(hwpt: Hwpt, roots: Records) -> None:
    """Use pages again that tables were in, when they are many and no hardware is looking at them."""
    if hwpt.record.stale >= PAGES_PER_BLOCK // 2 and not hwpt.is_hot(roots):
        hwpt.sweep()


def check_mapped(hwpt: Hwpt, first: int, mapping: Mapping) -> None:
    """Raise FsError when pages from ``first`` on do not say what ``mapping`` says: ENOENT, or EEXIST when they say
    something else; CorruptError when the tables do not."""
    from pkernfs.iommu.translations import differences

    at, end = first, first + mapping.length
    for found, other in hwpt.records.mappings(first, end - 1):
        if found > at:
            break
        same = (other.ino, other.start - found, other.access) == (mapping.ino, mapping.start - first, mapping.access)
        if not same or found < first or found + other.length > end:
            where = hexadecimal(found * PAGE, (found + other.length) * PAGE - 1)
            text = f"IOVAs {where} lead to inode {other.ino} at {other.start * PAGE:#x}, {ACCESS_NAMES[other.access]}"
            raise FsError(errno.EEXIST, text)
        at = found + other.length
    if at < end:
        raise FsError(errno.ENOENT, f"IOVA {at * PAGE:#x} is not mapped: map it without --live-update")
    for text in differences(hwpt, first * PAGE, end * PAGE):
        raise CorruptError(f"domain {hwpt.ino}", hwpt.ino * INODE_SIZE, text, ino=hwpt.ino)


def unmap(fs: Filesystem, ino: int, iova: int, length: int, request: int = 0) -> int:
    """Take [iova, iova + length) from a domain, parts of mappings too; how many bytes were mapped."""
    volume = fs.volume
    hwpt = Hwpt(volume, ino)
    check_range(hwpt, iova, length)
    first, end = iova // PAGE, (iova + length) // PAGE
    again = done_before(fs, request)
    if again is not None:
        return again
    if not any(True for _ in hwpt.records.mappings(first, end - 1)):
        raise FsError(errno.ENOENT, f"IOVAs {hexadecimal(iova, iova + length - 1)}: nothing is mapped there")
    files: set[int] = set()

    def change(roots: Records, compact: bool) -> int:
        hwpt = Hwpt(volume, ino)
        _make_room(hwpt, roots)
        editor = hwpt.editor()
        editor.clear(hwpt.record.levels, hwpt.record.root, iova, iova + length)
        hwpt.edited(editor, roots)
        unmapped = 0
        for at, mapping in list(hwpt.records.mappings(first, end - 1)):
            left, right = max(first - at, 0), max(at + mapping.length - end, 0)
            hwpt.records.delete(at)
            if left:
                hwpt.records.put(at, MAPPING.pack(mapping._replace(length=left)))
            if right:
                rest = mapping._replace(start=mapping.start + mapping.length - right, length=right)
                hwpt.records.put(end, MAPPING.pack(rest))
            pin(volume, mapping.ino, bool(left) + bool(right) - 1)
            files.add(mapping.ino)
            unmapped += mapping.length - left - right
        hwpt.save()
        return unmapped * PAGE

    unmapped = commit(fs, request, change)
    for file_ino in files:
        fs._reap_if_unused(file_ino)
    return unmapped


# -- devices --------------------------------------------------------------------------------------------------------


def attachment_of(roots: Records, requester: int) -> Attachment | None:
    """What a device is attached to."""
    raw = roots.get(ATTACHMENT_KEY + requester)
    return ATTACHMENT.unpack(raw) if raw else None


def attach(fs: Filesystem, ino: int, requester: int, *, persistent: bool = False, request: int = 0) -> None:
    """Lead a device to a domain; or claim it, when that was deferred since the last mount."""
    volume = fs.volume
    Hwpt(volume, ino)
    if done_before(fs, request) is not None:
        return
    before = attachment_of(Records(volume, ROOT_PGTABLES_INO), requester)
    if before and (before.domain != ino or not before.flags & DEFERRED):
        text = f"{pci.text(requester)} is attached to {name_of(fs, before.domain)}: detach it first"
        raise FsError(errno.EBUSY, text)

    def change(roots: Records, compact: bool) -> int:
        hwpt = Hwpt(volume, ino)
        hwpt.prepare(roots)
        flags = PERSISTENT if persistent or (before and before.flags & PERSISTENT) else 0
        if not before:
            contexts = Contexts(volume, roots)
            contexts.store(hwpt.record.tables, requester, hwpt.entry)
            contexts.finish()
        roots.put(ATTACHMENT_KEY + requester, ATTACHMENT.pack(Attachment(ino, hwpt.record.id, flags)))
        hwpt.save()
        return 0

    commit(fs, request, change)


def detach(fs: Filesystem, requester: int, request: int = 0) -> None:
    """Let nothing of a device pass any more."""
    volume = fs.volume
    if done_before(fs, request) is not None:
        return
    if attachment_of(Records(volume, ROOT_PGTABLES_INO), requester) is None:
        raise FsError(errno.ENOENT, f"{pci.text(requester)} is not attached")

    def change(roots: Records, compact: bool) -> int:
        contexts = Contexts(volume, roots)
        cut_off(contexts, requester)
        contexts.finish()
        return 0

    commit(fs, request, change)


def cut_off(contexts: Contexts, requester: int) -> None:
    """Detach a device within the open transaction."""
    roots = contexts.records
    attachment = attachment_of(roots, requester)
    assert attachment is not None
    for number in FORMATS:
        if contexts.entry(number, requester) != DEVICES[number].blocked:
            contexts.block(number, requester)
    roots.delete(ATTACHMENT_KEY + requester)
    add(roots, Invalidation(attachment.id, requester=requester))
    add(roots, Invalidation(attachment.id))


def root_table(fs: Filesystem, form: str, segment: int, request: int = 0) -> int:
    """The physical address of a segment's root table (device table), which is made if there is none."""
    if form not in BY_NAME or not 0 <= segment <= 0xFFFF:
        raise FsError(errno.EINVAL, f"expected vtd or amd and a PCI segment, found {form!r} and {segment!r}")
    number = BY_NAME[form].number
    contexts = Contexts(fs.volume)
    page = contexts.table(number, segment)
    if page:
        return contexts.pages.physical(page)

    def change(roots: Records, compact: bool) -> int:
        contexts = Contexts(fs.volume, roots)
        physical = contexts.pages.physical(contexts.make_table(number, segment))
        contexts.finish()
        return physical

    return commit(fs, request, change)
