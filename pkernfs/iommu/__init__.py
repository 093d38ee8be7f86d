"""Page tables that an IOMMU walks: their formats, the domains that devices are attached to, and what they lead to.

May import fs and what is below it.  Invariants: a table is stored before the entry that points to it; an entry that
hardware may be looking at changes by one 8-byte store; every change is one transaction, so that the tables say what the
records of the mappings say; pages of tables are not used again before hardware has forgotten them.
"""
