"""Formats of page tables and of what points a device to them, as data.

Sources: Intel Virtualization Technology for Directed I/O, chapter 9 (root entry 9.1, context entry 9.3, second-level
paging entries 9.8); AMD I/O Virtualization Technology (IOMMU) specification, 2.2.2.1 (device table entry) and 2.2.3
(I/O page tables).  Tables have 512 entries of 8 bytes; a table of level 1 points to pages of 4 KiB, and an entry of
level n spans 4 KiB * 512^(n-1).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pkernfs.format import PAGE, TABLES_AMD, TABLES_VTD, DomainId, GiB, Iova, MiB, PhysAddr

ENTRIES: Final = 512
IOVA_START, IOVA_END = Iova(0), Iova(1 << 64)  #: all IOVAs
ADDRESS: Final = (1 << 52) - PAGE  #: bits 51:12 of an entry
INTERRUPTS: Final = range(0xFEE00000, 0xFEF00000)  #: writes here are interrupts, whatever the tables say


def span(level: int) -> int:
    """Bytes that one entry of a table of this level spans."""
    return PAGE << 9 * (level - 1)


LEAVES: Final = {1: PAGE, 2: 2 * MiB, 3: GiB}  #: by level: bytes of a leaf there
LEAF_NAMES: Final = {1: "4 KiB", 2: "2 MiB", 3: "1 GiB"}
assert all(span(level) == size for level, size in LEAVES.items())


class TableFormat(NamedTuple):
    """Entries of page tables.  An entry is its address | bits of its kind | bits of its rights."""

    name: str
    number: int  #: TABLES_* of a region
    present: int  #: one of these bits is set in an entry that points anywhere
    read: int
    write: int
    kind: int  #: the bits in which entries that point to tables and leaves differ
    table: dict[int, int]  #: by level: bits of an entry there that points to a table of the level below
    leaf: dict[int, int]  #: by level: bits of a leaf there, beside its rights
    reserved: tuple[range, ...]  #: IOVAs that do not come to the tables

    def access_bits(self, access: int) -> int:
        """The bits of rights (READ, WRITE)."""
        return (self.read if access & 1 else 0) | (self.write if access & 2 else 0)

    def access(self, entry: int) -> int:
        """The rights that an entry gives."""
        return (1 if entry & self.read else 0) | (2 if entry & self.write else 0)

    def is_leaf(self, entry: int, level: int) -> bool:
        """Whether a present entry is a leaf; else it points to a table."""
        return level == 1 or (level in self.leaf and entry & self.kind == self.leaf[level] & self.kind)

    def odd_bits(self, entry: int, level: int) -> int:
        """The bits of a present entry that it must not have or must have and lacks; rights of leaves may be any."""
        if self.is_leaf(entry, level):
            return (entry & ~(self.read | self.write) & ~(ADDRESS & -span(level))) ^ self.leaf[level]
        return (entry & ~ADDRESS) ^ self.table[level]


VTD: Final = TableFormat(
    name="vtd",
    number=TABLES_VTD,
    present=3,
    read=1,
    write=2,
    kind=1 << 7,
    table=dict.fromkeys(range(2, 6), 3),
    leaf={1: 0, 2: 1 << 7, 3: 1 << 7},
    reserved=(INTERRUPTS,),
)
#: FC, bit 60, makes the device's accesses coherent, as Linux has it.
AMD: Final = TableFormat(
    name="amd",
    number=TABLES_AMD,
    present=1,
    read=1 << 61,
    write=1 << 62,
    kind=7 << 9,
    table={level: 1 | level - 1 << 9 | 3 << 61 for level in range(2, 6)},
    leaf=dict.fromkeys(LEAVES, 1 | 1 << 60),
    reserved=(INTERRUPTS, range(0xFD_0000_0000, 0x100_0000_0000)),  # the latter: HyperTransport's
)
FORMATS: Final = {form.number: form for form in (VTD, AMD)}
BY_NAME: Final = {form.name: form for form in FORMATS.values()}


class DeviceFormat(NamedTuple):
    """What points a device to the tables of its domain: an array of ``words`` 64-bit words for each device.

    The first word has the address of the tables, and whether all of the entry counts: it is stored last when a device
    is attached, and first when it is detached; a store of it alone points the device to other tables.
    """

    words: int
    devices: int  #: entries of one table
    blocked: tuple[int, ...]  #: an entry that lets nothing pass
    register: str  #: that gets the table's, or the root table's, address
    root: bool  #: whether a root table points to one such table for each bus


def vtd_context(tables: PhysAddr, levels: int, domain_id: DomainId) -> tuple[int, ...]:
    """A context entry: translation type 0 (untranslated requests through second-level tables), faults reported."""
    return (tables | 1, domain_id << 8 | levels - 2)


def amd_device(tables: PhysAddr, levels: int, domain_id: DomainId) -> tuple[int, ...]:
    """A device table entry: V, TV, mode = levels, IR, IW; interrupts are not remapped."""
    return (tables | 3 | levels << 9 | 3 << 61, domain_id, 0, 0)


DEVICES: Final = {
    TABLES_VTD: DeviceFormat(words=2, devices=256, blocked=(0, 0), register="RTADDR", root=True),
    # Without V everything passes: blocked is V and TV without rights.
    TABLES_AMD: DeviceFormat(words=4, devices=65536, blocked=(3, 0, 0, 0), register="DevTabBase", root=False),
}
ENTRY_OF: Final = {TABLES_VTD: vtd_context, TABLES_AMD: amd_device}
