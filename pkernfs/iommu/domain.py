"""Domains: what iommufd has two objects for, IOAS + HWPT.

A domain is a file in iommu/ with the records of an address space, which say what each IOVA translates to, and with the
page tables that say the same to hardware.

Each change is one transaction.  ``key`` names the request: one that comes again is not executed twice (replies.py).
"""

from __future__ import annotations

import errno
import stat
from contextlib import suppress
from weakref import WeakKeyDictionary

from pkernfs.errors import CorruptError, FsError, quoted
from pkernfs.format import (
    DOMAIN,
    DOMAIN_KEY,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    IOMMU_INO,
    LAST_DOMAIN_ID,
    PAGE,
    ROOT_PGTABLES_INO,
    TABLES_VTD,
    DomainId,
    DomainRecord,
    Ino,
    Iova,
    TablePage,
)
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.iommu.contexts import EMPTY
from pkernfs.iommu.directory import name_of, named_domains
from pkernfs.iommu.edit import Editor, tables_below
from pkernfs.iommu.formats import BY_NAME, ENTRY_OF, FORMATS, TableFormat
from pkernfs.iommu.invalidations import Invalidation, add, is_pending, pending
from pkernfs.iommu.pages import TablePages
from pkernfs.iommu.records import Records, is_attached
from pkernfs.iommu.replies import record_reply, replayed

UNUSED = DomainRecord(tables=TABLES_VTD, levels=4, leaf=3, reserved=0, id=0, root=0, awaiting=0)

#: By volume, while it is open: domains whose tables were found in pages that are marked as used.
_CHECKED: WeakKeyDictionary[Volume, set[Ino]] = WeakKeyDictionary()


def tables_checked(volume: Volume) -> set[Ino]:
    """The domains whose tables need not be looked at again before a page is given away."""
    return _CHECKED.setdefault(volume, set())


class Domain:
    """One domain: its records, and its tables.  Changes end with ``save``."""

    def __init__(self, volume: Volume, ino: Ino) -> None:
        if not volume.inode(ino).flags & FLAG_IOMMU_DOMAIN_PGTABLES:
            raise FsError(errno.EINVAL, f"inode {ino}: expected a domain, a file in iommu/")
        self.volume = volume
        self.ino = ino
        self.records = Records(volume, ino)
        self.record = self._checked(self.records.record(DOMAIN, DOMAIN_KEY) or UNUSED)
        self.pages = TablePages(volume, ino)
        self.pages.awaiting = self.record.awaiting

    def _checked(self, record: DomainRecord) -> DomainRecord:
        form = record.tables in FORMATS and 3 <= record.levels <= 5 and 1 <= record.leaf <= 3
        if not form or record.id > LAST_DOMAIN_ID:
            found = f"format {record.tables}, levels {record.levels}, leaf {record.leaf}, id {record.id}"
            wanted = f"format {' or '.join(map(str, FORMATS))}, levels 3 to 5, leaf 1 to 3, id up to {LAST_DOMAIN_ID}"
            raise corrupt_inode(self.ino, f"expected {wanted}, found {found}", f"domain {self.ino}")
        return record

    def check_named(self) -> None:
        """Raise FsError(ENOENT) for a domain that was removed and is only still open: it is not to be used any more."""
        if not self.volume.inode(self.ino).nlink:
            raise FsError(errno.ENOENT, f"inode {self.ino}: the domain was removed")

    @property
    def form(self) -> TableFormat:
        """The format of its tables."""
        return FORMATS[self.record.tables]

    @property
    def root(self) -> TablePage:
        """The page of the root of its tables; 0, which is a bitmap: there is none yet."""
        return TablePage(self.record.root)

    @property
    def id(self) -> DomainId:
        """Its domain id."""
        return DomainId(self.record.id)

    @property
    def aperture(self) -> int:
        """IOVAs are below this."""
        return PAGE << 9 * self.record.levels

    @property
    def entry(self) -> tuple[int, ...]:
        """The words that point a device to the tables of this domain."""
        record = self.record
        return ENTRY_OF[record.tables](self.pages.physical(self.root), record.levels, self.id)

    def prepare(self, tx: Transaction, roots: Records) -> None:
        """See to it that there are an id and a root table."""
        if not self.id:
            self.record = self.record._replace(id=new_id(self.volume, roots))
        if not self.root:
            page = self.pages.allocate(tx)
            self.pages.store(page, EMPTY)
            self.record = self.record._replace(root=page)

    def hw_may_access(self, roots: Records) -> bool:
        """Whether hardware may be looking at the tables, or has cached what they say."""
        return is_attached(roots, self.ino) or is_pending(roots, self.id)

    def editor(self, tx: Transaction, leaf: int = 0) -> Editor:
        """For changes of the tables.

        Raises CorruptError when a page of a table is marked as free, and would be given away though hardware walks it;
        that is looked at once for each domain and mount, as it reads all of the tables.
        """
        checked = tables_checked(self.volume)
        if self.root and self.ino not in checked:
            for _ in tables_below(self.form, self.pages, self.record.levels, self.root):
                pass
            checked.add(self.ino)
        return Editor(tx, self.form, self.pages, leaf or self.record.leaf)

    def edited(self, tx: Transaction, editor: Editor, roots: Records) -> None:
        """Account for what an editor has given up."""
        self.record = self.record._replace(awaiting=self.record.awaiting + len(editor.given_up))
        if editor.end and self.hw_may_access(roots):
            add(tx, roots, Invalidation(self.id, iova=Iova(editor.first), length=editor.end - editor.first))

    def reclaim(self, tx: Transaction) -> int:
        """Free the pages that tables were in, of which hardware has nothing cached any more.  How many."""
        tables: set[TablePage] = set()
        if self.root:
            tables.update(tables_below(self.form, self.pages, self.record.levels, self.root))
        self.record = self.record._replace(awaiting=0)
        return self.pages.use_only(tx, tables)

    def save(self, tx: Transaction) -> None:
        """Put everything into the transaction."""
        self.pages.finish(tx)
        self.records.put(tx, DOMAIN_KEY, DOMAIN.pack(self.record))
        self.records.finish(tx)


