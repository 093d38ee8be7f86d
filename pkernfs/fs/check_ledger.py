"""The ledger of a check: who owns each block and page, and the walks that fill it (trees, extents, runs of pages).

Nothing here raises on a damaged region: what a reader would raise is noted as a Problem, and the walk goes on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

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
    PAGE_NODE,
    PAGES_PER_BLOCK,
    Extent,
)
from pkernfs.fs.allocator import Slab
from pkernfs.fs.btree import Node
from pkernfs.fs.volume import Volume

MAX_PROBLEMS = 10_000  #: more are not collected
KEY_END = 1 << 64


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


class Ledger:
    """Owners of data blocks and slab pages (0: none so far), in 8 bytes each."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.region = volume.region
        self.table = volume.allocator.table
        self.first_block = volume.sb.first_block
        self.blocks = array("Q", bytes(8 * len(self.table)))
        self.pages: dict[int, array[int]] = {}  #: by block, for slabs
        self.slabs: dict[int, Slab] = {}  #: those whose headers are sound
        self.problems: list[Problem] = []
        self.incomplete = False  #: something could not be read, so what is below it may seem lost
        self.tally = Tally(0)

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
        for block in self.volume.allocator.slab_blocks():
            self.pages[block] = array("Q", bytes(8 * PAGES_PER_BLOCK))
            try:
                self.slabs[block] = Slab.decode(self.region.read(block * BLOCK, PAGE), block)
            except CorruptError as error:
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
        good = True
        for at in range(page, page + count):
            block, index = divmod(at, PAGES_PER_BLOCK)
            owners = self.pages.get(block)
            if owners is None:
                where = BLOCK_KINDS[self.table[block]] if 0 <= block < len(self.table) else "beyond the region"
                self.note("page-range", f"{what}: expected a page of a slab, found page {at:#x}, which is {where}")
                return False
            slab = self.slabs.get(block)
            if slab is not None and slab.kinds[index] != kind:
                code = "page-free" if slab.kinds[index] == PAGE_FREE else "page-kind"
                found = PAGE_KINDS[slab.kinds[index]]
                self.note(code, f"{what}: expected kind {PAGE_KINDS[kind]!r}, found {found!r}", offset=at * PAGE)
                owners[index] = owners[index] or self.tally.owner
                good = False
            elif owners[index]:
                self._double(what, owners[index], at * PAGE)
                good = False
            else:
                owners[index] = self.tally.owner
            self.tally.pages += 1
        return good

    def _double(self, what: str, owner: int, offset: int) -> None:
        self.note(
            "double-use", f"{what}: expected memory of its own, found memory that inode {owner} has too", offset=offset
        )

    def claim_extent(self, extent: Extent) -> None:
        """The inode at work owns the memory of ``extent``: whole data blocks and data pages of slabs."""
        start, page, left = extent
        what = f"extent {start:#x}+{left:#x} of inode {self.tally.owner}"
        total = self.volume.total_pages
        if not self.first_block * PAGES_PER_BLOCK <= page < page + left <= total:
            self.note("extent-range", f"{what}: expected pages of the region, found {page:#x} to {page + left:#x}")
            return
        if start + left > MAX_FILE_SIZE // PAGE:
            self.note("extent-range", f"{what}: expected an end within {MAX_FILE_SIZE:#x} bytes")
            return
        while left:
            block, index = divmod(page, PAGES_PER_BLOCK)
            step = min(left, PAGES_PER_BLOCK - index)
            if self.table[block] == BLOCK_SLAB:
                self.claim(page, step, PAGE_DATA, what)
            else:
                self.tally.pages += step
                self._claim_block(block, start, index, step, what)
            start, page, left = start + step, page + step, left - step

    def _claim_block(self, block: int, start: int, index: int, step: int, what: str) -> None:
        if self.table[block] != BLOCK_DATA:
            code = "block-free" if self.table[block] == BLOCK_FREE else "block-kind"
            found = BLOCK_KINDS[self.table[block]]
            self.note(code, f"{what}: expected block {block} to be 'data', found {found!r}", offset=block * BLOCK)
        elif step != PAGES_PER_BLOCK:
            self.note("block-part", f"{what}: expected whole blocks, found {step} pages of block {block} from {index}")
        elif start % PAGES_PER_BLOCK:
            self.note("block-align", f"{what}: expected block {block} at a multiple of 2 MiB, found page {start:#x}")
        elif self.blocks[block]:
            self._double(what, self.blocks[block], block * BLOCK)
        else:
            self.blocks[block] = self.tally.owner

    # -- trees ----------------------------------------------------------------------------------------------------

    def tree(self, root: int) -> Iterator[tuple[int, bytes]]:
        """The items of a tree of the inode at work, whose nodes are checked and claimed on the way.

        A node is claimed before it is read, so that a loop ends where it comes back.
        """
        owner = self.tally.owner
        todo: list[tuple[int, int | None, int, int]] = [(root, None, 0, KEY_END)] if root else []
        while todo:
            page, level, low, high = todo.pop()
            what = f"tree node {page:#x} of inode {owner}"
            if not self.claim(page, 1, PAGE_NODE, what):
                self.incomplete = True
                continue
            try:
                node = Node.decode(self.region.read(page * PAGE, PAGE), page, owner)
            except CorruptError as error:
                self.note_damage("tree-node", error)
                continue
            if level is not None and node.level != level:
                self.note_unread(
                    "tree-level", f"{what}: expected level {level}, found {node.level}", offset=page * PAGE
                )
                continue
            # The first key of an inner node is not looked at by any reader.
            keys = node.keys[1:] if node.level else node.keys
            if keys and not low <= keys[0] <= keys[-1] < high:
                self.note(
                    "tree-order",
                    f"{what}: expected keys from {low:#x} to {high - 1:#x}, found {keys[0]:#x} to {keys[-1]:#x}",
                    offset=page * PAGE,
                )
            if not node.level:
                yield from zip(node.keys, node.values, strict=True)
                continue
            bounds = [low, *keys, high]
            children = zip(node.children, bounds, bounds[1:], strict=False)
            todo += reversed([(child, node.level - 1, first, end) for child, first, end in children])

    # -- the end --------------------------------------------------------------------------------------------------

    def note_leaks(self) -> None:
        """Note memory that is allocated and has no owner, a run at a time."""
        self.tally = Tally(0)
        for block, slab in self.slabs.items():
            owners = self.pages[block]
            leaked = bytes(
                slab.kinds[i] != PAGE_FREE and not (slab.slots[i] if slab.kinds[i] == PAGE_INODES else owners[i])
                for i in range(1, PAGES_PER_BLOCK)
            )
            for first, count in _runs(leaked):
                page = block * PAGES_PER_BLOCK + 1 + first
                self.note("leaked-page", f"pages {page:#x}+{count}: allocated, found no owner", offset=page * PAGE)
            if slab.free == PAGES_PER_BLOCK - 1:
                self.note("leaked-block", f"block {block}: a slab without a page in use", offset=block * BLOCK)
        lost = bytes(kind == BLOCK_DATA and not owner for kind, owner in zip(self.table, self.blocks, strict=True))
        for first, count in _runs(lost):
            self.note("leaked-block", f"blocks {first}+{count}: allocated, found no owner", offset=first * BLOCK)


def _runs(flags: bytes) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of ones."""
    first = flags.find(1)
    while first >= 0:
        end = flags.find(0, first)
        end = len(flags) if end < 0 else end
        yield first, end - first
        first = flags.find(1, end)
