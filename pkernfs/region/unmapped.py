"""What destroys the content of a region looks first who maps its memory: the lock tells of mounts only.

A guest on the direct map has its RAM in the region while no pkernfs process is there, and dies without a word when that
is made anew, or put right, below it.
"""

from __future__ import annotations

import os

from pkernfs.errors import RegionBusyError
from pkernfs.processes import NoProcError, holder, pids, shared_mappings

SHOWN = 3  #: processes that an error names


def check_unmapped(fd: int, path: str) -> str:
    """What could not be looked at, as a warning; "": every process was seen.

    Of the open file or device, by whatever name others have opened it.  Raises RegionBusyError, which names who maps
    it, privately too: a guest with share=off reads what nobody has stored to yet.

    Not seen: a process that maps it later, processes outside this pid namespace, and who only has it open.
    """
    try:
        found = sorted({pid for pid, _, _ in shared_mappings(fd, private=True)} - {os.getpid()})
        # Of root's own view nothing is said: what a security module hides from it is in every container, and no guest.
        unseen = sum(map(_is_hidden, pids())) if os.geteuid() else 0
    except NoProcError as error:
        return f"{path}: whether a process maps the region could not be looked at: {error.text}"
    if found:
        names = [str(holder(pid)) for pid in found[:SHOWN]]
        names += [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
        text = f"{path}: the region's memory is mapped by {'; '.join(names)}"
        raise RegionBusyError(text, hint="they would lose it: let them end in good order first")
    if not unseen:
        return ""
    return f"{path}: {unseen} processes of other users could not be looked at: root sees whether they map the region"


def _is_hidden(pid: int) -> bool:
    """Whether the mappings of a process are not for us."""
    try:
        with open(f"/proc/{pid}/maps", "rb"):
            return False
    except PermissionError:
        return True
    except OSError:  # it has ended
        return False
