"""What files are called that domains map, in replies that give them by inode.

No inode says where it is named, so directories are searched: as many as there are, in the worst case.  So it is done
last, and in steps, between which the event loop serves others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeVar

from pkernfs import api
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.paths import search

Reply = TypeVar("Reply", api.Domains, api.Walk)


def in_steps(fs: Filesystem, reply: api.Domains | api.Walk) -> Iterator[None]:
    """Set ``file``, a path from the root of the filesystem on, wherever a file has one.

    Between two steps the filesystem may change: see ``paths.search``.
    """
    mapped: list[api.DomainMapping | api.Walk] = [reply] if isinstance(reply, api.Walk) else []
    if isinstance(reply, api.Domains):
        mapped += [mapping for domain in reply.domains for mapping in domain.mappings]
    wanted = {one.ino for one in mapped if one.ino is not None}
    found: dict[int, list[bytes]] = {}
    for _ in search(fs.volume, wanted, found) if wanted else ():
        if len(found) == len(wanted):
            break
        yield
    for one in mapped:
        if one.ino in found:
            one.file = os.fsdecode(found[one.ino][0]).lstrip("/")


def at_once(fs: Filesystem, reply: Reply) -> Reply:
    """The same where nobody else waits; the reply."""
    for _ in in_steps(fs, reply):
        pass
    return reply
