"""The format of a region: every structure, magic, kind and flag.  THE reference.

All values are little-endian; fields and arrays follow one another without padding.  A region is an array of 2 MiB
blocks, and of 4 KiB pages.

    offset 0                superblock (256 bytes), then 15 reserved inode slots of 256 bytes
    4 KiB                   block table: one byte for each block, in checksummed pages
    next multiple of 2 MiB  page 0: copy of the superblock; page 1: journal header; then the journal's body, at most
                            up to first_block
    first_block             blocks for everybody: data blocks, and slabs (blocks cut into 4 KiB pages)
    last page               with RO_COMPAT_FAR_COPY: one more copy of the superblock, in a slab that mkfs makes
                            (the page is of kind PAGE_FAR_COPY)

Block table.  The kind of block b is byte b % TABLE_FANOUT of table page b // TABLE_FANOUT (after the page header).

Slabs.  Page 0 of a slab is its header: a kind for each of its 512 pages and, for pages of inodes, a bitmap (bit i: slot
i) of the 16 slots in use; it is 0 for pages of other kinds.  Free space is 512 pages for each free block, and the free
pages of the slabs.

Inodes.  Inode i is the 256-byte slot at region offset i * 256; the number is the address.  A slot is in use when its
bit in the slab header is set (reserved slots: when mode is not 0).  The first 32 bytes are words that are stored in
place, each with one 8-byte store, and are not covered by the checksum.  Reserved are 1, the root directory, whose
parent is itself; 2, the head of the list of orphans, without a name; 3 and 4, the directory /iommu and the file
/iommu/root-pgtables.

Trees.  Directories, extents and extended attributes are B+trees of 4 KiB nodes with u64 keys.
A leaf holds count keys, count value lengths (u16) and the values one after the other; an inner node holds count keys
and count page numbers, key k being the least key below child k (the first key is not looked at).

    directory   key = name_key(name), value = Dirent + name; the keys are the readdir cookies
    extents     key = first page of the file, value = ExtentValue
    attributes  key = name_key(name), value = XattrHead + name + (value | ExtentValue[] of its pages)

What no extent covers reads as zero.  A data block belongs whole to one file, so extents can reach beyond its size: what
is mapped there may hold anything.  Pages that are cut one by one (of kind PAGE_DATA) are always in slabs.

A file with up to INLINE_EXTENTS extents keeps them in its inode instead (root == 0); a symbolic link of up to
INLINE_SIZE bytes keeps its target there.

Orphans.  Inodes without a name that are still open, and files whose memory beyond their size is still to be freed, are
in a circular list: orphan_next and orphan_prev, beginning and ending at the reserved inode ORPHANS_INO.  The next mount
that may write finishes what is listed.  (A list through the inodes, so that removing a file never allocates.)

Held files.  A regular file with FLAG_HELD has an attribute HOLD_NAME; no other inode has one.

Quotas.  New inodes take over ``project`` from the directory that they are made in.  What counts against a directory
with a quota counts against the quotas around it too: next is the project of its parent.  In a directory that has a
limit every entry's project is that directory's, but for directories with a quota of their own.

IOMMU.  The file /iommu/root-pgtables and each domain, a file /iommu/NAME with FLAG_IOMMU_DOMAIN_PGTABLES, hold page
tables in pages of their own, which hardware reads.  Page n * BITMAP_PAGES of such a file is the bitmap of its pages
from there on (bit i of the little-endian number: page i is in use), bit 0 for the bitmap itself.  What the tables are
to say stands in trees of records:

    a domain        key = IOVA / 4096, value = Mapping; key = DOMAIN_KEY, value = DomainRecord
    root-pgtables   key = ATTACHMENT_KEY + requester, value = Attachment
                    key = ROOT_TABLE_KEY + table format << 16 + PCI segment, value = RootTable
                    key = PENDING_IOTLB_KEY + domain id << IOVA_PAGE_BITS + IOVA / 4096, value = PendingInvalidation
                    key = PENDING_CONTEXT_KEY + requester, value = PendingInvalidation
                    key = AWAITING_KEY + inode << DOMAIN_ID_BITS + domain id, value = AwaitingContent
                    key = GENERATION_KEY, value = Generation
                    key = REQUEST_KEY + slot, value = Request

A requester is PCI segment << 16 | bus << 8 | device << 3 | function.  Mappings of a domain do not overlap.  The pins of
a file are the mappings, and the AwaitingContent, that name it: what they cover is not freed, and does not move.

Awaiting content (feature RO_COMPAT_AWAITING).  A mapping that is taken away while hardware may have cached it leaves an
AwaitingContent, in the same transaction, until it is acknowledged that all that was pending is invalidated.  A file
that is removed meanwhile stays an orphan.  Of one that is cut, the memory beyond its new end moves, in steps, to new
inodes without a name, which are orphans; until then it lies beyond the end of the file, which is listed as one that was
cut.  An invalidation of the record's domain id is pending.

Checksums are crc32c (Castagnoli) with the checksum field as zero.  A page's header names the page's own offset and its
owner; an inode's checksum continues from the low 32 bits of its number as from the crc of earlier bytes; so a misplaced
copy is found.

Journal.  One transaction at a time: body and header are written, then one 8-byte store of the commit record,
``commit`` = 2 * sequence + 1, makes it valid, the records are applied in their order, and ``commit`` = 2 * sequence
says that it is checkpointed.  A record is JournalRecord + data; one of kind WORDS is for memory that hardware reads:
each word of 8 bytes is stored by one store, in order.  One of kind DISCARD says that a range is free now and its memory
is to be given back (a reader may ignore it).  Pages that were free before the transaction are stored before the commit
record and are not in the journal.  An odd commit record over a header or body that does not fit means damage: nothing
is applied.  On media that reorder stores each of these steps is flushed before the next one begins, also before the
next transaction's.
"""

