"""What an inode may be, and which names may point to it: rules that need nothing but the inode itself."""

from __future__ import annotations

import stat

from pkernfs.format import (
    FIRST_FREE_SLOT,
    FLAG_DIR,
    FLAG_FILE,
    FLAG_IOMMU_DIR,
    FLAG_IOMMU_DOMAIN_PGTABLES,
    FLAG_IOMMU_ROOT_PGTABLES,
    GUARDED,
    IOMMU_INO,
    ORPHANS_INO,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    Ino,
    Inode,
)
from pkernfs.fs.pages import SIZE_LIMITS

TYPES = {*SIZE_LIMITS, stat.S_IFDIR}

#: inode -> (type, flags) of the slots that mkfs fills
RESERVED: dict[Ino, tuple[int, int]] = {
    ROOT_INO: (stat.S_IFDIR, FLAG_DIR),
    ORPHANS_INO: (stat.S_IFREG, FLAG_FILE),
    IOMMU_INO: (stat.S_IFDIR, FLAG_DIR | FLAG_IOMMU_DIR),
    ROOT_PGTABLES_INO: (stat.S_IFREG, FLAG_FILE | FLAG_IOMMU_ROOT_PGTABLES),
}
#: inode -> its one name: directory, name
PLACES: dict[Ino, tuple[Ino, bytes]] = {
    IOMMU_INO: (ROOT_INO, b"iommu"),
    ROOT_PGTABLES_INO: (IOMMU_INO, b"root-pgtables"),
}
_INO_AT = {place: ino for ino, place in PLACES.items()}


def type_flags(mode: int) -> int:
    """Those of the flags that say the type."""
    return FLAG_FILE * stat.S_ISREG(mode) | FLAG_DIR * stat.S_ISDIR(mode)


def plausible(ino: Ino, inode: Inode) -> bool:
    """Whether a slot with a wrong checksum holds an inode all the same: its flags agree with its type.

    All else is compared with what the inode points to.
    """
    kind = stat.S_IFMT(inode.mode)
    if ino < FIRST_FREE_SLOT:
        return RESERVED.get(ino) == (kind, inode.flags)
    return kind in TYPES and inode.flags & (FLAG_FILE | FLAG_DIR) == type_flags(kind)


def has_type(ino: Ino, inode: Inode) -> bool:
    """Whether the inode has a type, and a reserved one its own: one that has none cannot be kept."""
    kind = stat.S_IFMT(inode.mode)
    return kind in TYPES and (ino not in RESERVED or kind == RESERVED[ino][0])


def may_be_named(ino: Ino) -> bool:
    """Whether a name may point to the inode: not to a reserved slot without use, and not to the list of orphans."""
    return ino >= FIRST_FREE_SLOT or (ino in RESERVED and ino != ORPHANS_INO)


def in_its_place(ino: Ino, parent: Ino, name: bytes) -> bool:
    """Whether the name may point to the inode: those of iommu/ have one, and nothing else has it."""
    place = (parent, name)
    return PLACES.get(ino, place) == place and _INO_AT.get(place, ino) == ino


def may_stand_in(parent: Ino, ino: Ino, inode: Inode) -> bool:
    """Whether a directory may name the inode: iommu/ names domains, and no other directory does."""
    is_domain = inode.flags & FLAG_IOMMU_DOMAIN_PGTABLES and stat.S_ISREG(inode.mode)
    return ino < FIRST_FREE_SLOT or (parent == IOMMU_INO) == bool(is_domain)


def may_hold_tables(inode: Inode) -> bool:
    """Whether the flags of an inode that is not reserved say of tables what its type allows."""
    return not inode.flags & (GUARDED if not stat.S_ISREG(inode.mode) else FLAG_IOMMU_ROOT_PGTABLES)


def holds_tables(inode: Inode) -> bool:
    """Whether the content of the inode is page tables."""
    return bool(inode.flags & GUARDED) and stat.S_ISREG(inode.mode)
