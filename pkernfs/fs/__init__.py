"""The filesystem: allocator, inodes, trees, directories, extents, attributes, journal, check, mkfs.

May import: region, format, layout, errors.  No await and no FUSE here: every public method of Filesystem is one
operation that happens completely, in one or more transactions, or raises FsError and changes nothing.

Invariants: the region is the truth and every object held in memory is a decoded copy that may be dropped at any time
outside a transaction; metadata change only in ``Volume.transaction``; what a transaction frees is not given to anybody
before it is committed.
"""