import hashlib
from typing import Annotated, Final, NamedTuple, NewType

from pkernfs.layout import bytes16, bytes64, bytes120, i64, layout, u8, u16, u32, u64
from pkernfs.lean import lean_imports

with lean_imports():
    from crc32c import crc32c

# What numbers are of.  "Page" alone would say nothing: five things are counted in units of 4 KiB.
Ino = NewType("Ino", int)  #: inode number: region offset / 256
BlockNo = NewType("BlockNo", int)  #: region offset / 2 MiB
PageNo = NewType("PageNo", int)  #: page of the region: region offset / 4 KiB
FilePage = NewType("FilePage", int)  #: page of a file: file offset / 4 KiB
TablePage = NewType("TablePage", int)  #: page of a file of page tables: file offset / 4 KiB
IovaPage = NewType("IovaPage", int)  #: IOVA / 4 KiB
Iova = NewType("Iova", int)  #: address that a device uses, bytes
PhysAddr = NewType("PhysAddr", int)  #: physical address, bytes: phys_base + region offset
Requester = NewType("Requester", int)  #: what an IOMMU knows a PCI function by: segment, bus, device, function
DomainId = NewType("DomainId", int)  #: by which hardware tags what it caches

# Fields of records that hold them.  So a decoded record has typed ids, without a call at run time.
ino64 = Annotated[Ino, "Q"]
page64 = Annotated[PageNo, "Q"]
file_page64 = Annotated[FilePage, "Q"]
table_page64 = Annotated[TablePage, "Q"]

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
TiB: Final = 1024 * GiB

PAGE: Final = 4 * KiB
BLOCK: Final = 2 * MiB
PAGES_PER_BLOCK: Final = BLOCK // PAGE
INODE_SIZE: Final = 256
INODES_PER_PAGE: Final = PAGE // INODE_SIZE
MIN_BLOCKS: Final = 4
MAX_BLOCKS: Final = 1 << 31  #: 4 PiB
MAX_FILE_SIZE: Final = 1 << 48  #: bytes; a larger offset is EFBIG
NAME_MAX: Final = 255
LINK_MAX: Final = 65000  #: names of one file, as ext4 has it
SYMLINK_MAX: Final = 4095
XATTR_SIZE_MAX: Final = 65536

MAGIC: Final = 0x706B65726E6673  #: "pkernfs" read as a number, the magic of the RFC; its bytes in memory are reversed
VERSION: Final = 1
TABLE_MAGIC: Final = 0x6C627462  #: "btbl"
SLAB_MAGIC: Final = 0x62616C73  #: "slab"
NODE_MAGIC: Final = 0x65646F6E  #: "node"
JOURNAL_MAGIC: Final = 0x6C6E726A  #: "jrnl"

