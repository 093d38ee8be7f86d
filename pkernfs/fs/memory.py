"""Memory for what is in use: a region may have been copied with holes, onto a host that has little left.

What mkfs and the allocator hand out has memory (``Region.reserve``).  A copy made with holes (cp --sparse, rsync and
tar with -S) has none where there were zeros: a journal, free slots, page tables, and a guest's RAM that truncate has
promised.  So whoever opens a region asks for it again, before anything is stored.
"""

from __future__ import annotations

import logging

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, BLOCK_DATA, BLOCK_FREE, BLOCK_SLAB, GiB
from pkernfs.fs.space import Space
from pkernfs.region import Region

log = logging.getLogger("pkernfs")

#: What files lack, and what is in use, bytes, beyond which files are left as they are: a takeover waits for it (0.2 to
#: 1 s for each GiB that is missing, some 10 ms for each that is looked through), and guests may have given memory back
#: (ballooning punches holes).  Then each page is asked for when it is stored to first.
MOST, LARGEST = 4 * GiB, 64 * GiB


def secure(region: Region, space: Space) -> None:
    """Make sure of the memory of slabs, and of files where there is enough and little is missing.

    What takes as much as all blocks in use together has no holes in them: in the ordinary case nothing is looked at.
    ``region.whole`` says at the end whether stores need no question any more.

    Raises FsError, when slabs have no memory: ENOSPC, EIO.
    """
    if region.whole or region.readonly:
        return
    used = space.blocks - space.table.count(BLOCK_FREE)
    # A disk can fail later, too, and some copy what is stored over (btrfs, a reflink of xfs): there each page is asked
    # for.
    trusted = not region.volatile and not region.careful
    missing = used * BLOCK - region.memory()
    if missing <= 0:
        region.whole = trusted
        return
    for block, count in _runs(space, BLOCK_SLAB):
        region.secure(block * BLOCK, count * BLOCK)
    if missing > MOST or used * BLOCK > LARGEST:
        return
    try:
        for block, count in _runs(space, BLOCK_DATA):
            region.secure(block * BLOCK, count * BLOCK)
    except FsError as error:
        log.warning("%s: stores into files may fail with ENOSPC: %s", region.path, error)
        return
    region.whole = trusted


def _runs(space: Space, kind: int) -> list[tuple[int, int]]:
    """The runs (block, count) of blocks of a kind."""
    found = []
    at = space.table.find(kind)
    while at >= 0:
        end = at + 1
        while end < space.blocks and space.table[end] == kind:
            end += 1
        found.append((at, end - at))
        at = space.table.find(kind, end)
    return found
