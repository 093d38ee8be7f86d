"""Facts about a region and about a file's memory, as `pkernfs info --json` prints them.  All sizes in bytes."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress

from pkernfs.api import Extent, Features, FileInfo, Finding, Held, JournalInfo, Others, RegionInfo
from pkernfs.errors import CorruptError
from pkernfs.format import (
    BLOCK,
    FLAG_NAMES,
    FLAG_REGION_MAPPED,
    GUARDED,
    INODES_PER_PAGE,
    PAGE,
    PAGES_PER_BLOCK,
    Ino,
    Inode,
    geometry,
)
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.guard import pins
from pkernfs.fs.pages import read_inode
from pkernfs.fs.paths import search
from pkernfs.fs.volume import Volume


def file_facts(fs: Filesystem, ino: Ino) -> FileInfo:
    """The memory of a regular file, and what pins it.

    Raises FsError(EINVAL) for anything else, CorruptError.
    """
    inode = fs.getattr(ino)
    extents = [
        Extent(
            file_offset=extent.start * PAGE,
            region_offset=extent.page * PAGE,
            physical=fs.volume.physical(extent.page * PAGE),
            length=extent.length * PAGE,
        )
        for extent in fs.content.extents(ino)
    ]
    contiguous = bool(extents) and extents[0].file_offset == 0 and extents[0].length >= inode.size > 0
    return FileInfo(
        region=fs.region.path,
        ino=ino,
        size=inode.size,
        allocated=inode.pages * PAGE,
        flags=[name for bit, name in FLAG_NAMES.items() if inode.flags & bit],
        contiguous=contiguous,
        direct=bool(inode.flags & FLAG_REGION_MAPPED),
        extents=extents,
        pins=fs.guard.describe_pins(ino) if pins(inode) else [],
        awaiting=fs.guard.describe_awaiting(ino) if pins(inode) else [],
        held=held_facts(fs, ino, inode),
    )


def held_facts(fs: Filesystem, ino: Ino, inode: Inode) -> Held | None:
    """Why a file is held, and since when; where that cannot be read, that it is."""
    try:
        held = fs.holds.of(ino, inode)
    except CorruptError as error:
        return Held(since=0, reason=error.found)
    return held and Held(since=held.since, reason=held.reason)


def count_others(fs: Filesystem, ino: Ino, found: Others) -> Iterator[None]:
    """Count, in steps of a page of inodes, the regular files that are another owner's than ``ino``, or region-mapped.

    Damaged ones are not counted.
    """
    space, owner = fs.volume.space, fs.getattr(ino).uid
    one = 0
    for block in space.slab_blocks():
        slab = space.usable_slab(block)
        for index, slots in enumerate(slab.slots if slab else ()):
            if not slots:
                continue
            first = (block * PAGES_PER_BLOCK + index) * INODES_PER_PAGE
            for other in (Ino(first + slot) for slot in range(INODES_PER_PAGE) if slots >> slot & 1):
                with suppress(CorruptError):
                    if other != ino and _is_others(read_inode(fs.region, other), owner):
                        found.files += 1
                        one = one or other
            yield
    names: dict[int, list[bytes]] = {}
    for _ in search(fs.volume, {one}, names) if one else ():
        if names:
            found.path = os.fsdecode(names[one][0])
            break
        yield


def _is_others(inode: Inode, owner: int) -> bool:
    """Whether it is a file with memory that somebody else than ``owner`` relies on."""
    mine = inode.uid == owner and not inode.flags & FLAG_REGION_MAPPED
    return stat.S_ISREG(inode.mode) and inode.size > 0 and not inode.flags & GUARDED and not mine


def region_facts(fs: Filesystem) -> RegionInfo:
    """Geometry, use and features of the region."""
    volume = fs.volume
    sb = volume.sb
    figures = fs.statfs()
    return RegionInfo(
        region=fs.region.path,
        kind=fs.region.kind,
        readonly=fs.region.readonly,
        volatile=fs.region.volatile,
        barriers=fs.region.barriers,
        version=sb.version,
        uuid=str(uuid.UUID(bytes=sb.uuid)),
        label=sb.label.rstrip(b"\0").decode(errors="replace"),
        features=Features(compat=sb.compat, ro_compat=sb.ro_compat, incompat=sb.incompat),
        size=sb.blocks * BLOCK,
        block_size=BLOCK,
        page_size=PAGE,
        blocks=sb.blocks,
        blocks_free=volume.space.free_blocks,
        blocks_largest_free_run=volume.space.largest_free_run(),
        slabs=len(volume.space.slab_blocks()),
        space=figures.blocks * PAGE,
        space_used=(figures.blocks - figures.free) * PAGE,
        space_free=figures.available * PAGE,
        memory=fs.region.memory(),
        host_free=fs.region.host_free(),
        inodes=figures.files - figures.free_files,
        orphans=_noting(fs, lambda: len(fs.orphans.inos())),
        awaiting=_noting(fs, fs.guard.kept_bytes),
        phys_base=sb.phys_base,
        journal=JournalInfo(
            offset=sb.journal_offset,
            size=geometry(sb.blocks).journal_size,
            sequence=volume.journal.sequence,
            replayed_records=volume.recovered,
        ),
        first_block=sb.first_block,
        pages_per_block=PAGES_PER_BLOCK,
        created=sb.created,
        mounts=volume.superblock_word("mounts"),
        last_mounted=volume.superblock_word("mounted"),
        last_unmounted=volume.superblock_word("unmounted"),
        damaged=_findings(volume),  # at last: with what was found for these facts
    )


def _findings(volume: Volume) -> list[Finding]:
    return [
        Finding(structure=error.what, offset=error.offset, ino=error.ino or None, found=error.found)
        for error in volume.damage.found.values()
    ]


def _noting(fs: Filesystem, count: Callable[[], int]) -> int | None:
    """A figure; None where damage keeps it from being known."""
    try:
        return count()
    except CorruptError as error:
        fs.volume.damage.note(error)
        return None