# Features, as ext4 has them: an unknown compat bit is ignored, an unknown ro_compat bit allows a read-only mount only,
# an unknown incompat bit refuses the region.
RO_COMPAT_FAR_COPY: Final = 1  #: the last page of the last block is a copy of the superblock; set by mkfs
RO_COMPAT_AWAITING: Final = 2  #: content awaits invalidations: who does not know that would give it out too soon
RO_COMPAT_HELD: Final = 4  #: there are, or were, held files
COMPAT_KNOWN: Final = 0
RO_COMPAT_KNOWN: Final = RO_COMPAT_FAR_COPY | RO_COMPAT_AWAITING | RO_COMPAT_HELD
INCOMPAT_KNOWN: Final = 0
RO_COMPAT_NAMES: Final = {
    RO_COMPAT_FAR_COPY: "far copy of the superblock",
    RO_COMPAT_AWAITING: "content awaits invalidation",
    RO_COMPAT_HELD: "held files",
}

# Kinds of blocks, in the block table.
BLOCK_FREE: Final = 0
BLOCK_META: Final = 1  #: superblocks, block table, journal
BLOCK_DATA: Final = 2
BLOCK_SLAB: Final = 3
BLOCK_KINDS: Final = {BLOCK_FREE: "free", BLOCK_META: "metadata", BLOCK_DATA: "data", BLOCK_SLAB: "slab"}

# Kinds of pages, in a slab header.
PAGE_FREE: Final = 0
PAGE_HEADER: Final = 1
PAGE_INODES: Final = 2
PAGE_NODE: Final = 3
PAGE_DATA: Final = 4
PAGE_XATTR: Final = 5
#: Of the far copy of the superblock, which its place tells from the value of an attribute.  A kind of its own would
#: make the header of that slab, the first one, unreadable for versions that may read the region.
PAGE_FAR_COPY: Final = PAGE_XATTR
PAGE_KINDS: Final = {
    PAGE_FREE: "free",
    PAGE_HEADER: "slab header",
    PAGE_INODES: "inodes",
    PAGE_NODE: "tree node",
    PAGE_DATA: "data",
    PAGE_XATTR: "attribute value",
}

# Reserved inodes.
ROOT_INO: Final = Ino(1)
ORPHANS_INO: Final = Ino(2)
IOMMU_INO: Final = Ino(3)
ROOT_PGTABLES_INO: Final = Ino(4)
FIRST_FREE_SLOT: Final = 16

# Inode flags: the RFC's, then ours.
FLAG_FILE: Final = 1
FLAG_DIR: Final = 2
FLAG_IOMMU_DIR: Final = 4
FLAG_IOMMU_ROOT_PGTABLES: Final = 8
FLAG_IOMMU_DOMAIN_PGTABLES: Final = 16
FLAG_REGION_MAPPED: Final = 32  #: a process may map the memory from the region, past the mount: its blocks do not move
FLAG_HELD: Final = 64  #: neither content nor attributes nor names change, see Hold
#: The content is page tables, which hardware reads: only the API of the IOMMU changes it.
GUARDED: Final = FLAG_IOMMU_ROOT_PGTABLES | FLAG_IOMMU_DOMAIN_PGTABLES
FLAG_NAMES: Final = {
    FLAG_FILE: "file",
    FLAG_DIR: "dir",
    FLAG_IOMMU_DIR: "iommu-dir",
    FLAG_IOMMU_ROOT_PGTABLES: "iommu-root-pgtables",
    FLAG_IOMMU_DOMAIN_PGTABLES: "iommu-domain-pgtables",
    FLAG_REGION_MAPPED: "region-mapped",
    FLAG_HELD: "held",
}


