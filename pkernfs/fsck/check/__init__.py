"""The core of fsck.pkernfs: all invariants of the format.

    check(volume) -> [Problem, ...]

``passes`` is the list of what is looked at, with a statement of each invariant.  ``checker`` is the state of one check,
``ledger`` says who owns which memory, ``trees`` walks; the other modules hold the checks, by subject, each a function
that notes what does not hold.  Nothing is written and no damage raises; where a structure cannot be read,
``Ledger.incomplete`` keeps the last passes from taking what is below it for lost.
"""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.errors import CorruptError, FormatError
from pkernfs.format import BLOCK, SUPERBLOCK, geometry
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.checker import Checker, Progress
from pkernfs.fsck.check.ledger import Problem
from pkernfs.fsck.check.passes import INVARIANTS
from pkernfs.region import Region, check_superblock


def check(volume: Volume) -> list[Problem]:
    """All invariants of the format; the problems found.  Never raises on a damaged region, and never writes.

    No transaction may be open.  What is in the region counts, not what the volume holds decoded.
    """
    return Checker(volume).run()


def check_region(
    region: Region, progress: Callable[[Progress], None] | None = None
) -> tuple[list[Problem], Checker | None]:
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
        text = error.text.removeprefix(f"{region.path}: ")
        return [Problem("superblock", f"{text}; the copy at {copy_at:#x} is sound")], None
    return checker.run(), checker


__all__ = ["INVARIANTS", "Checker", "Problem", "Progress", "check", "check_region"]
