"""Who owns which memory: blocks for data, and pages of slabs.

Nothing here raises on a damaged region: what a reader would raise is noted, and the walk goes on.
"""

from __future__ import annotations

from array import array
from typing import Final

from pkernfs.errors import CorruptError, quoted
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_KINDS,
    BLOCK_SLAB,
    FIRST_FREE_SLOT,
    INODES_PER_PAGE,
    MAX_FILE_SIZE,
    NODE_MAGIC,
    PAGE,
    PAGE_DATA,
    PAGE_FAR_COPY,
    PAGE_FREE,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGE_KINDS,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    BlockNo,
    Extent,
    FilePage,
    Ino,
    PageNo,
)
from pkernfs.fs.runs import joined, joined_runs
from pkernfs.fs.slab import Slab
from pkernfs.fs.space import block_of
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.rules import RESERVED
from pkernfs.fsck.findings import DamagedHeader, Data, Findings, UsedAs, UsedAsData, UsedAsSlab
from pkernfs.fsck.problems import Code

SUPERBLOCK_OWNER: Final = Ino((1 << 64) - 1)  #: owns the page of its far copy; no inode has this number


def _goes_on(one: Extent, other: Extent) -> Extent | None:
    """Two extents as one, when the second goes on in memory where the first ends."""
    return one._replace(length=one.length + other.length) if one.page + one.length == other.page else None


