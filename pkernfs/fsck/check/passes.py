"""What a check looks at, and in which order.

A new invariant is a function in the file of its subject, or a file of its own: over the region as a whole, with a line
in FILESYSTEM, or over one inode and its record, with a line in EACH_INODE.  See ``problems`` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

from pkernfs.fsck.check.attributes import attributes
from pkernfs.fsck.check.directories import entries, names
from pkernfs.fsck.check.extents import extents
from pkernfs.fsck.check.holds import held_feature, hold
from pkernfs.fsck.check.inodes import flags, link_counts, mode, no_content, no_pins, pages, parent, size, symlink
from pkernfs.fsck.check.iommu import attachments, awaiting, mappings, records, tables
from pkernfs.fsck.check.metadata import block_table, journal, reserved_inodes, slab_headers, superblocks
from pkernfs.fsck.check.orphans import lost_inodes, orphans, says_listed
from pkernfs.fsck.check.quotas import quota_form, quotas
from pkernfs.fsck.check.space import leaks
from pkernfs.fsck.check.state import Check, InodeCheck
from pkernfs.fsck.check.tables import page_tables

Pass = Callable[[Check], None]

#: Once each.  Later ones use what earlier ones found.
FILESYSTEM: tuple[Pass, ...] = (
    superblocks,
    journal,
    block_table,
    slab_headers,
    reserved_inodes,
    names,  # the walk from the root: EACH_INODE for all that have a name
    orphans,  # and for those of the list
    lost_inodes,  # and for all others
    link_counts,
    held_feature,
    quotas,
    mappings,
    attachments,
    awaiting,
    leaks,
)
#: A region in use has page tables that say what their records say; tests that make records alone leave this one out.
PASSES: tuple[Pass, ...] = (*FILESYSTEM, page_tables)

#: For each inode that is reached, once, with its record.  A directory's names point to the others.
EACH_INODE: tuple[InodeCheck, ...] = (
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
    hold,
    quota_form,
)
