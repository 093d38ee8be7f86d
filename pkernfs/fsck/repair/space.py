"""Repair of who owns what: block kinds and slab headers follow from what is used, and what nobody uses is freed."""

from __future__ import annotations

import stat
from array import array

from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK,
    BLOCK_DATA,
    BLOCK_SLAB,
    INODES_PER_PAGE,
    NODE_MAGIC,
    PAGE,
    PAGE_DATA,
    PAGE_FREE,
    PAGE_HEADER,
    PAGE_HEADER_LAYOUT,
    PAGE_INODES,
    PAGE_KINDS,
    PAGE_NODE,
    PAGES_PER_BLOCK,
    TABLE_FANOUT,
    BlockNo,
    Ino,
    PageNo,
)
from pkernfs.fs.pages import check_page, raw_inode, read_inode
from pkernfs.fs.slab import Slab
from pkernfs.fs.space import block_of, page_of_inode
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.rules import plausible
from pkernfs.fsck.findings import DamagedHeader, Leak, NamedSlot, NoInodes, UsedAs, UsedAsData, UsedAsSlab
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.metadata import is_slab
from pkernfs.fsck.repair.work import Work, batches


def block_kinds(work: Work) -> None:
    """A block that a file uses whole is its data.

    One that is used as a slab, has a slab's header and is nobody's data is a slab.
    """
    memory = work.memory
    wanted: dict[BlockNo, tuple[Code, int]] = {}
    for code, (block,) in work.found(UsedAsSlab):
        free = memory.first_block <= block < len(memory.table) and not memory.blocks[block]
        if free and memory.table[block] != BLOCK_SLAB and is_slab(work.volume.region, block):
            wanted.setdefault(block, (code, BLOCK_SLAB))
    for code, (block,) in work.found(UsedAsData):
        if block not in memory.slabs or block in memory.empty_slabs:
            wanted.setdefault(block, (code, BLOCK_DATA))
    for code, (block, kinds) in work.found(DamagedHeader):
        # The place of a slab's header belongs to a file: there is no slab.
        if kinds[0] == PAGE_DATA:
            wanted[block] = code, BLOCK_DATA
    for batch in batches(wanted.items()):
        with work.volume.transaction() as tx:
            for number, (code, kind) in batch:
                work.volume.space.table[number] = kind
                tx.change(work.volume.space.pages[number // TABLE_FANOUT])
                name = "a slab" if kind == BLOCK_SLAB else "data"
                work.note(code, f"block {number} is in use, and marked as {name} now", offset=number * BLOCK)


def slab_headers(work: Work) -> None:
    """A damaged header is made anew from what the walk found, and what the pages hold."""
    for batch in batches(work.found(DamagedHeader)):
        with work.volume.transaction() as tx:
            for code, (block, kinds) in batch:
                slab = _rebuilt(work.volume, block, kinds)
                work.volume.space.slabs[block] = slab
                tx.change(slab)
                text = f"the header of slab {block} was made anew: {PAGES_PER_BLOCK - 1 - slab.free} pages in use"
                work.note(code, text, offset=block * BLOCK)


def _rebuilt(volume: Volume, block: BlockNo, kinds: bytearray) -> Slab:
    """Pages of inodes are known by their inodes.

    A page that is not zero and that nobody was seen to use is kept until everything can be read: it may belong to what
    is lost.
    """
    slab = Slab(block, bytearray(kinds), array("H", bytes(2 * PAGES_PER_BLOCK)), fresh=False)
    slab.kinds[0] = PAGE_HEADER
    try:
        said = Slab.decode(volume.region.read(slab.offset, PAGE), block, verify=False).slots
    except CorruptError:
        said = slab.slots
    for index in range(1, PAGES_PER_BLOCK):
        if kinds[index]:
            continue
        page = PageNo(block * PAGES_PER_BLOCK + index)
        raw = volume.region.read(page * PAGE, PAGE)
        if not any(raw):
            continue
        for slot in range(INODES_PER_PAGE):
            ino = Ino(page * INODES_PER_PAGE + slot)
            if is_inode(volume, ino) or (said[index] >> slot & 1 and plausible(ino, raw_inode(volume.region, ino))):
                slab.slots[index] |= 1 << slot
        slab.kinds[index] = PAGE_INODES if slab.slots[index] else PAGE_NODE if is_node(raw, page) else PAGE_DATA
    slab.free = slab.kinds.count(PAGE_FREE)
    return slab


def is_inode(volume: Volume, ino: Ino) -> bool:
    """Whether a slot holds a sound inode."""
    try:
        inode = read_inode(volume.region, ino)
    except CorruptError:
        return False
    return bool(inode.mode)


def is_node(raw: bytes, page: PageNo) -> bool:
    """Whether a page holds a sound node, of any inode."""
    try:
        check_page(raw, NODE_MAGIC, page * PAGE, PAGE_HEADER_LAYOUT.unpack(raw).owner, "a node")
    except CorruptError:
        return False
    return True


def page_kinds(work: Work) -> None:
    """A page is what the one that uses it takes it for, unless somebody else uses it as what it is marked."""
    memory, region = work.memory, work.volume.region
    wanted: dict[BlockNo, dict[int, tuple[Code, int]]] = {}
    for code, (page, used_as) in work.found(UsedAs):
        block, index = block_of(page)
        slab = memory.slabs[block]
        kind = slab.kinds[index]
        is_other = kind == PAGE_HEADER or (kind == PAGE_INODES and slab.slots[index])
        if is_other or memory.pages[block][index]:
            continue
        if kind == PAGE_NODE and is_node(region.read(page * PAGE, PAGE), page):
            continue
        wanted.setdefault(block, {}).setdefault(index, (code, used_as))
    for batch in batches(wanted.items()):
        with work.volume.transaction() as tx:
            for block, changes in batch:
                slab = work.volume.space.slab(block)
                tx.change(slab)
                for index, (code, kind) in changes.items():
                    slab.kinds[index] = kind
                    slab.slots[index] = 0
                    at = block * PAGES_PER_BLOCK + index
                    text = f"page {at:#x} is in use, and marked as {PAGE_KINDS[kind]} now"
                    work.note(code, text, offset=at * PAGE)
                slab.free = slab.kinds.count(PAGE_FREE)


def slots(work: Work) -> None:
    """A slot that is named and holds a sound inode of that type is in use; pages of other kinds have no slots."""
    memory, volume = work.memory, work.volume
    used: dict[BlockNo, dict[Ino, Code]] = {}
    for code, (ino, mode) in work.found(NamedSlot):
        page, _ = page_of_inode(ino)
        block, index = block_of(page)
        slab = memory.slabs.get(block)
        if slab is None or not index or memory.pages[block][index] or not is_inode(volume, ino):
            continue
        kind = slab.kinds[index]
        is_node_page = kind == PAGE_NODE and is_node(volume.region.read(page * PAGE, PAGE), page)
        if stat.S_IFMT(read_inode(volume.region, ino).mode) == mode and not is_node_page:
            used.setdefault(block, {}).setdefault(ino, code)
    for batch in batches(used.items()):
        with volume.transaction() as tx:
            for block, inos in batch:
                slab = volume.space.slab(block)
                tx.change(slab)
                for ino, code in inos.items():
                    index = ino // INODES_PER_PAGE % PAGES_PER_BLOCK
                    if slab.kinds[index] != PAGE_INODES:
                        slab.kinds[index], slab.slots[index] = PAGE_INODES, 0
                    slab.slots[index] |= 1 << ino % INODES_PER_PAGE
                    work.note(code, f"inode {ino} is named, and marked as in use now", ino=ino)
                slab.free = slab.kinds.count(PAGE_FREE)
    if used:
        return
    for pages in batches(work.found(NoInodes)):
        with volume.transaction() as tx:
            for code, (page,) in pages:
                block, index = block_of(page)
                slab = volume.space.slab(block)
                tx.change(slab)
                slab.slots[index] = 0
                work.note(code, f"page {page:#x} holds no inodes: its slots were cleared", offset=page * PAGE)


def leaks(work: Work) -> None:
    """Free what nobody owns."""
    volume = work.volume
    leaked = list(work.found(Leak))
    for pages in batches(data for code, data in leaked if code == Code.LEAKED_PAGE):
        with volume.transaction() as tx:
            for first, count in pages:
                page = PageNo(first)
                tx.free_pages(page, count)
                block, index = block_of(page)
                slab = volume.space.slab(block)
                tx.change(slab)
                slab.slots[index : index + count] = array("H", bytes(2 * count))
                text = f"pages {page:#x}+{count} had no owner: freed"
                work.note(Code.LEAKED_PAGE, text, offset=page * PAGE)
    for blocks in batches(data for code, data in leaked if code == Code.LEAKED_BLOCK):
        with volume.transaction() as tx:
            for first, count in blocks:
                # A slab may be free already, with the last of its pages.
                if volume.space.table[first]:
                    tx.free_blocks(BlockNo(first), count)
                    text = f"blocks {first}+{count} had no owner: freed"
                    work.note(Code.LEAKED_BLOCK, text, offset=first * BLOCK)
