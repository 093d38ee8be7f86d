"""The walk of a check: inodes, what they hold, and the names in directories."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pkernfs.errors import CorruptError
from pkernfs.format import (
    DIRENT,
    EXTENT,
    EXTENT_VALUE,
    FIRST_FREE_SLOT,
    FLAG_DIR,
    FLAG_FILE,
    FLAG_IOMMU_DIR,
    FLAG_IOMMU_ROOT_PGTABLES,
    INLINE_EXTENTS,
    INLINE_SIZE,
    INODES_PER_PAGE,
    IOMMU_INO,
    KEY_SLOTS,
    MAX_FILE_SIZE,
    ORPHANS_INO,
    PAGE,
    PAGE_XATTR,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    SYMLINK_MAX,
    XATTR_HEAD,
    Dirent,
    Extent,
    ExtentValue,
    Inode,
    checksum,
    name_key,
)
from pkernfs.fs.check_ledger import Ledger, Tally
from pkernfs.fs.directory import Directory, Entry
from pkernfs.fs.pages import read_inode
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Attribute, Xattrs

TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}

#: inode -> (type, flags) of the slots that mkfs fills
RESERVED: dict[int, tuple[int, int]] = {
    ROOT_INO: (stat.S_IFDIR, FLAG_DIR),
    ORPHANS_INO: (stat.S_IFREG, FLAG_FILE),
    IOMMU_INO: (stat.S_IFDIR, FLAG_DIR | FLAG_IOMMU_DIR),
    ROOT_PGTABLES_INO: (stat.S_IFREG, FLAG_FILE | FLAG_IOMMU_ROOT_PGTABLES),
}


def is_extent(value: bytes) -> bool:
    """Whether a value can stand in a tree of extents."""
    return len(value) == EXTENT_VALUE.size


def is_entry(value: bytes) -> bool:
    """Whether a value can stand in a directory."""
    return len(value) > DIRENT.size and DIRENT.unpack(value).length == len(value) - DIRENT.size


def is_attribute(value: bytes) -> bool:
    """Whether a value can stand in a tree of attributes."""
    return len(value) > XATTR_HEAD.size and not is_entry(value)


class Salvage(NamedTuple):
    """What remains of a structure of an inode: extents, entries or attributes."""

    items: list[tuple[int, bytes]]  #: key (may be the wrong one, for names) and value
    nodes: list[int]  #: pages of the tree as it is
    dropped: list[str]  #: what is not among the items


class Walk:
    """What was reached so far.  The tests of one inode or entry note problems in the ledger.

    For a repair: ``fixes``, fields that inodes should have; ``bad``, inodes that cannot be kept, and why; and with
    ``salvage``, what can be kept of structures that cannot stay as they are.
    """

    def __init__(self, volume: Volume, *, salvage: bool = False) -> None:
        self.volume = volume
        self.region = volume.region
        self.ledger = Ledger(volume, salvage=salvage)
        self.fixes: dict[int, dict[str, Any]] = {}
        self.bad: dict[int, str] = {}
        self.salvaged: dict[tuple[int, str], Salvage] = {}  #: by inode and the field of the root, "root" or "xattrs"
        self.wrong_slots: dict[int, int] = {}  #: inodes that are named, and whose slots are free: type
        self.note = self.ledger.note
        self.files = 0
        self.directories = 0
        self.seen: dict[int, int] = {}  #: by page of inodes: bitmap of the slots that were reached
        self.names_left: dict[int, int] = {}  #: files of which not all names, or too many, were found yet
        self.says_listed: set[int] = set()  #: inodes that say they are on the list of orphans
        self.listed: set[int] = set()  #: those that are
        self._todo: list[int] = []  #: directories to walk
        self._damaged: set[int] = set()  #: inodes whose damage was noted

    # -- inodes ---------------------------------------------------------------------------------------------------

    def in_use(self, ino: int) -> bool:
        """Whether an inode may be read from the slot."""
        return self.ledger.slot_in_use(ino) and ino < self.volume.total_pages * INODES_PER_PAGE

    def mark(self, ino: int) -> bool:
        """Note that the inode was reached; whether for the first time."""
        page, slot = divmod(ino, INODES_PER_PAGE)
        seen = self.seen.get(page, 0)
        self.seen[page] = seen | 1 << slot
        return not seen >> slot & 1

    def inode(self, ino: int) -> Inode | None:
        """The inode; None when it is damaged, which is noted once."""
        try:
            return read_inode(self.region, ino)
        except CorruptError as error:
            if ino not in self._damaged:
                self._damaged.add(ino)
                self.bad[ino] = "damaged"
                self.ledger.note_damage("inode-checksum", error, ino=ino)
            return None

    def correct(self, ino: int, **fields: Any) -> None:
        """Note what fields of an inode should be."""
        self.fixes.setdefault(ino, {}).update(fields)

    def content(self, ino: int, inode: Inode) -> None:
        """The inode itself and all that it holds; directories have their entries put on the list of things to do."""
        outer, self.ledger.tally = self.ledger.tally, Tally(ino)
        what = f"inode {ino:#x}"
        kind = stat.S_IFMT(inode.mode)
        is_file, is_dir = kind == stat.S_IFREG, kind == stat.S_IFDIR
        if kind not in TYPES or inode.mode >> 16:
            self.note("inode-mode", f"{what}: expected a type and permissions, found mode {inode.mode:o}")
            if kind in TYPES:
                self.correct(ino, mode=inode.mode & 0xFFFF)
            else:
                self.bad[ino] = "of no type"
        elif inode.flags & (FLAG_FILE | FLAG_DIR) != FLAG_FILE * is_file + FLAG_DIR * is_dir:
            self.note("inode-flags", f"{what}: expected the flags of mode {inode.mode:o}, found {inode.flags:#x}")
            flags = inode.flags & ~(FLAG_FILE | FLAG_DIR) | FLAG_FILE * is_file | FLAG_DIR * is_dir
            self.correct(ino, flags=RESERVED[ino][1] if ino in RESERVED else flags)
        if not is_dir and inode.parent:
            self.note("inode-parent", f"{what}: expected no parent, found {inode.parent:#x}")
            self.correct(ino, parent=0)
        if inode.orphan_next or inode.orphan_prev:
            self.says_listed.add(ino)
        if inode.xattrs:
            self._attributes(ino, inode)
        if is_dir:
            self.directories += 1
            self._entries(ino, inode)
        else:
            self.files += 1
            target = kind == stat.S_IFLNK and inode.size <= INLINE_SIZE
            limit = MAX_FILE_SIZE if is_file else SYMLINK_MAX if kind == stat.S_IFLNK else 0
            if inode.size > limit:
                self.note("inode-size", f"{what}: expected at most {limit} bytes, found {inode.size}")
                self.correct(ino, size=limit)
            if target and (inode.root or inode.inline[inode.size :].strip(b"\0")):
                self.note("symlink", f"{what}: expected a target of {inode.size} bytes, found {inode.inline!r}")
                self.correct(ino, root=0, inline=inode.inline[: inode.size] + bytes(INLINE_SIZE - inode.size))
            elif not target and limit:
                self._extents(ino, inode)
            elif not limit and (inode.root or inode.inline.strip(b"\0")):
                self.note("inode-content", f"{what}: expected no content for mode {inode.mode:o}, found some")
                self.correct(ino, root=0, inline=bytes(INLINE_SIZE))
        self.check_pages(ino, inode)
        self.ledger.tally = outer

    def check_pages(self, ino: int, inode: Inode) -> None:
        """The inode counts the pages that it holds."""
        if self.ledger.tally.sound and self.ledger.tally.pages != inode.pages:
            held = self.ledger.tally.pages
            self.note("inode-pages", f"inode {ino:#x}: expected {held} pages, found a count of {inode.pages}")
            self.correct(ino, pages=held)

    def _items(self, root: int, fits: Callable[[bytes], bool]) -> Iterable[tuple[int, bytes]]:
        """The items of a tree; in the order of their keys even where nodes are not, when they are to be salvaged."""
        items = self.ledger.tree(root, fits)
        return sorted(items) if self.ledger.salvage else items

    def _keep(self, ino: int, field: str, kept: list[tuple[int, bytes]], dropped: list[str]) -> None:
        """Note what can be kept of a structure that has to change."""
        if self.ledger.salvage and (dropped or self.ledger.tally.broken):
            self.salvaged[ino, field] = Salvage(kept, self.ledger.tally.nodes, dropped)

    def _extents(self, ino: int, inode: Inode) -> None:
        """Of two extents that overlap the first is the one that is too long, for each says where it begins."""
        kept: list[tuple[int, bytes]] = []
        dropped: list[str] = []
        for extent, end in self._ordered(ino, inode, dropped):
            claimed = extent._replace(length=min(extent.length, end - extent.start))
            good = self.ledger.claim_extent(claimed)
            if good != [extent]:
                dropped.append(f"memory of pages {extent.start:#x}+{extent.length:#x} of the file")
            if self.ledger.salvage:
                kept += [(e.start, EXTENT_VALUE.pack(ExtentValue(e.page, e.length))) for e in good]
        self._keep(ino, "root", kept, dropped)

    def _ordered(self, ino: int, inode: Inode, dropped: list[str]) -> Iterator[tuple[Extent, int]]:
        """The extents, each with the page of the file where it must end."""
        last: Extent | None = None
        for extent in self._all_extents(ino, inode, dropped):
            if last:
                if extent.start < last.start + last.length:
                    self.note("extent-order", f"inode {ino:#x}: expected a start behind {last}, found {extent}")
                if extent.start <= last.start:
                    dropped.append(f"memory of pages {extent.start:#x}+{extent.length:#x} of the file")
                    continue
                yield last, extent.start
            last = extent
        if last:
            yield last, last.start + last.length

    def _all_extents(self, ino: int, inode: Inode, dropped: list[str]) -> Iterator[Extent]:
        if not inode.root:
            self.ledger.tally.nodes, self.ledger.tally.broken = [], False
            for at in range(0, INLINE_EXTENTS * EXTENT.size, EXTENT.size):
                extent = EXTENT.unpack(inode.inline, at)
                if not extent.length:
                    if inode.inline[at:].strip(b"\0"):
                        self.note("extent-value", f"inode {ino:#x}: expected {at // EXTENT.size} extents, found more")
                        dropped.append("what stood behind the extents")
                    return
                yield extent
            return
        for key, value in self._items(inode.root, is_extent):
            if not is_extent(value):
                self.note("extent-value", f"inode {ino:#x}: expected 16 bytes, found an extent of {len(value)}")
                dropped.append("an extent that cannot be read")
            else:
                yield Extent(key, *EXTENT_VALUE.unpack(value))

    def _attributes(self, ino: int, inode: Inode) -> None:
        xattrs = Xattrs(self.volume, ino, inode)
        names: dict[int, set[bytes]] = {}
        kept: list[tuple[int, bytes]] = []
        dropped: list[str] = []
        for key, item in self._items(inode.xattrs, is_attribute):
            try:
                attribute = xattrs._attribute(key, item)
            except CorruptError as error:
                self.note("xattr", f"{error.what}: {error.found}", offset=error.offset)
                dropped.append("an attribute that cannot be read")
                continue
            what = f"attribute {attribute.name!r} of inode {ino:#x}"
            good = self._hashed(key, attribute.name, names, what)
            if attribute.head.external and not self._external(attribute, what):
                good = False
            if not good:
                dropped.append(f"attribute {attribute.name!r}")
            elif self.ledger.salvage:
                kept.append((key, item))
        self._keep(ino, "xattrs", kept, dropped)

    def _external(self, attribute: Attribute, what: str) -> bool:
        """Whether the pages and the checksum of a value that stands outside the tree are sound."""
        payload, size = attribute.payload, attribute.head.size
        runs = [EXTENT_VALUE.unpack(payload, at) for at in range(0, len(payload), EXTENT_VALUE.size)]
        if any(not run.length for run in runs) or sum(run.length for run in runs) != -(-size // PAGE):
            self.note("xattr", f"{what}: expected the pages of {size} bytes, found {runs}")
            return False
        readable = [self.ledger.claim(run.page, run.length, PAGE_XATTR, what) for run in runs]
        if not all(readable):
            return False
        value = b"".join(self.region.read(run.page * PAGE, run.length * PAGE) for run in runs)[:size]
        if checksum(value) != attribute.head.checksum:
            found = f"expected checksum {attribute.head.checksum:#010x}, found {checksum(value):#010x}"
            self.note("xattr-value", f"{what}: {found}", offset=runs[0].page * PAGE)
            return False
        return True

    def _hashed(self, key: int, name: bytes, names: dict[int, set[bytes]], what: str) -> bool:
        """A name stands at a key that its hash allows, once; whether it is the first of its kind.

        ``names``: those with the hash of the one before it.
        """
        first = name_key(self.volume.sb.hash_seed, name)
        if not first <= key < first + KEY_SLOTS:
            self.note("name-key", f"{what}: expected key {first:#x} or a little more, found {key:#x}")
            self.ledger.tally.broken = True
        if first not in names:
            names.clear()
        near = names.setdefault(first, set())
        if name in near:
            self.note("name-twice", f"{what}: expected it once, found it again")
            return False
        near.add(name)
        return True

    # -- directories ----------------------------------------------------------------------------------------------

    def reach(self, ino: int, inode: Inode) -> None:
        """An inode that no name led to, and what is below it."""
        if stat.S_ISDIR(inode.mode):
            self.walk(ino)
        else:
            self.content(ino, inode)

    def walk(self, ino: int) -> None:
        """Directory ``ino`` and all below it; a list and no recursion, for names may be nested without a limit."""
        self._todo.append(ino)
        while self._todo:
            ino = self._todo.pop()
            inode = self.inode(ino)
            if inode:
                self.content(ino, inode)

    def _entries(self, ino: int, inode: Inode) -> None:
        directory = Directory(self.volume, ino, inode)
        names: dict[int, set[bytes]] = {}
        kept: list[tuple[int, bytes]] = []
        dropped: list[str] = []
        count = 0
        links = 2
        for key, value in self._items(inode.root, is_entry):
            count += 1
            try:
                entry = directory._entry(key, value)
            except CorruptError as error:
                self.ledger.note_damage("dirent", error)
                dropped.append(f"a name that cannot be, {value[DIRENT.size :]!r}")
                continue
            first = self._hashed(key, entry.name, names, f"{entry.name!r} in directory {ino:#x}")
            is_dir, mode = self._entry(ino, entry)
            links += is_dir
            if not mode or mode != entry.mode or not first:
                dropped.append(f"{'the type of ' * bool(mode and first)}the name {entry.name!r}")
            if mode and first and self.ledger.salvage:
                kept.append((key, DIRENT.pack(Dirent(entry.ino, mode, len(entry.name))) + entry.name))
        self._keep(ino, "root", kept, dropped)
        if not self.ledger.tally.sound:
            return
        if count != inode.size:
            self.note("directory-size", f"directory {ino:#x}: expected a size of {count} entries, found {inode.size}")
            self.correct(ino, size=count)
        if inode.nlink != links and (inode.nlink or count):
            self.note("link-count", f"directory {ino:#x}: expected nlink {links}, found {inode.nlink}")
            self.correct(ino, nlink=links)

    def _entry(self, parent: int, entry: Entry) -> tuple[bool, int]:
        """One name: the inode that it stands for.  Whether that is a subdirectory; the type it has, 0: name it not."""
        ino = entry.ino
        what = f"{entry.name!r} in directory {parent:#x}"
        if not self.in_use(ino) or (ino < FIRST_FREE_SLOT and ino not in RESERVED) or ino == ORPHANS_INO:
            self.note("dirent-dangling", f"{what}: expected an inode in use, found {ino:#x}, which is free")
            if ino >= FIRST_FREE_SLOT:
                self.wrong_slots.setdefault(ino, entry.mode)
            return stat.S_ISDIR(entry.mode), 0
        first = self.mark(ino)
        inode = self.inode(ino)
        if inode is None:
            return stat.S_ISDIR(entry.mode), entry.mode
        if entry.mode != stat.S_IFMT(inode.mode):
            self.note("dirent-mode", f"{what}: expected mode {stat.S_IFMT(inode.mode):o}, found {entry.mode:o}")
        kind = stat.S_IFMT(inode.mode)
        if not stat.S_ISDIR(inode.mode):
            self._file_name(ino, inode, first=first)
            return False, kind
        if not first:
            self.note("directory-names", f"{what}: expected one name of directory {ino:#x}, found another")
            return True, 0
        if inode.parent != parent:
            self.note("directory-parent", f"{what}: expected parent {parent:#x}, found {inode.parent:#x}", ino=ino)
            self.correct(ino, parent=parent)
        if not inode.nlink:
            self.note("link-count", f"directory {ino:#x}: expected nlink 2 or more, found 0", ino=ino)
            self.correct(ino, nlink=2)
        self._todo.append(ino)
        return True, kind

    def _file_name(self, ino: int, inode: Inode, *, first: bool) -> None:
        left = (inode.nlink if first else self.names_left.get(ino, 0)) - 1
        if left:
            self.names_left[ino] = left
        else:
            self.names_left.pop(ino, None)
        if first:
            self.content(ino, inode)
