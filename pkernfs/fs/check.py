"""The core of fsck.pkernfs: all invariants of the format.

    check(volume) -> [Problem, ...]

``Checker.PASSES`` is the order: each pass is a method that notes what does not hold, and later passes use what earlier
ones found (a repair of one invariant can stand beside its method).  Nothing is written and no damage raises; where a
structure cannot be read, ``Ledger.incomplete`` keeps the last passes from taking what is below it for lost.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from typing import ClassVar

from pkernfs.errors import CorruptError, FormatError, PkernfsError
from pkernfs.format import (
    BLOCK,
    BLOCK_META,
    FIRST_FREE_SLOT,
    INODE,
    INODE_SIZE,
    INODES_PER_PAGE,
    IOMMU_INO,
    JOURNAL_HEADER,
    JOURNAL_MAGIC,
    ORPHANS_INO,
    PAGE,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGES_PER_BLOCK,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    SUPERBLOCK,
    SUPERBLOCK_CHECKED,
    TABLE_FANOUT,
    TABLE_MAGIC,
    geometry,
)
from pkernfs.fs.check_ledger import Problem, Tally
from pkernfs.fs.check_walk import RESERVED, Walk
from pkernfs.fs.directory import Directory
from pkernfs.fs.pages import check_page, read_inode
from pkernfs.fs.volume import Volume
from pkernfs.region import Region, check_superblock


class Checker(Walk):
    """One check of one volume.  ``run`` once; then ``problems``, ``files`` and ``directories`` tell what there is.

    ``progress`` is called with the name of each pass.  ``salvage``: find what a repair can keep, too.
    """

    def __init__(self, volume: Volume, *, salvage: bool = False, progress: Callable[[str], None] | None = None) -> None:
        super().__init__(volume, salvage=salvage)
        self.problems = self.ledger.problems
        self.progress = progress
        self.lost: list[int] = []  #: inodes with a count of names, and without a name
        self.unlisted: list[int] = []  #: inodes without names that are not in the list of orphans
        self.slots_elsewhere: list[int] = []  #: pages that hold no inodes, and have slots in use
        self.free_slots: list[int] = []  #: free slots that are not empty

    def run(self) -> list[Problem]:
        """All passes, in order."""
        for one in self.PASSES:
            if self.progress:
                self.progress(one.__name__.replace("_", " "))
            self.ledger.tally = Tally(0)
            one(self)
        return self.problems

    # -- the frame ------------------------------------------------------------------------------------------------

    def superblocks(self) -> None:
        """Both copies are sound and equal."""
        sb = self.volume.sb
        copies = [self.region.read(at, SUPERBLOCK.size) for at in (0, sb.journal_offset)]
        for offset, raw in zip((0, sb.journal_offset), copies, strict=True):
            try:
                check_superblock(raw, self.region.size, f"superblock at {offset:#x}", readonly=True)
            except FormatError as error:
                self.note("superblock", error.text, offset=offset)
                return
        if copies[0][:SUPERBLOCK_CHECKED] != copies[1][:SUPERBLOCK_CHECKED]:
            self.note("superblock", "expected equal superblocks, found two that differ", offset=sb.journal_offset)

    def journal(self) -> None:
        """No transaction waits to be applied: opening the volume replayed it."""
        at = self.volume.journal.header_at
        header = JOURNAL_HEADER.unpack(self.region.read(at, JOURNAL_HEADER.size))
        if header.seal & 1:
            self.note("journal", f"expected no transaction to apply, found seal {header.seal:#x}", offset=at)
        elif header.magic != JOURNAL_MAGIC:
            self.note("journal", f"journal magic: expected {JOURNAL_MAGIC:#x}, found {header.magic:#x}", offset=at)

    def block_table(self) -> None:
        """The pages of the table are sound, and exactly the first blocks are metadata."""
        sb = self.volume.sb
        table = bytearray()
        for index in range(sb.table_pages):
            offset = PAGE + index * PAGE
            raw = self.region.read(offset, PAGE)
            try:
                check_page(raw, TABLE_MAGIC, offset, index, f"page {index} of the block table")
            except CorruptError as error:
                self.ledger.note_damage("block-table", error)
                return
            table += raw[PAGE_HEADER_LAYOUT.size :]
        wanted = bytes([BLOCK_META]) * sb.first_block
        if table[: sb.first_block] != wanted or table.count(BLOCK_META) != sb.first_block:
            self.note("block-kind", f"expected metadata in blocks 0 to {sb.first_block - 1} and nowhere else")
        if table[: sb.blocks] != self.volume.allocator.table or any(table[sb.blocks : sb.table_pages * TABLE_FANOUT]):
            self.note("block-table", "expected the kinds that the volume was opened with, and zeros behind them")

    def slab_headers(self) -> None:
        """The headers of slabs are sound, and only pages of inodes have slots in use."""
        self.ledger.load_slabs()
        for block, slab in self.ledger.slabs.items():
            for index, bits in enumerate(slab.slots):
                if bits and slab.kinds[index] != PAGE_INODES:
                    page = block * PAGES_PER_BLOCK + index
                    self.slots_elsewhere.append(page)
                    self.note(
                        "slab-slots", f"page {page:#x} holds no inodes, found slots {bits:#x}", offset=page * PAGE
                    )

    def reserved_inodes(self) -> None:
        """The slots in block 0 hold what mkfs made, and nothing else."""
        for ino in range(1, FIRST_FREE_SLOT):
            inode = self.inode(ino)
            kind, flags = RESERVED.get(ino, (0, 0))
            found = (stat.S_IFMT(inode.mode), inode.flags) if inode else (kind, flags)
            if ino == ORPHANS_INO and inode and (inode.pages or inode.root or inode.size or inode.xattrs):
                self.note("reserved-inode", f"inode {ino}: expected the head of a list, found content", ino=ino)
                self.correct(ino, pages=0, root=0, size=0, xattrs=0)
            if found != (kind, flags):
                self.note(
                    "reserved-inode", f"inode {ino}: expected type, flags {kind:o}, {flags}, found {found}", ino=ino
                )
                if kind and found[0] == kind:
                    self.correct(ino, flags=flags)
                else:
                    self.bad[ino] = "not what belongs there"

    # -- the walk -------------------------------------------------------------------------------------------------

    def names(self) -> None:
        """Everything below the root, and what it holds."""
        self.mark(ORPHANS_INO)
        self.mark(ROOT_INO)
        root = self.inode(ROOT_INO)
        if root and root.parent != ROOT_INO:
            self.note("directory-parent", f"the root: expected itself as parent, found {root.parent}", ino=ROOT_INO)
            self.correct(ROOT_INO, parent=ROOT_INO)
        self.walk(ROOT_INO)

    def orphans(self) -> None:
        """The list of orphans is sound, and all that have no name, or say that they are listed, are on it."""
        head = self.inode(ORPHANS_INO)
        if head is None:
            return
        before, ino = int(ORPHANS_INO), head.orphan_next
        while ino != ORPHANS_INO:
            inode = self.inode(ino) if self.in_use(ino) else None
            if inode is None or ino in self.listed:
                found = "one that is listed already" if inode else "no inode"
                self.ledger.note_unread(
                    "orphan-list", f"after inode {before:#x}: expected another, found {found}", ino=ino
                )
                return
            self.listed.add(ino)
            if inode.orphan_prev != before:
                found = f"{inode.orphan_prev:#x}"
                self.note("orphan-links", f"orphan {ino:#x}: expected {before:#x} before it, found {found}", ino=ino)
            if not inode.nlink and self.mark(ino):
                self.reach(ino, inode)
            before, ino = ino, inode.orphan_next
        if head.orphan_prev != before:
            self.note("orphan-links", f"list of orphans: expected {before:#x} as last, found {head.orphan_prev:#x}")
        for ino in self.says_listed - self.listed:
            self.note("orphan-links", f"inode {ino:#x}: expected it in the list of orphans, found it missing", ino=ino)

    def lost_inodes(self) -> None:
        """Every slot in use was reached, and free slots are empty."""
        for ino in map(int, (IOMMU_INO, ROOT_PGTABLES_INO)):
            if not self.ledger.incomplete and self.mark(ino):
                self.note("inode-lost", f"inode {ino}: expected a name, found none", ino=ino)
                self.lost.append(ino)
                inode = self.inode(ino)
                if inode:
                    self.reach(ino, inode)
        for ino in self._lost_slots():
            self._lost(ino)

    def _lost_slots(self) -> list[int]:
        """The slots that are in use and were not reached: those that others of them name at the end."""
        found: list[int] = []
        for block, slab in self.ledger.slabs.items():
            index = slab.kinds.find(PAGE_INODES)
            while index >= 0:
                first = (block * PAGES_PER_BLOCK + index) * INODES_PER_PAGE
                lost = slab.slots[index] & ~self.seen.get(first // INODES_PER_PAGE, 0)
                for slot in range(INODES_PER_PAGE):
                    if lost >> slot & 1:
                        found.append(first + slot)
                    elif not slab.slots[index] >> slot & 1:
                        self._free_slot(first + slot)
                index = slab.kinds.find(PAGE_INODES, index + 1)
        if self.ledger.incomplete:
            return []
        named = {child for ino in found for child in self._named_by(ino)}
        return sorted(found, key=named.__contains__)

    def _named_by(self, ino: int) -> list[int]:
        """The inodes that a lost directory names: nothing is claimed or noted, and what is damaged names none."""
        try:
            inode = read_inode(self.region, ino)
            if not stat.S_ISDIR(inode.mode) or not inode.root:
                return []
            return [entry.ino for entry in Directory(self.volume, ino, inode).scan() if entry.ino != ino]
        except (PkernfsError, struct.error):
            return []

    def _lost(self, ino: int) -> None:
        """A slot that is in use, and that no name and no list led to."""
        if self.ledger.incomplete or not self.mark(ino):
            return
        inode = self.inode(ino)
        if inode is None:
            return
        if not inode.mode:
            self.note("inode-mode", f"inode {ino:#x}: the slot is in use, found an empty one", ino=ino)
            self.bad[ino] = "empty"
        elif not inode.nlink:
            self.note("orphan-unlisted", f"inode {ino:#x}: no name left, found it missing in the list", ino=ino)
            self.unlisted.append(ino)
        else:
            self.note("inode-lost", f"inode {ino:#x}: expected {inode.nlink} names, found none", ino=ino)
            self.lost.append(ino)
        if inode.mode:
            self.reach(ino, inode)

    def _free_slot(self, ino: int) -> None:
        mode = int.from_bytes(self.region.read(ino * INODE_SIZE + INODE.offsets["mode"], 4), "little")
        found = f"mode {mode:o} in it" if mode else ""
        try:
            read_inode(self.region, ino)
        except CorruptError as error:
            # Whoever takes the slot reads its generation first.
            found = error.found
        if found:
            self.free_slots.append(ino)
            self.note("inode-free", f"inode {ino:#x}: the slot is free, found {found}", ino=ino)

    def link_counts(self) -> None:
        """Files have as many names as they say (directories were compared in the walk)."""
        for ino, left in self.names_left.items():
            if left < 0 or (left and not self.ledger.incomplete):
                inode = self.inode(ino)
                links = inode.nlink if inode else 0
                self.note("link-count", f"inode {ino:#x}: expected nlink {links - left}, found {links}", ino=ino)
                self.correct(ino, nlink=links - left)

    def leaks(self) -> None:
        """Memory that is allocated has an owner."""
        if not self.ledger.incomplete:
            self.ledger.note_leaks()

    #: The order of the passes.
    PASSES: ClassVar[tuple[Callable[[Checker], None], ...]] = (
        superblocks,
        journal,
        block_table,
        slab_headers,
        reserved_inodes,
        names,
        orphans,
        lost_inodes,
        link_counts,
        leaks,
    )


def check(volume: Volume) -> list[Problem]:
    """All invariants of the format; the problems found.  Never raises on a damaged region, and never writes.

    No transaction may be open.  What is in the region counts, not what the volume holds decoded.
    """
    return Checker(volume).run()


def check_region(region: Region, progress: Callable[[str], None] | None = None) -> tuple[list[Problem], Checker | None]:
    """Open the volume in ``region`` and check it.  The journal is replayed: in memory, when the region is read-only.

    Where the superblock, the journal or the block table is damaged the volume cannot be opened: that is the one problem
    then, and the Checker is None.  Raises FormatError when neither copy of the superblock can be used.
    """
    try:
        checker = Checker(Volume(region), progress=progress)
    except CorruptError as error:
        code = "journal" if "journal" in error.what else "block-table"
        return [Problem(code, f"{error.what}: {error.found}", 0, error.offset)], None
    except FormatError as error:
        copy_at = geometry(region.size // BLOCK).journal_offset
        try:
            check_superblock(region.read(copy_at, SUPERBLOCK.size), region.size, "copy", readonly=True)
        except FormatError:
            raise error from None
        return [Problem("superblock", f"{error.text}; the copy at {copy_at:#x} is sound")], None
    return checker.run(), checker


__all__ = ["Checker", "Problem", "check", "check_region"]