class Superblock(NamedTuple):
    """The first 256 bytes of a region.

    A copy stands in the first page of the block that the journal begins in and, with RO_COMPAT_FAR_COPY, one more in
    the last page of the last block, as far away as can be: a stray write of some MiB at the beginning leaves it.

    Nothing changes it after mkfs but its features, which are switched on when they are first used (region/superblock.py
    says how), and the words at the end, which a server that mounts it read-write stores in place, in
    the first copy only; they are outside the checksum.  The region may be longer than ``blocks`` says.
    """

    magic: u64
    version: u32
    checksum: u32  #: of bytes 0..191
    compat: u32
    ro_compat: u32
    incompat: u32
    block_size: u32  #: bytes, always 2 MiB
    page_size: u32  #: bytes, always 4 KiB
    inode_size: u32  #: bytes, always 256
    uuid: bytes16
    label: bytes64  #: UTF-8, padded with NUL
    hash_seed: bytes16  #: key of name_key
    blocks: u64  #: blocks of the region
    phys_base: u64  #: physical address of offset 0
    table_pages: u64  #: pages of the block table, from offset 4096
    journal_offset: u64  #: bytes: the copy of the superblock, then the journal
    first_block: u64  #: first block that is not metadata
    created: i64  #: time of mkfs, ns since the epoch
    reserved_checked: u64 = 0
    mounts: u64 = 0  #: word: how often the region was mounted read-write
    mounted: i64 = 0  #: word: time of the last read-write mount, ns since the epoch
    unmounted: i64 = 0  #: word: time of the last orderly end; less than ``mounted`` after a crash
    reply_key: u64 = 0  #: word: key of the last request, when it was executed and is perhaps not answered; else 0
    reserved1: u64 = 0
    reserved2: u64 = 0
    reserved3: u64 = 0
    reserved4: u64 = 0


SUPERBLOCK = layout(Superblock, size=256)
SUPERBLOCK_CHECKED: Final = 192  #: bytes that the checksum covers


class PageHeader(NamedTuple):
    """The first 32 bytes of a page of the block table, a slab header and a tree node."""

    magic: u32
    checksum: u32  #: of the whole page
    offset: u64  #: of this page in the region, bytes
    owner: u64  #: inode of a node; index of a page of the block table; block of a slab
    keys: u16  #: of a node, else 0
    level: u16  #: of a node: 0 for a leaf, else one more than its children; else 0
    reserved: u32


PAGE_HEADER_LAYOUT = layout(PageHeader, size=32)
PAGE_BODY: Final = PAGE - PAGE_HEADER_LAYOUT.size
TABLE_FANOUT: Final = PAGE_BODY  #: blocks of one page of the block table
SLAB_KINDS_AT: Final = PAGE_HEADER_LAYOUT.size  #: u8[512]
SLAB_SLOTS_AT: Final = SLAB_KINDS_AT + PAGES_PER_BLOCK  #: u16[512]


class Inode(NamedTuple):
    """One 256-byte slot.

    ``nlink`` counts a file's names; a directory's is 2 + its subdirectories; 0: a file without a name, still open.
    """

    size: u64 = 0  #: word: bytes of content; of a directory the number of its entries ("." and ".." do not count)
    atime: i64 = 0  #: word: ns since the epoch
    mtime: i64 = 0  #: word
    ctime: i64 = 0  #: word
    checksum: u32 = 0  #: of bytes 32..255; may be 0 in a slot that was never used
    mode: u32 = 0  #: S_IFMT | permission bits, as st_mode; 0 in a free slot
    nlink: u32 = 0
    generation: u32 = 0  #: distinguishes the users of a slot over time; kept while it is free
    uid: u32 = 0
    gid: u32 = 0
    rdev: u32 = 0  #: as the kernel's new_encode_dev
    flags: u32 = 0
    btime: i64 = 0  #: birth, ns since the epoch
    parent: ino64 = Ino(0)  #: a directory's parent; for others 0
    pages: u64 = 0  #: 4 KiB pages of content, trees and attributes that belong to this inode
    root: page64 = PageNo(0)  #: page number of the root of the directory's or the extents' tree; 0: empty, or inline
    xattrs: page64 = PageNo(0)  #: page number of the root of the attributes' tree, or 0
    project: ino64 = Ino(0)  #: the directory whose quota this inode counts against; of one with a quota itself; 0: none
    iommu: u64 = 0  #: of page tables: page number of the root of their records' tree; of others: their pins
    orphan_next: ino64 = Ino(0)  #: the next and the previous inode of the list of orphans; 0: not listed
    orphan_prev: ino64 = Ino(0)
    inline: bytes120 = bytes(120)  #: extents (Extent[5]), the target of a short symbolic link, or a Quota


INODE = layout(Inode, size=INODE_SIZE)
INODE_CHECKED_AT: Final = 32
INODE_SIZE_AT, INODE_ATIME_AT, INODE_MTIME_AT, INODE_CTIME_AT = 0, 8, 16, 24
INLINE_SIZE: Final = 120


class Extent(NamedTuple):
    """A run of a file's pages.  Inline in an inode; unused ones are zero and stand at the end."""

    start: file_page64
    page: page64  #: the first
    length: u64  #: pages, not 0


