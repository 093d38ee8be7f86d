"""The filesystem: inodes, names, content, quotas, and the transactions that change them.

May import: region, format, layout, errors, and api for what it tells.  No await, no FUSE, no IOMMU and no fsck here.

``Filesystem`` makes its parts and hands on what POSIX has a call for.  Every public call is one operation: it happens
completely, in one or more transactions, or raises FsError and changes nothing.  From below, each file importing what
stands before it only:

    damage, pages, slab, node       bytes to objects and back; what was found damaged
    journal, replies                one committed transaction; the reply to the last request
    space, cache                    who owns which memory; decoded inodes and nodes
    transaction                     the handle: who has one may change metadata
    allocator, charge, volume       taking and freeing memory; quotas' accounts; the open region, begin and commit
    btree, named, directory, xattrs, filemap, chunks        one inode's tree, entries, attributes, extents
    guard                           the questions that whoever knows the hardware answers (pkernfs.iommu)
    times, orphans, reclaim, quota, content, attributes, names, rename, lookups     the parts of a Filesystem
    filesystem, facts, paths, mkfs, mkfs_iommu              the whole; what is told of it; making one

Invariants: the region is the truth, and every object in memory is a decoded copy that may be dropped at any time
outside a transaction; metadata change only through a Transaction; what one frees is not given to anybody before it is
committed; what is pinned is neither freed nor moved.
"""
