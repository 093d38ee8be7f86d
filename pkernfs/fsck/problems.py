"""The table of problems: each invariant of the format with its code, its statement, its severity and what mends it.

This is data, as e2fsck's problem.c is.  A check notes findings by ``Code``; a stage of a repair is given the findings
of the codes that name it here.  A new invariant is a Code, a line in PROBLEMS, a function in ``check`` that notes it,
and a fault in tests/core/faults.py that only it reports.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import NamedTuple


class Severity(Enum):
    """What a finding means for the region."""

    FATAL = "nothing can be read before it is mended"
    UNREADABLE = "what it points to cannot be read, so that what is below may seem to have no name and no owner"
    CONFLICT = "memory, a name or an IOVA means two things, or none"
    WRONG = "a field disagrees with what it describes; everything can be read"
    UNUSED = "nobody can use it: memory, or an inode without a name"


class Stage(StrEnum):
    """A stage of a repair, in the order of the stages; the value is what is shown while it is at work."""

    METADATA = "metadata"  #: superblocks, the journal, the block table: before the volume can be opened
    BLOCK_KINDS = "block kinds"
    SLAB_HEADERS = "slab headers"
    PAGE_KINDS = "page kinds"
    SLOTS = "slots"
    CHECKSUMS = "checksums"  #: what has a wrong checksum and looks right keeps what it says
    BAD_INODES = "bad inodes"
    CONTENTS = "contents"  #: trees and lists of extents are made anew from what can be kept
    RECORDS = "records"
    DOMAIN_IDS = "domain ids"
    BITMAPS = "bitmaps"
    FIELDS = "fields"
    FREE_SLOTS = "free slots"
    ORPHANS = "orphans"
    LEAKS = "leaks"
    LOST = "lost"  #: what has no name gets one
    PROJECTS = "projects"
    HOLDS = "holds"
    TABLES = "page tables"


class Code(StrEnum):
    """An invariant: the name that a finding gives, and that ``--json`` prints."""

    # metadata
    SUPERBLOCK = "superblock"
    JOURNAL = "journal"
    BLOCK_TABLE = "block-table"
    BLOCK_KIND = "block-kind"
    FEATURE = "feature"
    SLAB_HEADER = "slab-header"
    SLAB_SLOTS = "slab-slots"
    RESERVED_INODE = "reserved-inode"
    RESERVED_NAME = "reserved-name"
    # one inode
    INODE_CHECKSUM = "inode-checksum"
    INODE_MODE = "inode-mode"
    INODE_FLAGS = "inode-flags"
    INODE_PARENT = "inode-parent"
    INODE_SIZE = "inode-size"
    SYMLINK = "symlink"
    INODE_CONTENT = "inode-content"
    INODE_PAGES = "inode-pages"
    # trees
    TREE_NODE = "tree-node"
    TREE_LEVEL = "tree-level"
    TREE_ORDER = "tree-order"
    NAME_KEY = "name-key"
    NAME_TWICE = "name-twice"
    # what trees hold
    XATTR = "xattr"
    XATTR_VALUE = "xattr-value"
    EXTENT_VALUE = "extent-value"
    EXTENT_ORDER = "extent-order"
    EXTENT_RANGE = "extent-range"
    BLOCK_PART = "block-part"
    BLOCK_ALIGN = "block-align"
    BLOCK_FREE = "block-free"
    PAGE_RANGE = "page-range"
    PAGE_FREE = "page-free"
    PAGE_KIND = "page-kind"
    DOUBLE_USE = "double-use"
    # names
    DIRENT = "dirent"
    DIRENT_DANGLING = "dirent-dangling"
    DIRENT_MODE = "dirent-mode"
    DIRECTORY_NAMES = "directory-names"
    DIRECTORY_PARENT = "directory-parent"
    DIRECTORY_SIZE = "directory-size"
    LINK_COUNT = "link-count"
    HOLD = "hold"
    # quotas
    PROJECT = "project"
    QUOTA = "quota"
    # what page tables are to say, and what they say
    IOMMU_NAME = "iommu-name"
    IOMMU_SIZE = "iommu-size"
    IOMMU_BITMAP = "iommu-bitmap"
    IOMMU_RECORD = "iommu-record"
    IOMMU_OVERLAP = "iommu-overlap"
    IOMMU_DOMAIN_ID = "iommu-domain-id"
    IOMMU_MAPPING = "iommu-mapping"
    IOMMU_END = "iommu-end"
    IOMMU_PINS = "iommu-pins"
    IOMMU_ATTACHMENT = "iommu-attachment"
    IOMMU_AWAITING = "iommu-awaiting"
    IOMMU_PENDING = "iommu-pending"
    IOMMU_TABLES = "iommu-tables"
    # what has no name
    ORPHAN_LIST = "orphan-list"
    ORPHAN_LINKS = "orphan-links"
    ORPHAN_UNLISTED = "orphan-unlisted"
    INODE_LOST = "inode-lost"
    INODE_FREE = "inode-free"
    LEAKED_PAGE = "leaked-page"
    LEAKED_BLOCK = "leaked-block"


class Problem(NamedTuple):
    """A line of the table."""

    statement: str  #: what holds where there is no such problem
    severity: Severity
    mended_by: tuple[Stage, ...]  #: which of them depends on what was found


_FATAL, _UNREADABLE, _CONFLICT, _WRONG, _UNUSED = Severity
_S = Stage

#: In the order of the checks.
PROBLEMS: dict[Code, Problem] = {
    Code.SUPERBLOCK: Problem("the superblock and its copies are sound and equal", _FATAL, (_S.METADATA,)),
    Code.JOURNAL: Problem(
        "the journal's header is sound, and no transaction waits to be applied", _FATAL, (_S.METADATA,)
    ),
    Code.BLOCK_TABLE: Problem("the pages of the block table are sound and name known kinds", _FATAL, (_S.METADATA,)),
    Code.BLOCK_KIND: Problem(
        "a block has the kind of its use: the first are metadata, and what a file uses is data",
        _CONFLICT,
        (_S.METADATA, _S.BLOCK_KINDS, _S.CONTENTS),
    ),
    Code.FEATURE: Problem("a feature that is in use is switched on", _WRONG, (_S.RECORDS,)),
    Code.SLAB_HEADER: Problem("the headers of slabs are sound", _UNREADABLE, (_S.BLOCK_KINDS, _S.SLAB_HEADERS)),
    Code.SLAB_SLOTS: Problem("only pages of inodes have slots in use", _WRONG, (_S.SLOTS,)),
    Code.RESERVED_INODE: Problem(
        "the reserved inodes, those of iommu/ too, hold what mkfs made, and the other slots nothing",
        _CONFLICT,
        (_S.BAD_INODES, _S.FIELDS),
    ),
    Code.RESERVED_NAME: Problem(
        "the inodes of iommu/ have their names, one each, and nothing else has them",
        _CONFLICT,
        (_S.CONTENTS, _S.LOST),
    ),
    Code.INODE_CHECKSUM: Problem(
        "an inode has the checksum of its bytes and its number", _UNREADABLE, (_S.CHECKSUMS, _S.BAD_INODES)
    ),
    Code.INODE_MODE: Problem("an inode in use has a type and permissions", _CONFLICT, (_S.BAD_INODES, _S.FIELDS)),
    Code.INODE_FLAGS: Problem("the flags say what the type says", _WRONG, (_S.FIELDS,)),
    Code.INODE_PARENT: Problem("only a directory has a parent", _WRONG, (_S.FIELDS,)),
    Code.INODE_SIZE: Problem("a size is at most what the type allows", _WRONG, (_S.FIELDS,)),
    Code.SYMLINK: Problem(
        "a short symbolic link has its target in the inode, and nothing behind it", _WRONG, (_S.FIELDS,)
    ),
    Code.INODE_CONTENT: Problem("devices, FIFOs and sockets have no content", _WRONG, (_S.FIELDS,)),
    Code.INODE_PAGES: Problem("an inode counts the pages that it holds", _WRONG, (_S.FIELDS,)),
    Code.TREE_NODE: Problem(
        "a node of a tree has a right checksum and belongs to the inode", _UNREADABLE, (_S.CHECKSUMS, _S.CONTENTS)
    ),
    Code.TREE_LEVEL: Problem("a child is one level below its parent", _CONFLICT, (_S.CHECKSUMS, _S.CONTENTS)),
    Code.TREE_ORDER: Problem(
        "keys rise, within the bounds that the parent gives", _CONFLICT, (_S.CHECKSUMS, _S.CONTENTS)
    ),
    Code.NAME_KEY: Problem("a name stands at a key that its hash allows", _CONFLICT, (_S.CHECKSUMS, _S.CONTENTS)),
    Code.NAME_TWICE: Problem(
        "a name stands once in its directory, or among the attributes of its inode", _CONFLICT, (_S.CONTENTS,)
    ),
    Code.XATTR: Problem(
        "an attribute has the form of one, and as many pages as its value needs", _CONFLICT, (_S.CONTENTS,)
    ),
    Code.XATTR_VALUE: Problem("the value of a large attribute has its checksum", _CONFLICT, (_S.CONTENTS,)),
    Code.EXTENT_VALUE: Problem(
        "an extent has the form of one, and none stands behind the last", _CONFLICT, (_S.CONTENTS,)
    ),
    Code.EXTENT_ORDER: Problem("the extents of a file do not overlap", _CONFLICT, (_S.CONTENTS,)),
    Code.EXTENT_RANGE: Problem(
        "an extent is within the blocks for everybody, and within the largest file", _CONFLICT, (_S.CONTENTS,)
    ),
    Code.BLOCK_PART: Problem("a data block belongs whole to one extent", _CONFLICT, (_S.CONTENTS,)),
    Code.BLOCK_ALIGN: Problem("a data block stands at a multiple of 2 MiB of its file", _CONFLICT, (_S.CONTENTS,)),
    Code.BLOCK_FREE: Problem("what an extent names is not free", _CONFLICT, (_S.BLOCK_KINDS, _S.CONTENTS)),
    Code.PAGE_RANGE: Problem(
        "pages that are cut one by one are those of a slab", _CONFLICT, (_S.BLOCK_KINDS, _S.CHECKSUMS, _S.CONTENTS)
    ),
    Code.PAGE_FREE: Problem("a page that is used is not free", _CONFLICT, (_S.PAGE_KINDS, _S.CHECKSUMS, _S.CONTENTS)),
    Code.PAGE_KIND: Problem("a page has the kind of its use", _CONFLICT, (_S.PAGE_KINDS, _S.CHECKSUMS, _S.CONTENTS)),
    Code.DOUBLE_USE: Problem("a block or page has one owner", _CONFLICT, (_S.CHECKSUMS, _S.CONTENTS)),
    Code.DIRENT: Problem(
        "a name has 1 to 255 bytes without / and NUL, and is not . or ..", _UNREADABLE, (_S.CONTENTS,)
    ),
    Code.DIRENT_DANGLING: Problem("a name points to an inode in use", _CONFLICT, (_S.SLOTS, _S.CONTENTS)),
    Code.DIRENT_MODE: Problem("a name says the type of its inode", _WRONG, (_S.CONTENTS,)),
    Code.DIRECTORY_NAMES: Problem("a directory has one name", _CONFLICT, (_S.CONTENTS,)),
    Code.DIRECTORY_PARENT: Problem("a directory says where it is named", _WRONG, (_S.FIELDS,)),
    Code.DIRECTORY_SIZE: Problem("a directory counts its entries", _WRONG, (_S.FIELDS,)),
    Code.LINK_COUNT: Problem(
        "a file counts its names, a directory itself and its subdirectories", _WRONG, (_S.FIELDS,)
    ),
    Code.HOLD: Problem(
        "a held file has a record of why, nothing else has one, and the superblock says that there are such files",
        _WRONG,
        (_S.HOLDS,),
    ),
    Code.PROJECT: Problem(
        "an inode counts against the nearest quota that encloses it", _WRONG, (_S.FIELDS, _S.PROJECTS)
    ),
    Code.QUOTA: Problem(
        "a quota says what is used by all that count against it, and nothing stands behind it", _WRONG, (_S.FIELDS,)
    ),
    Code.IOMMU_NAME: Problem(
        "a domain stands in iommu/, and nothing else does but root-pgtables", _CONFLICT, (_S.CONTENTS, _S.FIELDS)
    ),
    Code.IOMMU_SIZE: Problem("page tables are whole blocks to their end", _WRONG, (_S.FIELDS,)),
    Code.IOMMU_BITMAP: Problem("the pages of the bitmaps of page tables are in use", _WRONG, (_S.BITMAPS,)),
    Code.IOMMU_RECORD: Problem(
        "a record of page tables has a key and a form that are known", _CONFLICT, (_S.CONTENTS,)
    ),
    Code.IOMMU_OVERLAP: Problem("the mappings of a domain do not overlap", _CONFLICT, (_S.CONTENTS,)),
    Code.IOMMU_DOMAIN_ID: Problem("domains have different ids", _CONFLICT, (_S.DOMAIN_IDS,)),
    Code.IOMMU_MAPPING: Problem("a mapping names memory of a regular file", _CONFLICT, (_S.RECORDS,)),
    Code.IOMMU_END: Problem("a file is as large as what is mapped of it", _WRONG, (_S.FIELDS,)),
    Code.IOMMU_PINS: Problem(
        "a file counts the mappings, and what awaits an invalidation, that name it, and nothing else counts any",
        _WRONG,
        (_S.FIELDS,),
    ),
    Code.IOMMU_ATTACHMENT: Problem("a device is attached to a domain", _CONFLICT, (_S.RECORDS,)),
    Code.IOMMU_AWAITING: Problem("what awaits an invalidation is content of a file", _CONFLICT, (_S.RECORDS,)),
    Code.IOMMU_PENDING: Problem("the invalidation that content awaits is pending", _WRONG, (_S.RECORDS,)),
    Code.ORPHAN_LIST: Problem("the list of orphans is a circle of inodes in use", _UNREADABLE, (_S.ORPHANS,)),
    Code.ORPHAN_LINKS: Problem("its links go both ways, and who says to be on it is", _WRONG, (_S.ORPHANS,)),
    Code.ORPHAN_UNLISTED: Problem("an inode without a name is on the list", _UNUSED, (_S.ORPHANS,)),
    Code.INODE_LOST: Problem("an inode that counts names has one", _UNUSED, (_S.LOST,)),
    Code.INODE_FREE: Problem("a free slot is empty", _WRONG, (_S.FREE_SLOTS,)),
    Code.LEAKED_PAGE: Problem("a page that is allocated has an owner", _UNUSED, (_S.LEAKS,)),
    Code.LEAKED_BLOCK: Problem(
        "a block that is allocated has an owner, and a slab has a page in use", _UNUSED, (_S.LEAKS,)
    ),
    Code.IOMMU_TABLES: Problem(
        "what devices can reach is what the mappings say (pkernfs iommu audit)", _CONFLICT, (_S.TABLES,)
    ),
}
