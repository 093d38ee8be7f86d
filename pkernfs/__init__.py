"""pkernfs: live-update state in one carved-out memory region, shown as a filesystem.

Imports go down only: cli > server | qemu > client > fsck > iommu > fs > region > format > layout > errors; all of it
is in pyproject.toml, where import-linter reads it.

``__version__`` moves with every change of the format of regions or of an interface (commands and their JSON, client,
vfio, the control protocol): the second number until there is a 1.0.
"""

__version__ = "0.3.0"
