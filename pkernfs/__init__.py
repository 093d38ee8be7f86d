"""pkernfs: live-update state in one carved-out memory region, shown as a filesystem.

Imports go down only: cli > server | qemu > fs > region > format > layout > errors.
"""

__version__ = "0.1.0"
