"""Repair of inodes: slots, fields, counts, the reserved ones and the list of orphans."""

from __future__ import annotations

import stat

from pkernfs.errors import CorruptError, FsError
from pkernfs.format import (
    FIRST_FREE_SLOT,
    INODE_SIZE,
    ORPHANS_INO,
    PAGE,
    PAGES_PER_BLOCK,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    Ino,
    Inode,
    PageNo,
)
from pkernfs.fs.damage import NO_INO, NO_PAGE
from pkernfs.fs.mkfs import ROOT_MODE
from pkernfs.fs.node import Node
from pkernfs.fs.pages import new_inode, raw_inode, read_inode
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.rules import RESERVED
from pkernfs.fsck.findings import Fields, NotEmpty, Unlisted, Unusable, Values
from pkernfs.fsck.problems import Code
from pkernfs.fsck.repair.work import Work, batches


def empty_slot(volume: Volume, ino: Ino) -> Inode:
    """What a free slot holds: the number that tells its users apart goes on."""
    return Inode(generation=raw_inode(volume.region, ino).generation)


def bad_inodes(work: Work) -> None:
    """An inode that cannot be kept is cleared, a reserved one made anew; what it had is freed later.

    Only the slot: the names that are left point to nothing then, and go in the next round.
    """
    volume, space = work.volume, work.volume.space
    bad = {data.ino: (code, data.why) for code, data in work.found(Unusable)}
    for batch in batches(bad.items()):
        with volume.transaction() as tx:
            for ino, (code, why) in batch:
                if ino < FIRST_FREE_SLOT:
                    tx.put_inode(ino, _reserved(volume, ino))
                    done = "made anew" if ino in RESERVED else "cleared"
                    work.note(code, f"inode {ino} was {why}: {done}", ino=ino)
                    continue
                if not space.inode_in_use(ino):
                    continue
                tx.free_inode(ino, empty_slot(volume, ino))
                work.note(code, f"inode {ino} was {why}: cleared", ino=ino, offset=ino * INODE_SIZE)


def _reserved(volume: Volume, ino: Ino) -> Inode:
    """A reserved inode as mkfs makes it; a directory keeps its entries and attributes, root-pgtables its records.

    Trees that cannot be found begin nowhere: the next round makes them anew from their leaves.
    """
    if ino not in RESERVED:
        return Inode()
    raw = raw_inode(volume.region, ino)
    kind, flags = RESERVED[ino]
    is_dir = kind == stat.S_IFDIR
    now = volume.clock()
    permissions = 0o600 if ino == ROOT_PGTABLES_INO else ROOT_MODE
    pages = map(PageNo, (raw.root, raw.xattrs, raw.iommu))
    trees = [page if is_root_of(volume, page, ino) else PageNo(volume.total_pages) for page in pages]
    root, xattrs = trees[:2] if is_dir else (NO_PAGE, NO_PAGE)
    records = trees[2] if ino == ROOT_PGTABLES_INO else 0
    listed = ORPHANS_INO if ino == ORPHANS_INO else NO_INO
    try:
        owner = read_inode(volume.region, ROOT_INO)
    except CorruptError:
        owner = Inode()
    made = new_inode(kind | permissions, now, owner.uid, owner.gid, flags=flags, parent=ROOT_INO)
    return made._replace(root=root, xattrs=xattrs, iommu=records, orphan_next=listed, orphan_prev=listed)


def is_root_of(volume: Volume, page: PageNo, ino: Ino) -> bool:
    """Whether the page holds a node that names the inode as its owner, whatever its checksum."""
    if not volume.sb.first_block * PAGES_PER_BLOCK <= page < volume.total_pages:
        return False
    try:
        Node.decode(volume.region.read(page * PAGE, PAGE), page, ino, verify=False)
    except CorruptError:
        return False
    return True


def free_slots(work: Work) -> None:
    """A free slot is empty."""
    volume = work.volume
    for batch in batches(work.found(NotEmpty)):
        with volume.transaction() as tx:
            for code, (ino,) in batch:
                tx.put_inode(ino, empty_slot(volume, ino))
                work.note(code, f"inode {ino}: the free slot was emptied", ino=ino, offset=ino * INODE_SIZE)


def fields(work: Work) -> None:
    """Types, flags, parents, sizes and counts are what the walk found."""
    volume = work.volume
    wrong: dict[Ino, dict[Code, Values]] = {}  #: by inode, and by the invariant that they are to mend
    for code, data in work.found(Fields):
        wrong.setdefault(data.ino, {}).setdefault(code, {}).update(data.values)
    for batch in batches(wrong.items()):
        with volume.transaction() as tx:
            for ino, by_code in batch:
                try:
                    inode = read_inode(volume.region, ino)
                except CorruptError:
                    continue
                for code, values in by_code.items():
                    fixed = inode._replace(**values)
                    if fixed == inode:
                        continue
                    inode = fixed
                    tx.put_inode(ino, inode)
                    text = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
                    work.note(code, f"inode {ino}: set {text}", ino=ino, offset=ino * INODE_SIZE)


def _short(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) and value > 9 else "anew" if isinstance(value, bytes) else str(value)


def orphans(work: Work) -> None:
    """The list of orphans is made anew from those that it has, that say they are on it, and that should be."""
    if not work.findings:
        return
    reached, volume = work.reached, work.volume
    unlisted = {data.ino for _, data in work.found(Unlisted)}
    members = sorted((reached.listed | reached.says_listed | unlisted) - {int(ORPHANS_INO)})
    members = [ino for ino in members if ino >= FIRST_FREE_SLOT and _usable(volume, ino)]
    ring = [ORPHANS_INO, *members, ORPHANS_INO]
    links = list(zip(ring[1:-1], ring[2:], ring, strict=False))
    # Reserved inodes are never on the list.
    links += [(ino, NO_INO, NO_INO) for ino in reached.listed | reached.says_listed if ino < FIRST_FREE_SLOT]
    links = [link for link in links if link[0] != ORPHANS_INO]
    links.append((ORPHANS_INO, ring[1], ring[-2]))
    # The head at last: until then the list is as broken as it was.
    for batch in batches(links):
        with volume.transaction() as tx:
            for ino, after, before in batch:
                inode = read_inode(volume.region, ino)
                tx.put_inode(ino, inode._replace(orphan_next=after, orphan_prev=before))
    text = f"the list of orphans was made anew: {len(members)} inodes"
    work.note(work.findings[0].code, text, ino=ORPHANS_INO)


def _usable(volume: Volume, ino: Ino) -> bool:
    try:
        return bool(volume.space.inode_in_use(ino) and volume.inode(ino).mode)
    except (CorruptError, FsError):
        return False