EXTENT = layout(Extent, size=24)
INLINE_EXTENTS: Final = INLINE_SIZE // EXTENT.size


class ExtentValue(NamedTuple):
    """The value of an extent in a tree, whose key is ``start``."""

    page: page64
    length: u64  #: pages


EXTENT_VALUE = layout(ExtentValue, size=16)


class Quota(NamedTuple):
    """Inline in a directory whose ``project`` is itself."""

    limit: u64  #: bytes that may be used; 0: it is being set or taken away, and limits and counts nothing
    used: u64  #: bytes that are: INODE_SIZE for each inode, PAGE for each of its pages


QUOTA = layout(Quota, size=16)


class Dirent(NamedTuple):
    """A directory entry; the name (1 to 255 bytes, no '/' and no NUL) follows."""

    ino: ino64
    mode: u32  #: the S_IFMT bits of the inode's mode
    length: u32  #: bytes of the name


DIRENT = layout(Dirent, size=16)


class XattrHead(NamedTuple):
    """An extended attribute; its name ("user.x", 1 to 255 bytes) follows, then the value.

    When that is larger than XATTR_INLINE, its pages (of kind PAGE_XATTR) follow instead.
    """

    name_length: u8
    external: u8  #: 1: ExtentValue[] of the pages that hold the value
    reserved: u16
    size: u32  #: bytes of the value
    checksum: u32  #: of an external value, else 0
    reserved2: u32


XATTR_HEAD = layout(XattrHead, size=16)
XATTR_INLINE: Final = 512


class Hold(NamedTuple):
    """Of a regular file with FLAG_HELD, whose content, attributes and names nobody can change: since when, and why.

    The value of its attribute HOLD_NAME, whose namespace is not open to users; the reason, UTF-8, follows.
    """

    since: i64  #: ns since the epoch


HOLD = layout(Hold, size=8)
HOLD_NAME: Final = b"pkernfs.hold"
HOLD_REASON_MAX: Final = 255  #: bytes; at least 1


# Keys of the records of the IOMMU.  Those of mappings are below 1 << IOVA_PAGE_BITS.
LAST_DOMAIN_ID: Final = 0xFFFE  #: the first is 1: Linux does not use 0 and 0xffff either
MAX_PHYSICAL: Final = 1 << 52  #: physical addresses that tables can hold are below
IOVA_PAGE_BITS: Final = 45  #: of a page number of the largest address space: 5 levels, 57 bits
ROOT_TABLE_KEY: Final = 1 << 60
ATTACHMENT_KEY: Final = 2 << 60
PENDING_CONTEXT_KEY: Final = 3 << 60
PENDING_IOTLB_KEY: Final = 4 << 60  #: up to 6 << 60
AWAITING_KEY: Final = 8 << 60  #: up to 9 << 60
DOMAIN_ID_BITS: Final = 16
GENERATION_KEY: Final = 14 << 60
REQUEST_KEY: Final = 15 << 60
REQUEST_SLOTS: Final = 64  #: a request stands in the slot of its key modulo this
DOMAIN_KEY: Final = 15 << 60
BITMAP_PAGES: Final = 8 * PAGE  #: pages that one page of bitmap tells of

READ: Final = 1
WRITE: Final = 2
ACCESS_NAMES: Final = {0: "none", READ: "ro", WRITE: "wo", READ | WRITE: "rw"}
PERSISTENT: Final = 1  #: the device goes on doing DMA from one mount to the next
DEFERRED: Final = 2  #: its owner has not claimed it since the last mount
TABLES_VTD: Final = 0  #: Intel VT-d, legacy mode
TABLES_AMD: Final = 1  #: AMD-Vi, v1 page tables


class Mapping(NamedTuple):
    """A range of an address space that is mapped to a range of a file."""

    ino: ino64
    start: file_page64  #: first page of the file
    length: u64  #: pages, not 0
    access: u32  #: READ | WRITE
    reserved: u32 = 0


MAPPING = layout(Mapping, size=32)


class DomainRecord(NamedTuple):
    """What a domain's tables are.  A domain without it has not been used yet."""

    tables: u8  #: TABLES_*
    levels: u8  #: 3 to 5
    leaf: u8  #: the largest leaves that may be made: 1: 4 KiB, 2: 2 MiB, 3: 1 GiB
    reserved: u8
    id: u32  #: domain id, by which hardware tags what it caches: 1 to 0xfffe, unique among tables of all formats
    root: u64  #: page of the file that the root of the tables is; 0: none yet
    awaiting: u64  #: pages of the file that tables were in, and that await an invalidation: hardware may still see them