class Memory:
    """Owners of data blocks and slab pages (0: none so far), in 8 bytes each.

    What disagrees with the block table and the slab headers does not own anything: it is noted, for a repair to decide
    who is right.  Whoever claims is the inode at work.
    """

    def __init__(self, volume: Volume, findings: Findings) -> None:
        self.region = volume.region
        self.findings = findings
        self.table = volume.space.table
        self.slab_blocks = [BlockNo(block) for block in volume.space.slab_blocks()]
        self.first_block = volume.sb.first_block
        self.far_copy = volume.space.far_copy
        self.total_pages = volume.total_pages
        self.blocks = array("Q", bytes(8 * len(self.table)))
        self.pages: dict[int, array[int]] = {}  #: by block, for slabs
        self.slabs: dict[int, Slab] = {}  #: those whose headers are sound
        self.headless: dict[int, bytearray] = {}  #: the others: kinds of their pages as they are used
        self.disputed_pages: set[PageNo] = set()  #: used as another kind than their slab says
        self.disputed_blocks: set[BlockNo] = set()  #: used whole by a file, and the table has them as something else
        self.misused_blocks: set[BlockNo] = set()  #: data blocks that a file uses in part, or not in their place
        self.empty_slabs: set[BlockNo] = set()  #: disputed blocks that are slabs, with nothing in them
        self._stray_leaves: dict[Ino, list[PageNo]] | None = None  #: by owner

    def owner_of(self, page: PageNo) -> Ino:
        """The inode that owns a page, of a slab or of a data block; 0: none."""
        block, index = block_of(page)
        return Ino(self.pages[block][index] if block in self.pages else self.blocks[block])

    def load_slabs(self) -> None:
        """Decode the headers of all slabs."""
        for block in self.slab_blocks:
            self.pages[block] = array("Q", bytes(8 * PAGES_PER_BLOCK))
            try:
                self.slabs[block] = Slab.decode(self.region.read(block * BLOCK, PAGE), block)
            except CorruptError as error:
                kinds = self.headless[block] = bytearray(PAGES_PER_BLOCK)
                self.findings.note_error(Code.SLAB_HEADER, error, data=DamagedHeader(block, kinds))

    def claim_far_copy(self) -> None:
        """The page of the far copy is the superblock's, whoever else may name it."""
        page = self.far_copy
        block, index = block_of(page)
        if page and block in self.pages and self.claim(page, 1, PAGE_FAR_COPY, "the far copy of the superblock"):
            self.pages[block][index] = SUPERBLOCK_OWNER

    def in_use(self, ino: Ino) -> bool:
        """Whether an inode may be read from the slot; all slots of a damaged slab may."""
        if ino < FIRST_FREE_SLOT:
            return ino in RESERVED
        page, slot = divmod(ino, INODES_PER_PAGE)
        block, index = divmod(page, PAGES_PER_BLOCK)
        if block not in self.pages:
            return False
        slab = self.slabs.get(block)
        return slab is None or (slab.kinds[index] == PAGE_INODES and bool(slab.slots[index] >> slot & 1))

    # -- pages of slabs -------------------------------------------------------------------------------------------

    def claim(self, page: PageNo, count: int, kind: int, what: str) -> bool:
        """The inode at work owns these slab pages; whether that holds for all of them and they can be read."""
        return sum(length for _, length in self.claim_runs(page, count, kind, what)) == count

    def in_slab(self, page: PageNo, what: str) -> bool:
        """Whether the page is one of a slab; noted when it is not."""
        if page // PAGES_PER_BLOCK in self.pages:
            return True
        self._note_no_slab(page, what)
        return False

    def _note_no_slab(self, page: PageNo, what: str) -> None:
        block, _ = block_of(page)
        where, data = "beyond the region", None
        if 0 <= block < len(self.table):
            where, data = BLOCK_KINDS[self.table[block]], UsedAsSlab(block)
        text = f"{what}: expected a page of a slab, found page {page:#x}, which is {where}"
        self.findings.note(Code.PAGE_RANGE, text, data=data)

    def claim_runs(self, page: PageNo, count: int, kind: int, what: str) -> list[tuple[PageNo, int]]:
        """The runs (page, count) of these slab pages that the inode at work owns now."""
        good: list[tuple[PageNo, int]] = []
        tally = self.findings.tally
        for at in range(page, page + count):
            block, index = divmod(at, PAGES_PER_BLOCK)
            owners = self.pages.get(block)
            if owners is None:
                self._note_no_slab(PageNo(at), what)
                break
            slab = self.slabs.get(block)
            tally.pages += 1
            if slab is not None and slab.kinds[index] != kind:
                code = Code.PAGE_FREE if slab.kinds[index] == PAGE_FREE else Code.PAGE_KIND
                found = quoted(PAGE_KINDS[slab.kinds[index]])
                text = f"{what}: expected kind {quoted(PAGE_KINDS[kind])}, found {found}"
                self.findings.note(code, text, offset=at * PAGE, data=UsedAs(PageNo(at), kind))
                self.disputed_pages.add(PageNo(at))
            elif owners[index]:
                self._note_double_use(what, owners[index], at * PAGE)
            else:
                owners[index] = tally.owner
                if slab is None:
                    self.headless[block][index] = kind
                good.append((PageNo(at), 1))
        return [(PageNo(first), number) for first, number in joined_runs(good)]

    def _note_double_use(self, what: str, owner: int, offset: int) -> None:
        other = "the superblock" if owner == SUPERBLOCK_OWNER else f"inode {owner}"
        text = f"{what}: expected memory of its own, found memory that {other} has too"
        self.findings.note(Code.DOUBLE_USE, text, offset=offset)

    # -- extents --------------------------------------------------------------------------------------------------

    def claim_extent(self, extent: Extent) -> list[Extent]:
        """The inode at work owns the memory of ``extent``: whole data blocks and data pages of slabs.

        The parts of the extent for which that holds.
        """
        start, page, left = extent
        tally = self.findings.tally
        what = f"extent {start:#x}+{left:#x} of inode {tally.owner}"
        if not self.first_block * PAGES_PER_BLOCK <= page < page + left <= self.total_pages:
            text = f"{what}: expected pages of the region, found {page:#x} to {page + left:#x}"
            self.findings.note(Code.EXTENT_RANGE, text)
            return []
        if start + left > MAX_FILE_SIZE // PAGE:
            self.findings.note(Code.EXTENT_RANGE, f"{what}: expected an end within {MAX_FILE_SIZE:#x} bytes")
            return []
        good: list[Extent] = []
        while left:
            block, index = block_of(page)
            step = min(left, PAGES_PER_BLOCK - index)
            runs = [(PageNo(page), step)]
            # A sound slab has its header in the first page: none is data as a whole.
            if self.table[block] == BLOCK_SLAB and not (block in self.slabs and step == PAGES_PER_BLOCK):
                runs = self.claim_runs(PageNo(page), step, PAGE_DATA, what)
            else:
                tally.pages += step
                if not self._claim_block(block, start, index, step, what):
                    runs = []
            good += [Extent(FilePage(start + at - page), at, count) for at, count in runs]
            start, page, left = FilePage(start + step), PageNo(page + step), left - step
        return list(joined(good, _goes_on))

    def _claim_block(self, block: BlockNo, start: int, index: int, step: int, what: str) -> bool:
        note = self.findings.note
        kind = self.table[block]
        whole, aligned = step == PAGES_PER_BLOCK, not start % PAGES_PER_BLOCK
        if kind == BLOCK_DATA and not (whole and aligned):
            self.misused_blocks.add(block)
        if not whole and kind == BLOCK_DATA:
            text = f"{what}: expected whole blocks, found {step} pages of block {block} from {index}"
            note(Code.BLOCK_PART, text)
        elif not aligned and kind == BLOCK_DATA:
            text = f"{what}: expected block {block} at a multiple of 2 MiB, found page {start:#x}"
            note(Code.BLOCK_ALIGN, text)
        elif kind != BLOCK_DATA:
            code = Code.BLOCK_FREE if kind == BLOCK_FREE else Code.BLOCK_KIND
            found = quoted(BLOCK_KINDS[kind])
            text = f"{what}: expected block {block} to be {quoted(BLOCK_KINDS[BLOCK_DATA])}, found {found}"
            use: Data = UsedAsSlab(block)
            if whole and aligned:
                use = UsedAsData(block)
                self.disputed_blocks.add(block)
            note(code, text, offset=block * BLOCK, data=use)
        elif self.blocks[block]:
            self._note_double_use(what, self.blocks[block], block * BLOCK)
        else:
            self.blocks[block] = self.findings.tally.owner
            return True
        return False

    # -- for repairs ----------------------------------------------------------------------------------------------

    def is_nobodys(self, page: PageNo, count: int, kind: int) -> bool:
        """Whether these pages were not seen in use, and are of slabs and of that kind, or whole blocks for data."""
        if not self.first_block * PAGES_PER_BLOCK <= page < page + count <= self.total_pages:
            return False
        while count:
            block, index = block_of(page)
            step = min(count, PAGES_PER_BLOCK - index)
            if block in self.pages:
                slab = self.slabs.get(block)
                wrong_kind = slab is not None and slab.kinds[index : index + step] != bytes([kind]) * step
                if wrong_kind or any(self.pages[block][index : index + step]):
                    return False
            elif kind != PAGE_DATA or self.blocks[block] or block in self.disputed_blocks or step != PAGES_PER_BLOCK:
                return False
            page, count = PageNo(page + step), count - step
        return True

    def stray_leaves(self, owner: Ino) -> list[PageNo]:
        """Pages with leaves that name the inode as their owner, and that no node pointed to so far."""
        if self._stray_leaves is None:
            self._stray_leaves = {}
            for block, slab in self.slabs.items():
                for index, kind in enumerate(slab.kinds):
                    if kind == PAGE_NODE:
                        page = PageNo(block * PAGES_PER_BLOCK + index)
                        header = PAGE_HEADER_LAYOUT.unpack(self.region.read(page * PAGE, PAGE_HEADER_LAYOUT.size))
                        if header.magic == NODE_MAGIC and not header.level:
                            self._stray_leaves.setdefault(Ino(header.owner), []).append(page)
        return [page for page in self._stray_leaves.get(owner, ()) if not self.owner_of(page)]
