"""The filesystem as the server, the tools and the tests use it: its parts, and what a program can ask of a file."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import NamedTuple

from pkernfs.errors import mode_text
from pkernfs.format import INODES_PER_PAGE, PAGES_PER_BLOCK, ROOT_INO
from pkernfs.fs.attributes import Attributes
from pkernfs.fs.content import Content
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.guard import Guard
from pkernfs.fs.holds import Holds
from pkernfs.fs.lookups import Lookups
from pkernfs.fs.names import Names
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.quota import Quotas
from pkernfs.fs.reclaim import Reclaimer
from pkernfs.fs.rename import Renames
from pkernfs.fs.times import Times
from pkernfs.fs.volume import Volume
from pkernfs.region import Region


class Statfs(NamedTuple):
    """Figures of statvfs(3); the first three in pages of 4 KiB."""

    blocks: int
    free: int
    available: int  #: of those that are free: for which the host has memory
    files: int
    free_files: int


class Filesystem:
    """One region's filesystem.  Inode numbers in, FsError out; every call is complete when it returns.

    The parts do the work; what POSIX has a call for is handed on here under its name.
    """

    def __init__(self, volume: Volume, guard: Callable[[Volume], Guard], lookups: Lookups | None = None) -> None:
        self.volume = volume
        self.region = volume.region
        self.guard = guard(volume)
        self.lookups = lookups or Lookups(volume.region.size)
        self.times = Times(volume)
        self.orphans = Orphans(volume)
        self.reclaimer = Reclaimer(volume, self.lookups, self.orphans, self.guard)
        self.quotas = Quotas(volume, self.orphans)
        self.holds = Holds(volume)
        self.content = content = Content(volume, self.times, self.reclaimer, self.guard)
        self.attributes = attributes = Attributes(volume, content, self.orphans, self.reclaimer, self.guard, self.holds)
        self.names = names = Names(volume, self.times, content, self.orphans, self.reclaimer, self.quotas, self.guard)
        self.renames = Renames(names)
        # Bound methods, and not methods that call them: a request pays nothing for the handing on (a call costs 50 ns,
        # a cached lookup 3 us).
        self.lookup, self.resolve, self.readdir = names.lookup, names.resolve, names.readdir
        self.create, self.link, self.rename = names.create, names.link, self.renames.rename
        self.unlink, self.rmdir = names.unlink, names.rmdir
        self.read, self.write, self.readlink = content.read, content.write, content.readlink
        self.getattr, self.setattr = volume.inode, attributes.setattr
        self.getxattr, self.setxattr = attributes.getxattr, attributes.setxattr
        self.listxattr, self.removexattr = attributes.listxattr, attributes.removexattr

    @classmethod
    def open(cls, region: Region, guard: Callable[[Volume], Guard], lookups: Lookups | None = None) -> Filesystem:
        """Open the filesystem in ``region``: replay the journal and, when it may write, free the orphans.

        ``guard``: asked before what hardware may be using is touched.  ``lookups``: of a mount that goes on after the
        end of its server.  Raises FormatError, CorruptError (also when the root directory is damaged).
        """
        fs = cls(Volume(region), guard, lookups)
        root = fs.volume.inode_named_by(ROOT_INO, ROOT_INO)
        if not stat.S_ISDIR(root.mode) or root.parent != ROOT_INO:
            found = f"expected a directory, its own parent, found {mode_text(root.mode)}, parent {root.parent}"
            raise corrupt_inode(ROOT_INO, found, "the root directory")
        if not region.readonly:
            fs.reclaimer.finish_listed()
        return fs

    def close(self) -> None:
        """Free what was kept for open files only, note the orderly end, release the region."""
        if not self.region.readonly:
            self.reclaimer.ended = True
            self.reclaimer.in_background = False
            self.reclaimer.finish_listed()
            self.volume.mark_unmounted()
        self.region.close()

    def statfs(self) -> Statfs:
        """Space in pages of 4 KiB, and inodes: as many more as the available pages can hold."""
        space = self.volume.space
        free = space.free_pages()
        available = free - self.volume.blocks_without_memory() * PAGES_PER_BLOCK
        free_files = available * INODES_PER_PAGE
        blocks = (space.blocks - space.first_block) * PAGES_PER_BLOCK
        return Statfs(blocks, free, available, space.inodes_in_use() + free_files, free_files)
