"""Memory that is allocated, and that nobody owns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pkernfs.format import BLOCK, BLOCK_DATA, PAGE, PAGE_FREE, PAGE_INODES, PAGES_PER_BLOCK

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker
    from pkernfs.fsck.check.ledger import Ledger


def leaks(checker: Checker) -> None:
    """Memory that is allocated has an owner."""
    if not checker.ledger.incomplete:
        _note_leaks(checker.ledger)


def _note_leaks(ledger: Ledger) -> None:
    """Note memory that is allocated and has no owner, a run at a time."""
    for block, slab in ledger.slabs.items():
        owners = ledger.pages[block]
        leaked = bytes(
            slab.kinds[i] != PAGE_FREE
            and not (slab.slots[i] if slab.kinds[i] == PAGE_INODES else owners[i])
            and block * PAGES_PER_BLOCK + i not in ledger.wrong_pages
            for i in range(1, PAGES_PER_BLOCK)
        )
        for first, count in _runs(leaked):
            page = block * PAGES_PER_BLOCK + 1 + first
            ledger.leaked_pages.append((page, count))
            ledger.note("leaked-page", f"pages {page:#x}+{count}: allocated, found no owner", offset=page * PAGE)
        if slab.free == PAGES_PER_BLOCK - 1:
            ledger.leaked_blocks.append((block, 1))
            ledger.note("leaked-block", f"block {block}: a slab without a page in use", offset=block * BLOCK)
    lost = bytearray(kind == BLOCK_DATA and not owner for kind, owner in zip(ledger.table, ledger.blocks, strict=True))
    for block in ledger.misused_blocks:
        lost[block] = 0
    for first, count in _runs(lost):
        ledger.leaked_blocks.append((first, count))
        ledger.note("leaked-block", f"blocks {first}+{count}: allocated, found no owner", offset=first * BLOCK)


def _runs(flags: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of ones."""
    first = flags.find(1)
    while first >= 0:
        end = flags.find(0, first)
        end = len(flags) if end < 0 else end
        yield first, end - first
        first = flags.find(1, end)