DOMAIN = layout(DomainRecord, size=24)


class Attachment(NamedTuple):
    """A device whose context entry (AMD: device table entry) points to the tables of a domain."""

    domain: ino64
    id: u32  #: domain id
    flags: u32  #: PERSISTENT, DEFERRED


ATTACHMENT = layout(Attachment, size=16)


class RootTable(NamedTuple):
    """Where a VT-d root table or an AMD device table stands."""

    page: u64  #: of the file root-pgtables


ROOT_TABLE = layout(RootTable, size=8)


class PendingInvalidation(NamedTuple):
    """What hardware may have cached and is to invalidate: translations of an id, or the context of a device."""

    length: u64  #: pages from the key's on; 0: all of the id
    id: u64  #: domain id


PENDING = layout(PendingInvalidation, size=16)


class AwaitingContent(NamedTuple):
    """What hardware may have cached of a file's memory, under a domain id: that memory is not given out again."""

    start: file_page64  #: all such pages are among ``length`` from this one on
    length: u64  #: not 0


AWAITING = layout(AwaitingContent, size=16)


class Generation(NamedTuple):
    """How many invalidations were ever added: names the list of those that are pending."""

    number: u64


GENERATION = layout(Generation, size=8)


class Request(NamedTuple):
    """A request that changed something, so that it is known when it comes again."""

    key: u64
    result: u64


REQUEST = layout(Request, size=16)


class JournalHeader(NamedTuple):
    """The first page of the journal; the body begins at the next page."""

    commit: u64  #: word, the commit record: 2 * sequence + 1 while the transaction must be applied, else 2 * sequence
    magic: u32
    checksum: u32  #: of this header from ``sequence`` on, and then the body
    sequence: u64
    length: u64  #: bytes of the body
    records: u64


JOURNAL_HEADER = layout(JournalHeader, size=40)
JOURNAL_CHECKED_AT: Final = 16


class JournalRecord(NamedTuple):
    """STORE, WORDS: ``length`` bytes, which follow, for ``offset``, multiples of 8.  DISCARD: ``length`` pages."""

    offset: u64
    length: u32
    kind: u32


JOURNAL_RECORD = layout(JournalRecord, size=16)
STORE: Final = 0
DISCARD: Final = 1
WORDS: Final = 2


def checksum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """crc32c of ``data``, continuing from ``start``."""
    return crc32c(data, start)


KEY_SLOTS: Final = 64  #: names with equal hashes that one tree can hold


def name_key(seed: bytes, name: bytes) -> int:
    """The first of the KEY_SLOTS keys under which ``name`` can stand: a multiple of 64 below 2**62.

    BLAKE2b keyed by the region's seed, so that nobody can prepare names that collide.
    """
    digest = hashlib.blake2b(name, digest_size=8, key=seed).digest()
    return int.from_bytes(digest, "little") & 0x3FFFFFFFFFFFFFC0


class Geometry(NamedTuple):
    """Where the parts of a region with ``blocks`` blocks stand."""

    blocks: int
    table_pages: int
    journal_offset: int
    journal_size: int  #: bytes of the journal's body
    first_block: int


def geometry(blocks: int) -> Geometry:
    """The geometry that mkfs gives a region of ``blocks`` blocks.

    The journal's body must hold what the largest transaction changes: the whole block table; the headers of the slabs
    from which it allocates the pages of a chunk (512, or less in a small region) and of those that it frees (as many);
    and nodes and inodes, less than 1 MiB.
    """
    table_pages = -(-blocks // TABLE_FANOUT)
    journal_block = -(-(PAGE + table_pages * PAGE) // BLOCK)
    pages = table_pages + 2 * min(blocks, PAGES_PER_BLOCK)
    journal_blocks = -(-(2 * PAGE + pages * (PAGE + JOURNAL_RECORD.size) + MiB) // BLOCK)
    return Geometry(
        blocks=blocks,
        table_pages=table_pages,
        journal_offset=journal_block * BLOCK,
        journal_size=journal_blocks * BLOCK - 2 * PAGE,
        first_block=journal_block + journal_blocks,
    )
