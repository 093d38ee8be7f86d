"""What a check looks at, and in which order.

A new invariant is a function in the file of its subject, or a file of its own: over the region as a whole, with a line
in PASSES, or over one inode and its record, with a line in EACH_INODE.  It gets a name and a statement in INVARIANTS,
and a fault in tests/core/faults.py that only it reports.  What a repair needs to know stands in the Checker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pkernfs.fsck.check.attributes import attributes
from pkernfs.fsck.check.directories import entries, names
from pkernfs.fsck.check.extents import extents
from pkernfs.fsck.check.inodes import flags, link_counts, mode, no_content, no_pins, pages, parent, size, symlink
from pkernfs.fsck.check.iommu import attachments, mappings, records, tables
from pkernfs.fsck.check.metadata import block_table, journal, reserved_inodes, slab_headers, superblocks
from pkernfs.fsck.check.orphans import lost_inodes, orphans, says_listed
from pkernfs.fsck.check.quotas import quota_form, quotas
from pkernfs.fsck.check.space import leaks

if TYPE_CHECKING:
    from pkernfs.format import Inode
    from pkernfs.fsck.check.checker import Checker

#: Once each.  Later ones use what earlier ones found.
PASSES: tuple[Callable[[Checker], None], ...] = (
    superblocks,
    journal,
    block_table,
    slab_headers,
    reserved_inodes,
    names,  # the walk from the root: EACH_INODE for all that have a name
    orphans,  # and for those of the list
    lost_inodes,  # and for all others
    link_counts,
    quotas,
    mappings,
    attachments,
    leaks,
)

#: For each inode that is reached, once, with its record.  A directory's names lead to the others.
EACH_INODE: tuple[Callable[[Checker, int, Inode], None], ...] = (
    mode,
    flags,
    parent,
    says_listed,
    attributes,
    entries,
    size,
    symlink,
    extents,
    no_content,
    no_pins,
    tables,
    records,
    pages,
    quota_form,
)

#: What must hold, in the order of the checks: the name that a Problem gives, and the statement.
INVARIANTS: dict[str, str] = {
    # metadata
    "superblock": "both copies of the superblock are sound and equal",
    "journal": "the journal's header is sound, and no transaction waits to be applied",
    "block-table": "the pages of the block table are sound and name known kinds",
    "block-kind": "a block has the kind of its use: the first are metadata, and what a file uses is data",
    "slab-header": "the headers of slabs are sound",
    "slab-slots": "only pages of inodes have slots in use",
    "reserved-inode": "the reserved inodes, those of iommu/ too, hold what mkfs made, and the other slots nothing",
    "reserved-name": "the inodes of iommu/ have their names, one each, and nothing else has them",
    # one inode
    "inode-checksum": "an inode has the checksum of its bytes and its number",
    "inode-mode": "an inode in use has a type and permissions",
    "inode-flags": "the flags say what the type says",
    "inode-parent": "only a directory has a parent",
    "inode-size": "a size is at most what the type allows",
    "symlink": "a short symbolic link has its target in the inode, and nothing behind it",
    "inode-content": "devices, FIFOs and sockets have no content",
    "inode-pages": "an inode counts the pages that it holds",
    # trees
    "tree-node": "a node of a tree has a right checksum and belongs to the inode",
    "tree-level": "a child is one level below its parent",
    "tree-order": "keys rise, within the bounds that the parent gives",
    "name-key": "a name stands at a key that its hash allows",
    "name-twice": "a name stands once in its directory, or among the attributes of its inode",
    # what trees hold
    "xattr": "an attribute has the form of one, and as many pages as its value needs",
    "xattr-value": "the value of a large attribute has its checksum",
    "extent-value": "an extent has the form of one, and none stands behind the last",
    "extent-order": "the extents of a file do not overlap",
    "extent-range": "an extent is within the blocks for everybody, and within the largest file",
    "block-part": "a data block belongs whole to one extent",
    "block-align": "a data block stands at a multiple of 2 MiB of its file",
    "block-free": "what an extent names is not free",
    "page-range": "pages that are cut one by one are those of a slab",
    "page-free": "a page that is used is not free",
    "page-kind": "a page has the kind of its use",
    "double-use": "a block or page has one owner",
    # names
    "dirent": "a name has 1 to 255 bytes without / and NUL, and is not . or ..",
    "dirent-dangling": "a name leads to an inode in use",
    "dirent-mode": "a name says the type of its inode",
    "directory-names": "a directory has one name",
    "directory-parent": "a directory says where it is named",
    "directory-size": "a directory counts its entries",
    "link-count": "a file counts its names, a directory itself and its subdirectories",
    # quotas
    "project": "an inode counts against the quota that is next above it",
    "quota": "a quota says what is used by all that count against it, and nothing stands behind it",
    # page tables
    "iommu-name": "a domain stands in iommu/, and nothing else does but root-pgtables",
    "iommu-size": "page tables are whole blocks to their end",
    "iommu-bitmap": "the pages of the bitmaps of page tables are in use",
    "iommu-record": "a record of page tables has a key and a form that are known",
    "iommu-overlap": "the mappings of a domain do not overlap",
    "iommu-domain-id": "domains have different ids",
    "iommu-mapping": "a mapping names memory of a regular file",
    "iommu-end": "a file is as large as what is mapped of it",
    "iommu-pins": "a file counts the mappings that name it, and nothing else counts any",
    "iommu-attachment": "a device is attached to a domain",
    # what no name leads to
    "orphan-list": "the list of orphans is a circle of inodes in use",
    "orphan-links": "its links go both ways, and who says to be on it is",
    "orphan-unlisted": "an inode without a name is on the list",
    "inode-lost": "an inode that counts names has one",
    "inode-free": "a free slot is empty",
    "leaked-page": "a page that is allocated has an owner",
    "leaked-block": "a block that is allocated has an owner, and a slab has a page in use",
}
