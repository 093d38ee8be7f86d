"""Memory that is allocated, and that nobody owns."""

from __future__ import annotations

from collections.abc import Iterator

from pkernfs.format import BLOCK, BLOCK_DATA, PAGE, PAGE_FREE, PAGE_INODES, PAGES_PER_BLOCK
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import Leak
from pkernfs.fsck.problems import Code


def leaks(check: Check) -> None:
    """Memory that is allocated has an owner: noted a run at a time."""
    if check.findings.incomplete:
        return
    memory = check.memory
    for block, slab in memory.slabs.items():
        owners = memory.pages[block]
        leaked = bytes(
            slab.kinds[i] != PAGE_FREE
            and not (slab.slots[i] if slab.kinds[i] == PAGE_INODES else owners[i])
            and block * PAGES_PER_BLOCK + i not in memory.disputed_pages
            for i in range(1, PAGES_PER_BLOCK)
        )
        for first, count in _runs(leaked):
            page = block * PAGES_PER_BLOCK + 1 + first
            text = f"pages {page:#x}+{count}: allocated, found no owner"
            check.note(Code.LEAKED_PAGE, text, offset=page * PAGE, data=Leak(page, count))
        if slab.free == PAGES_PER_BLOCK - 1:
            text = f"block {block}: a slab without a page in use"
            check.note(Code.LEAKED_BLOCK, text, offset=block * BLOCK, data=Leak(block, 1))
    lost = bytearray(kind == BLOCK_DATA and not owner for kind, owner in zip(memory.table, memory.blocks, strict=True))
    for block in memory.misused_blocks:
        lost[block] = 0
    for first, count in _runs(lost):
        text = f"blocks {first}+{count}: allocated, found no owner"
        check.note(Code.LEAKED_BLOCK, text, offset=first * BLOCK, data=Leak(first, count))


def _runs(flags: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of ones."""
    first = flags.find(1)
    while first >= 0:
        end = flags.find(0, first)
        end = len(flags) if end < 0 else end
        yield first, end - first
        first = flags.find(1, end)
