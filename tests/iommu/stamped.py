"""Filesystems whose files hold, in each page, who it is: so that no map of pkernfs is needed to judge a translation."""

from __future__ import annotations

import struct

from pkernfs.format import PAGE, Ino, MiB
from pkernfs.fs.filesystem import Filesystem
from tests.core.support import ME, ROOT, mkfile
from tests.iommu.walker import Memory, Range, Translation


def stamp(ino: Ino, page: int) -> int:
    """What the first 8 bytes of a file's page are."""
    return ino << 32 | page


def stamped_file(fs: Filesystem, name: bytes, size: int) -> Ino:
    """A file of ``size`` bytes, a multiple of 4 KiB; its inode."""
    ino = mkfile(fs, name)
    for start in range(0, size, MiB):
        pages = range(start // PAGE, min(start + MiB, size) // PAGE)
        fs.write(ino, start, b"".join(struct.pack("<Q", stamp(ino, page)).ljust(PAGE, b"\0") for page in pages))
    return ino


def scattered_files(fs: Filesystem, names: tuple[bytes, bytes], pages: int) -> tuple[Ino, Ino]:
    """Two files whose pages lie between each other's."""
    inos = [fs.create(ROOT, name, 0o100600, ME) for name in names]
    for page in range(pages):
        for ino in inos:
            fs.write(ino, page * PAGE, struct.pack("<Q", stamp(ino, page)).ljust(PAGE, b"\0"))
    return inos[0], inos[1]


def by_page(memory: Memory, leaves: list[Range]) -> dict[int, tuple[int, int]]:
    """By IOVA page: the stamp of the memory that it translates to, and the rights."""
    words, base = memory.words, memory.base
    return {
        (leaf.iova + at) // PAGE: (words[(leaf.physical + at - base) // 8], leaf.access)
        for leaf in leaves
        for at in range(0, leaf.length, PAGE)
    }


def stamp_at(memory: Memory, found: Translation) -> int:
    """The stamp of the page that a translation is to."""
    return memory.words[(found.physical - memory.base) // 8 & -512]
