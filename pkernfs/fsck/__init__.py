"""fsck: what looks at everything below, and mends it.

``problems`` is the table of all invariants, and of what mends each.  ``check`` finds what does not hold (``findings``),
``repair`` mends it stage by stage, ``run`` is one run of the two: look, ask, repair, look again.  ``scrub`` verifies
the checksums of a region in use; ``explain`` says what owns an address.

May import iommu and fs, and all below them; nothing in those may import this.  Within the room imports go down, too:
run > repair > check > findings > problems.  A check never writes, and never raises on a damaged region.
"""
