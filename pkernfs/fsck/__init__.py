"""fsck: what looks at everything below, and mends it.

``check`` holds the invariants of the format, ``repair`` the stages that mend them, ``tables`` the same for the page
tables of an IOMMU; ``scrub`` reads for damage of a region in use; ``explain`` says what one page or inode holds.
May import fs and iommu, and all below them; nothing in those may import this.
"""