# -- all of them ----------------------------------------------------------------------------------------------------


def new_id(volume: Volume, roots: Records) -> DomainId:
    """The least domain id that is not in use, and that hardware has nothing cached of.  Raises FsError(ENOSPC)."""
    used = {one.id for one in pending(roots)} | {attachment.id for _, attachment in roots.attachments()}
    for _, ino in named_domains(volume):
        # Of one that is damaged only the ids count that devices and caches have of it.
        with suppress(CorruptError):
            record = Records(volume, ino).record(DOMAIN, DOMAIN_KEY)
            used.add(record.id if record else 0)
    for number in range(1, LAST_DOMAIN_ID + 1):
        if number not in used:
            return DomainId(number)
    raise FsError(errno.ENOSPC, f"{LAST_DOMAIN_ID} domain ids are in use")


# -- making and removing them -----------------------------------------------------------------------------------------


def create(fs: Filesystem, name: bytes, form: str, levels: int, caller: Caller, key: int = 0) -> Ino:
    """A new domain with its first 2 MiB; its inode."""
    if form not in BY_NAME or not 3 <= levels <= 5:
        found = f"{quoted(form)} and {levels}"
        raise FsError(errno.EINVAL, f"expected the format vtd or amd and 3 to 5 levels, found {found}")
    again = replayed(fs, key)
    if again is not None:
        return Ino(again)

    def init_inode(tx: Transaction, ino: Ino) -> None:
        domain = Domain(fs.volume, ino)
        domain.record = domain.record._replace(tables=BY_NAME[form].number, levels=levels)
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        domain.prepare(tx, roots)
        domain.save(tx)
        record_reply(tx, roots, key, ino)

    return fs.create(IOMMU_INO, name, stat.S_IFREG | 0o600, caller, init_inode=init_inode)


def destroy(fs: Filesystem, ino: Ino, key: int = 0) -> bytes | None:
    """Remove a domain that no device is attached to, and all its mappings; its name, None when that was done before."""
    if replayed(fs, key) is not None:
        return None
    Domain(fs.volume, ino)
    name = name_of(fs.volume, ino)
    if name is None:
        raise FsError(errno.ENOENT, f"inode {ino}: the domain has no name")

    def note(tx: Transaction) -> None:
        record_reply(tx, Records(fs.volume, ROOT_PGTABLES_INO), key)

    fs.unlink(IOMMU_INO, name, in_same_transaction=note)
    return name
