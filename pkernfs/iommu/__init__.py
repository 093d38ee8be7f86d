"""Page tables that an IOMMU walks: their formats, domains, what IOVAs of these translate to, and attached devices.

May import fs and what is below it.  Invariants: a table is stored before the entry that points to it; an entry that
hardware may be looking at changes by one 8-byte store; every change is one transaction, so that the tables say what the
records of the mappings say; pages of tables are not used again before somebody acknowledges that hardware has
invalidated what it had cached of them.
"""
