"""The ledger of a check: who owns each block and page, and the problems found.

Nothing here raises on a damaged region: what a reader would raise is noted as a Problem, and the walk goes on.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_FREE,
    BLOCK_KINDS,
    BLOCK_SLAB,
    INODES_PER_PAGE,
    MAX_FILE_SIZE,
    PAGE,
    PAGE_DATA,
    PAGE_FREE,
    PAGE_INODES,
    PAGE_KINDS,
    PAGES_PER_BLOCK,
    Extent,
)
from pkernfs.fs.slab import Slab
from pkernfs.fs.volume import Volume

if TYPE_CHECKING:
    from pkernfs.fsck.check.trees import Unsealed

MAX_PROBLEMS = 10_000  #: more are not collected


class Problem(NamedTuple):
    """One invariant that does not hold."""

    code: str  #: short name of the invariant
    text: str  #: one line: what, where, expected, found
    ino: int = 0  #: the inode concerned, or 0
    offset: int = 0  #: region offset in bytes, or 0


class Tally:
    """What was found for the inode at work; totals are compared only where everything below could be read."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.pages = 0  #: 4 KiB pages claimed
        self.sound = True
        self.nodes: list[int] = []  #: pages of the nodes of the tree at work
        self.broken = False  #: a node of it could not be used as it is


class Wrong(NamedTuple):
    """A use of a page that the slab's header does not agree with."""

    owner: int
    kind: int  #: what the page is used as


