"""Inodes that no name leads to: the list of orphans, lost inodes, free slots."""

from __future__ import annotations

import stat
import struct
from typing import TYPE_CHECKING

from pkernfs.errors import CorruptError, PkernfsError
from pkernfs.format import (
    INODE,
    INODE_SIZE,
    INODES_PER_PAGE,
    ORPHANS_INO,
    PAGE_INODES,
    PAGES_PER_BLOCK,
    Inode,
)
from pkernfs.fs.directory import Directory
from pkernfs.fs.pages import read_inode
from pkernfs.fsck.check.inodes import PLACES

if TYPE_CHECKING:
    from pkernfs.fsck.check.checker import Checker


def says_listed(checker: Checker, ino: int, inode: Inode) -> None:
    """An inode with links is on the list of orphans; compared with the list later."""
    if inode.orphan_next or inode.orphan_prev:
        checker.says_listed.add(ino)


def orphans(checker: Checker) -> None:
    """The list of orphans is sound, and all that have no name, or say that they are listed, are on it."""
    head = checker.inode(ORPHANS_INO)
    if head is None:
        return
    before, ino = int(ORPHANS_INO), head.orphan_next
    while ino != ORPHANS_INO:
        inode = checker.inode(ino) if checker.in_use(ino) else None
        if inode is None or ino in checker.listed:
            found = "one that is listed already" if inode else "no inode"
            checker.ledger.note_unread(
                "orphan-list", f"after inode {before:#x}: expected another, found {found}", ino=ino
            )
            return
        checker.listed.add(ino)
        if inode.orphan_prev != before:
            found = f"{inode.orphan_prev:#x}"
            checker.note("orphan-links", f"orphan {ino:#x}: expected {before:#x} before it, found {found}", ino=ino)
        if not inode.nlink and checker.mark(ino):
            checker.walk(ino)
        before, ino = ino, inode.orphan_next
    if head.orphan_prev != before:
        checker.note("orphan-links", f"list of orphans: expected {before:#x} as last, found {head.orphan_prev:#x}")
    for ino in checker.says_listed - checker.listed:
        checker.note("orphan-links", f"inode {ino:#x}: expected it in the list of orphans, found it missing", ino=ino)


def lost_inodes(checker: Checker) -> None:
    """Every slot in use was reached, and free slots are empty."""
    ledger = checker.ledger
    used = {page // PAGES_PER_BLOCK for page in checker.seen}
    checker.not_slabs = {
        b for b in ledger.wrong_blocks if b in ledger.slabs and b not in used and not any(ledger.pages[b])
    }
    for ino, (_, name) in PLACES.items():
        if not checker.ledger.incomplete and checker.mark(ino):
            checker.note("reserved-name", f"inode {ino}: expected it as {name.decode()!r}, found no name", ino=ino)
            checker.lost.append(ino)
            inode = checker.inode(ino)
            if inode:
                checker.walk(ino)
    for ino in _lost_slots(checker):
        _lost(checker, ino)


def _lost_slots(checker: Checker) -> list[int]:
    """The slots that are in use and were not reached: those that others of them name at the end."""
    found: list[int] = []
    for block, slab in checker.ledger.slabs.items():
        if block in checker.not_slabs:
            continue
        index = slab.kinds.find(PAGE_INODES)
        while index >= 0:
            first = (block * PAGES_PER_BLOCK + index) * INODES_PER_PAGE
            lost = slab.slots[index] & ~checker.seen.get(first // INODES_PER_PAGE, 0)
            for slot in range(INODES_PER_PAGE):
                if lost >> slot & 1:
                    found.append(first + slot)
                elif not slab.slots[index] >> slot & 1:
                    _free_slot(checker, first + slot)
            index = slab.kinds.find(PAGE_INODES, index + 1)
    if checker.ledger.incomplete:
        return []
    named = {child for ino in found for child in _named_by(checker, ino)}
    return sorted(found, key=named.__contains__)


def _named_by(checker: Checker, ino: int) -> list[int]:
    """The inodes that a lost directory names: nothing is claimed or noted, and what is damaged names none."""
    try:
        inode = read_inode(checker.region, ino)
        if not stat.S_ISDIR(inode.mode) or not inode.root:
            return []
        return [entry.ino for entry in Directory(checker.volume, ino, inode).scan() if entry.ino != ino]
    except (PkernfsError, struct.error):
        return []


def _lost(checker: Checker, ino: int) -> None:
    """A slot that is in use, and that no name and no list led to."""
    if checker.ledger.incomplete or not checker.mark(ino):
        return
    inode = checker.inode(ino)
    if inode is None:
        return
    if not inode.mode:
        checker.note("inode-mode", f"inode {ino:#x}: the slot is in use, found an empty one", ino=ino)
        checker.bad[ino] = "empty"
    elif not inode.nlink:
        checker.note("orphan-unlisted", f"inode {ino:#x}: no name left, found it missing in the list", ino=ino)
        checker.unlisted.append(ino)
    else:
        checker.note("inode-lost", f"inode {ino:#x}: expected {inode.nlink} names, found none", ino=ino)
        checker.lost.append(ino)
    if inode.mode:
        checker.walk(ino)


def _free_slot(checker: Checker, ino: int) -> None:
    mode = int.from_bytes(checker.region.read(ino * INODE_SIZE + INODE.offsets["mode"], 4), "little")
    found = f"mode {mode:o} in it" if mode else ""
    try:
        read_inode(checker.region, ino)
    except CorruptError as error:
        # Whoever takes the slot reads its generation first.
        found = error.found
    if found:
        checker.free_slots.append(ino)
        checker.note("inode-free", f"inode {ino:#x}: the slot is free, found {found}", ino=ino)
