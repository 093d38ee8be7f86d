"""Inodes without a name: the list of orphans, lost inodes, free slots."""

from __future__ import annotations

import stat
import struct

from pkernfs.errors import CorruptError, PkernfsError, mode_text, quoted
from pkernfs.format import (
    INODE,
    INODE_SIZE,
    INODES_PER_PAGE,
    ORPHANS_INO,
    PAGE_INODES,
    PAGES_PER_BLOCK,
    Ino,
    Inode,
    PageNo,
)
from pkernfs.fs.directory import Directory
from pkernfs.fs.pages import read_inode
from pkernfs.fsck.check.rules import PLACES
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import Nameless, NotEmpty, Unlisted, Unusable
from pkernfs.fsck.problems import Code


def says_listed(check: Check, ino: Ino, inode: Inode) -> None:
    """An inode with links is on the list of orphans; compared with the list later."""
    if inode.orphan_next or inode.orphan_prev:
        check.reached.says_listed.add(ino)


def orphans(check: Check) -> None:
    """The list of orphans is sound, and all that have no name, or say that they are listed, are on it."""
    head = check.inode(ORPHANS_INO)
    if head is None:
        return
    listed = check.reached.listed
    before, ino = ORPHANS_INO, Ino(head.orphan_next)
    while ino != ORPHANS_INO:
        inode = check.inode(ino) if check.memory.in_use(ino) else None
        if inode is None or ino in listed:
            found = "one that is listed already" if inode else "no inode"
            text = f"after inode {before}: expected another, found {found}"
            check.note(Code.ORPHAN_LIST, text, ino=ino)
            return
        listed.add(ino)
        if inode.orphan_prev != before:
            text = f"orphan {ino}: expected {before} before it, found {inode.orphan_prev}"
            check.note(Code.ORPHAN_LINKS, text, ino=ino)
        if not inode.nlink and check.reached.mark(ino):
            check.walk(ino)
        before, ino = ino, Ino(inode.orphan_next)
    if head.orphan_prev != before:
        text = f"list of orphans: expected {before} as last, found {head.orphan_prev}"
        check.note(Code.ORPHAN_LINKS, text)
    for ino in check.reached.says_listed - listed:
        text = f"inode {ino}: expected it in the list of orphans, found it missing"
        check.note(Code.ORPHAN_LINKS, text, ino=ino)


def lost_inodes(check: Check) -> None:
    """Every slot in use was reached, and free slots are empty."""
    memory = check.memory
    used = {page // PAGES_PER_BLOCK for page in check.reached.slots}
    memory.empty_slabs = {
        block
        for block in memory.disputed_blocks
        if block in memory.slabs and block not in used and not any(memory.pages[block])
    }
    for ino, (_, name) in PLACES.items():
        if not check.findings.incomplete and check.reached.mark(ino):
            text = f"inode {ino}: expected it as {quoted(name)}, found no name"
            check.note(Code.RESERVED_NAME, text, ino=ino, data=Nameless(ino))
            inode = check.inode(ino)
            if inode:
                check.walk(ino)
    for ino in _lost_slots(check):
        _lost(check, ino)


def _lost_slots(check: Check) -> list[Ino]:
    """The slots that are in use and were not reached: those that others of them name at the end."""
    found: list[Ino] = []
    for block, slab in check.memory.slabs.items():
        if block in check.memory.empty_slabs:
            continue
        index = slab.kinds.find(PAGE_INODES)
        while index >= 0:
            page = PageNo(block * PAGES_PER_BLOCK + index)
            lost = slab.slots[index] & ~check.reached.slots.get(page, 0)
            for slot in range(INODES_PER_PAGE):
                ino = Ino(page * INODES_PER_PAGE + slot)
                if lost >> slot & 1:
                    found.append(ino)
                elif not slab.slots[index] >> slot & 1:
                    _free_slot(check, ino)
            index = slab.kinds.find(PAGE_INODES, index + 1)
    if check.findings.incomplete:
        return []
    named = {child for ino in found for child in _named_by(check, ino)}
    return sorted(found, key=named.__contains__)


def _named_by(check: Check, ino: Ino) -> list[Ino]:
    """The inodes that a lost directory names: nothing is claimed or noted, and what is damaged names none."""
    try:
        inode = read_inode(check.region, ino)
        if not stat.S_ISDIR(inode.mode) or not inode.root:
            return []
        return [entry.ino for entry in Directory(check.volume, ino, inode).scan() if entry.ino != ino]
    except (PkernfsError, struct.error):
        return []


def _lost(check: Check, ino: Ino) -> None:
    """A slot that is in use, and that no name and no list points to."""
    if check.findings.incomplete or not check.reached.mark(ino):
        return
    inode = check.inode(ino)
    if inode is None:
        return
    if not inode.mode:
        text = f"inode {ino}: the slot is in use, found an empty one"
        check.note(Code.INODE_MODE, text, ino=ino, data=Unusable(ino, "empty"))
        return
    if not inode.nlink:
        text = f"inode {ino}: no name left, found it missing in the list"
        check.note(Code.ORPHAN_UNLISTED, text, ino=ino, data=Unlisted(ino))
    else:
        text = f"inode {ino}: expected {inode.nlink} names, found none"
        check.note(Code.INODE_LOST, text, ino=ino, data=Nameless(ino))
    check.walk(ino)


def _free_slot(check: Check, ino: Ino) -> None:
    mode = int.from_bytes(check.region.read(ino * INODE_SIZE + INODE.offsets["mode"], 4), "little")
    found = f"{mode_text(mode)} in it" if mode else ""
    try:
        read_inode(check.region, ino)
    except CorruptError as error:
        # Whoever takes the slot reads its generation first.
        found = error.found
    if found:
        check.note(Code.INODE_FREE, f"inode {ino}: the slot is free, found {found}", ino=ino, data=NotEmpty(ino))