class Ledger:
    """Owners of data blocks and slab pages (0: none so far), in 8 bytes each.

    What disagrees with the block table and the slab headers does not own anything; it is kept beside, for a repair to
    decide who is right.  ``salvage``: trees give all that can be read, also what no inner node leads to any more.
    """

    def __init__(self, volume: Volume, *, salvage: bool = False) -> None:
        self.volume = volume
        self.region = volume.region
        self.table = volume.space.table
        self.first_block = volume.sb.first_block
        self.blocks = array("Q", bytes(8 * len(self.table)))
        self.pages: dict[int, array[int]] = {}  #: by block, for slabs
        self.slabs: dict[int, Slab] = {}  #: those whose headers are sound
        self.problems: list[Problem] = []
        self.incomplete = False  #: something could not be read, so what is below it may seem lost
        self.tally = Tally(0)
        self.salvage = salvage
        self.wrong_pages: dict[int, Wrong] = {}
        self.wrong_blocks: dict[int, int] = {}  #: blocks that a file uses and the table has as something else: owner
        self.misused_blocks: set[int] = set()  #: data blocks that a file uses in part, or not in their place
        self.maybe_slabs: set[int] = set()  #: blocks that are used as slabs, and are none
        self.found: dict[int, bytearray] = {}  #: kinds of pages as they are used, of slabs with damaged headers
        self.unsealed: dict[int, Unsealed] = {}  #: by page
        self.leaked_pages: list[tuple[int, int]] = []
        self.leaked_blocks: list[tuple[int, int]] = []
        self.strays: dict[int, list[int]] | None = None  #: by owner: pages of leaves

    # -- noting ---------------------------------------------------------------------------------------------------

    def note(self, code: str, text: str, *, ino: int | None = None, offset: int = 0) -> None:
        """Note a problem of the inode at work, or of ``ino``."""
        self.tally.sound = False
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(code, text, self.tally.owner if ino is None else ino, offset))

    def note_damage(self, code: str, error: CorruptError, *, ino: int | None = None) -> None:
        """Note that a structure cannot be read, and with it whatever it leads to."""
        self.incomplete = True
        self.note(code, f"{error.what}: {error.found}", ino=ino, offset=error.offset)

    def note_unread(self, code: str, text: str, *, ino: int | None = None, offset: int = 0) -> None:
        """Note a problem that keeps the walk from going on here."""
        self.incomplete = True
        self.note(code, text, ino=ino, offset=offset)

    # -- claiming -------------------------------------------------------------------------------------------------

    def load_slabs(self) -> None:
        """Decode the headers of all slabs."""
        for block in self.volume.space.slab_blocks():
            self.pages[block] = array("Q", bytes(8 * PAGES_PER_BLOCK))
            try:
                self.slabs[block] = Slab.decode(self.region.read(block * BLOCK, PAGE), block)
            except CorruptError as error:
                self.found[block] = bytearray(PAGES_PER_BLOCK)
                self.note_damage("slab-header", error)

    def slot_in_use(self, ino: int) -> bool:
        """Whether an inode may be read from this slot; slots of a damaged slab may."""
        page, slot = divmod(ino, INODES_PER_PAGE)
        block, index = divmod(page, PAGES_PER_BLOCK)
        if not page:
            return ino > 0
        if block not in self.pages:
            return False
        slab = self.slabs.get(block)
        return slab is None or (slab.kinds[index] == PAGE_INODES and bool(slab.slots[index] >> slot & 1))

    def claim(self, page: int, count: int, kind: int, what: str) -> bool:
        """The inode at work owns these slab pages; whether that holds for all of them and they can be read."""
        return sum(length for _, length in self.claim_runs(page, count, kind, what)) == count

    def in_slab(self, page: int, what: str) -> bool:
        """Whether the page is one of a slab; noted when it is not."""
        block = page // PAGES_PER_BLOCK
        if block in self.pages:
            return True
        where = "beyond the region"
        if 0 <= block < len(self.table):
            where = BLOCK_KINDS[self.table[block]]
            self.maybe_slabs.add(block)
        self.note("page-range", f"{what}: expected a page of a slab, found page {page:#x}, which is {where}")
        return False

    def claim_runs(self, page: int, count: int, kind: int, what: str) -> list[tuple[int, int]]:
        """The runs (page, count) of these slab pages that the inode at work owns now."""
        good: list[tuple[int, int]] = []
        for at in range(page, page + count):
            if not self.in_slab(at, what):
                break
            block, index = divmod(at, PAGES_PER_BLOCK)
            owners = self.pages[block]
            slab = self.slabs.get(block)
            self.tally.pages += 1
            if slab is not None and slab.kinds[index] != kind:
                code = "page-free" if slab.kinds[index] == PAGE_FREE else "page-kind"
                found = PAGE_KINDS[slab.kinds[index]]
                self.note(code, f"{what}: expected kind {PAGE_KINDS[kind]!r}, found {found!r}", offset=at * PAGE)
                self.wrong_pages.setdefault(at, Wrong(self.tally.owner, kind))
            elif owners[index]:
                self._double(what, owners[index], at * PAGE)
            else:
                owners[index] = self.tally.owner
                if slab is None:
                    self.found[block][index] = kind
                if good and sum(good[-1]) == at:
                    good[-1] = (good[-1][0], good[-1][1] + 1)
                else:
                    good.append((at, 1))
        return good

    def _double(self, what: str, owner: int, offset: int) -> None:
        self.note(
            "double-use", f"{what}: expected memory of its own, found memory that inode {owner} has too", offset=offset
        )

    def claim_extent(self, extent: Extent) -> list[Extent]:
        """The inode at work owns the memory of ``extent``: whole data blocks and data pages of slabs.

        The parts of the extent for which that holds.
        """
        start, page, left = extent
        what = f"extent {start:#x}+{left:#x} of inode {self.tally.owner}"
        total = self.volume.total_pages
        if not self.first_block * PAGES_PER_BLOCK <= page < page + left <= total:
            self.note("extent-range", f"{what}: expected pages of the region, found {page:#x} to {page + left:#x}")
            return []
        if start + left > MAX_FILE_SIZE // PAGE:
            self.note("extent-range", f"{what}: expected an end within {MAX_FILE_SIZE:#x} bytes")
            return []
        good: list[Extent] = []
        while left:
            block, index = divmod(page, PAGES_PER_BLOCK)
            step = min(left, PAGES_PER_BLOCK - index)
            runs = [(page, step)]
            # A sound slab has its header in the first page: none is data as a whole.
            if self.table[block] == BLOCK_SLAB and not (block in self.slabs and step == PAGES_PER_BLOCK):
                runs = self.claim_runs(page, step, PAGE_DATA, what)
            else:
                self.tally.pages += step
                if not self._claim_block(block, start, index, step, what):
                    runs = []
            for at, count in runs:
                if good and good[-1].page + good[-1].length == at:
                    good[-1] = good[-1]._replace(length=good[-1].length + count)
                else:
                    good.append(Extent(start + at - page, at, count))
            start, page, left = start + step, page + step, left - step
        return good

    def is_nobodys(self, page: int, count: int, kind: int) -> bool:
        """Whether these pages were not seen in use, and are of slabs and of that kind, or whole blocks for data."""
        if not self.first_block * PAGES_PER_BLOCK <= page < page + count <= self.volume.total_pages:
            return False
        while count:
            block, index = divmod(page, PAGES_PER_BLOCK)
            step = min(count, PAGES_PER_BLOCK - index)
            if block in self.pages:
                slab = self.slabs.get(block)
                wrong_kind = slab is not None and slab.kinds[index : index + step] != bytes([kind]) * step
                if wrong_kind or any(self.pages[block][index : index + step]):
                    return False
            elif kind != PAGE_DATA or self.blocks[block] or block in self.wrong_blocks or step != PAGES_PER_BLOCK:
                return False
            page, count = page + step, count - step
        return True

    def _claim_block(self, block: int, start: int, index: int, step: int, what: str) -> bool:
        kind = self.table[block]
        whole, aligned = step == PAGES_PER_BLOCK, not start % PAGES_PER_BLOCK
        if kind == BLOCK_DATA and not (whole and aligned):
            self.misused_blocks.add(block)
        if not whole and kind == BLOCK_DATA:
            self.note("block-part", f"{what}: expected whole blocks, found {step} pages of block {block} from {index}")
        elif not aligned and kind == BLOCK_DATA:
            self.note("block-align", f"{what}: expected block {block} at a multiple of 2 MiB, found page {start:#x}")
        elif kind != BLOCK_DATA:
            code = "block-free" if kind == BLOCK_FREE else "block-kind"
            found = BLOCK_KINDS[kind]
            self.note(code, f"{what}: expected block {block} to be 'data', found {found!r}", offset=block * BLOCK)
            if whole and aligned:
                self.wrong_blocks.setdefault(block, self.tally.owner)
            else:
                self.maybe_slabs.add(block)
        elif self.blocks[block]:
            self._double(what, self.blocks[block], block * BLOCK)
        else:
            self.blocks[block] = self.tally.owner
            return True
        return False
