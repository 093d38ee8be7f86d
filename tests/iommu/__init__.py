"""Tests of page tables: in memory, through a mount, and by the hardware that QEMU has."""
