"""Page tables that an IOMMU walks: domains, what IOVAs of these translate to, and the devices attached to them.

May import: fs and what is below it, and api for what it tells.  Nothing here programs an IOMMU: whoever does gets the
address of a root table, and acknowledges invalidations.  From below, each file importing what stands before it only:

    pci, formats                    names of devices; entries of VT-d and AMD-Vi as data
    records, replies                trees of records in inodes of page tables; verbs that come again
    invalidations                   what hardware may have cached: added, listed, acknowledged
    pages, edit, contexts           pages of tables; changes that hardware may watch; what points devices to tables
    directory, awaiting             which domains there are; content that is pinned until hardware has invalidated it
    domain                          one of them (IOAS + HWPT), made and removed
    translations                    what tables and mappings say, as ranges, and where they differ
    mapping, devices, replace       map and unmap; attach and detach; tables made anew under DMA
    reclaim, restore                after an acknowledgement; at a mount
    pins, guard                     what maps a file; the answers to what fs asks (open_filesystem registers them)
    audit, views, walk, names       the proof, and what the control verbs show

Invariants: a table is stored before the entry that points to it; an entry that hardware may be looking at changes by
one 8-byte store; every change is one transaction, so that the tables say what the records of the mappings say; pages of
tables, and content of files, are not used again before somebody acknowledges that hardware has invalidated what it had
cached of them.
"""
