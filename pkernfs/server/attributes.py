"""Our attributes as pyfuse3's and back, and what the kernel may keep of them, of names and of content.

Nothing changes attributes, names or content behind the kernel's back, so it may keep all of them for ever; but for

- files whose memory is mapped from the region directly, or by a domain: somebody may store into it at any moment.
  Those that are marked as region-mapped are read and written past the cache (direct_io), and cannot be mapped shared
  through the mount: the pages of such a mapping would be the cache's.  What is open since before the mark, or is mapped
  by a domain only, has its attributes asked for at every read, with an mtime that is never the same, which makes the
  kernel drop its cached pages (FUSE_AUTO_INVAL_DATA, fuse_change_attributes); and an open drops what it has cached;
- page tables: they grow by themselves, and are read past the cache (direct_io);
- access times: the kernel does not tell of reads that it answers itself, so an open drops what is cached of a file
  whose access time is due.
"""

from __future__ import annotations

import stat
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, SetattrFields, StatvfsData

from pkernfs.format import BLOCK, FLAG_REGION_MAPPED, GUARDED, NAME_MAX, PAGE, Ino, Inode
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem, Statfs
from pkernfs.fs.guard import pins
from pkernfs.server.handles import handle

FOREVER: Final = 86400.0  #: seconds
ENTRY_BYTES: Final = 20  #: of a directory's size, for each entry, "." and ".." too: as tmpfs has it

#: What the kernel may not keep for ever has one of these flags, or pins.
UNUSUAL: Final = FLAG_REGION_MAPPED | GUARDED


def is_changing(inode: Inode) -> bool:
    """Whether somebody may be storing into the file's memory past the mount."""
    return bool(inode.flags & FLAG_REGION_MAPPED) or pins(inode) > 0


class Attributes:
    """Of the inodes of one filesystem.

    ``writeback``: the kernel holds back what is written, and looks for no changes but its own.
    """

    def __init__(self, fs: Filesystem, *, writeback: bool = False) -> None:
        self.fs = fs
        self.writeback = writeback

    def of(self, ino: Ino, inode: Inode) -> EntryAttributes:
        """For a reply."""
        entry = EntryAttributes()
        entry.st_ino = ino
        entry.generation = inode.generation
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size if not stat.S_ISDIR(inode.mode) else (inode.size + 2) * ENTRY_BYTES
        entry.st_blocks = inode.pages * (PAGE // 512)
        entry.st_blksize = PAGE
        entry.st_atime_ns = inode.atime
        entry.st_ctime_ns = inode.ctime
        entry.entry_timeout = FOREVER
        entry.st_mtime_ns = inode.mtime
        if not (inode.flags & UNUSUAL or inode.iommu):  # nearly all
            entry.attr_timeout = FOREVER
        elif is_changing(inode):
            entry.attr_timeout = 0
            entry.st_mtime_ns = max(inode.mtime, self.fs.volume.clock())
        else:
            entry.attr_timeout = 0 if inode.flags & GUARDED else FOREVER
        return entry

    def found(self, ino: Ino) -> EntryAttributes:
        """For a reply by which the kernel comes to refer to the inode, which is counted.  Raises PkernfsError."""
        entry = self.of(ino, self.fs.getattr(ino))
        self.fs.lookups.add(ino)
        return entry

    def missing(self) -> EntryAttributes:
        """Of a name that is not there, which the kernel may keep too."""
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(0)
        entry.entry_timeout = FOREVER
        return entry

    def opened(self, ino: Ino, flags: int, uid: int) -> FileInfo:
        """For a reply to who opens a file with ``flags``.  Raises PkernfsError."""
        inode = self.fs.getattr(ino)
        changing = is_changing(inode)
        # Of a file that has blocks of its own what was cached is dropped at each open: it may have been mapped
        # directly meanwhile.
        keep_cache = inode.size < BLOCK // 2 and not changing and not self.fs.times.atime_due(inode)
        # With writeback, AUTO_INVAL_DATA does nothing: past the cache then, too.  direct_io refuses MAP_SHARED with
        # ENODEV (fs/fuse/file.c, fuse_file_mmap; device.py).  sendfile(2) and copy_file_range(2) still go by the cache
        # (fuse_splice_read), which is empty at each open.
        direct_io = bool(inode.flags & UNUSUAL) or (self.writeback and changing)
        fh = pyfuse3.FileHandleT(handle(ino, flags, uid))
        return FileInfo(fh=fh, keep_cache=keep_cache, direct_io=direct_io)


def requested(attr: EntryAttributes, fields: SetattrFields) -> SetAttr:
    """What a setattr is to change."""
    return SetAttr(
        mode=attr.st_mode if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime=attr.st_atime_ns if fields.update_atime else None,
        mtime=attr.st_mtime_ns if fields.update_mtime else None,
        ctime=attr.st_ctime_ns if fields.update_ctime else None,
    )


def statvfs(figures: Statfs) -> StatvfsData:
    """Figures of the whole, for df."""
    data = StatvfsData()
    data.f_bsize = data.f_frsize = PAGE
    data.f_blocks = figures.blocks
    # df calls used what is not f_bfree, and shows f_bavail.
    data.f_bfree, data.f_bavail = figures.free, figures.available
    data.f_files = figures.files
    data.f_ffree = data.f_favail = figures.free_files
    data.f_namemax = NAME_MAX
    return data
