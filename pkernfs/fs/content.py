"""What is in files: reading, writing, truncating, symbolic links."""

from __future__ import annotations

import errno
import stat

from pkernfs.errors import FsError, MappedError
from pkernfs.format import (
    FLAG_HELD,
    FLAG_REGION_MAPPED,
    GUARDED,
    INODE_CTIME_AT,
    INODE_MTIME_AT,
    INODE_SIZE,
    INODE_SIZE_AT,
    MAX_FILE_SIZE,
    PAGE,
    Extent,
    FilePage,
    Ino,
    Inode,
)
from pkernfs.fs.chunks import allocate
from pkernfs.fs.filemap import FileMap, end_of
from pkernfs.fs.guard import Guard, pins
from pkernfs.fs.holds import check_not_held
from pkernfs.fs.pages import has_extents
from pkernfs.fs.reclaim import Reclaimer
from pkernfs.fs.times import Times
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import OUT_OF_SPACE, Volume
from pkernfs.processes import NoProcError, holder

NO_PIECE = (0, -1, 0)
UNWRITABLE = GUARDED | FLAG_HELD  #: flags of what no user may write to


class Content:
    """The bytes of files.  Offsets and lengths are in bytes."""

    def __init__(self, volume: Volume, times: Times, reclaimer: Reclaimer, guard: Guard) -> None:
        self.volume = volume
        self.times = times
        self.accessed = times.accessed  #: bound here: one look-up less in each read
        self.reclaimer = reclaimer
        self.guard = guard
        self.region = volume.region

    def check_unmapped(self, ino: Ino, inode: Inode, first: FilePage) -> None:
        """Raise MappedError when a file's memory from page ``first`` on is mapped past the mount: a guest's RAM."""
        if inode.flags & FLAG_REGION_MAPPED:
            ranges = []
            for extent in FileMap(self.volume, ino, inode).extents(first):
                skip = max(first - extent.start, 0)
                ranges.append(((extent.page + skip) * PAGE, (extent.length - skip) * PAGE))
            try:
                mappers = self.region.mapped_by(ranges)
            except NoProcError:
                raise MappedError(ino, "somebody unknown, as /proc is not mounted") from None
            if mappers:
                raise MappedError(ino, str(holder(mappers[0])))

    def read(self, ino: Ino, offset: int, length: int, *, noatime: bool = False) -> bytes | memoryview:
        """Up to ``length`` bytes from ``offset`` on, fewer at the end of the file; a view of the region if it can be.

        The view is valid until the next change of the file.
        """
        volume = self.volume
        inode = volume.inode(ino)
        if not noatime:
            self.accessed(ino, inode)
        length = min(length, inode.size - offset)
        if length <= 0:
            return b""
        start = self._mapped(ino, inode, offset, length)
        if start:
            return self.region.present(start, length)
        filemap = FileMap(volume, ino, inode)
        first, skip = divmod(offset, PAGE)
        page, run = filemap.find(FilePage(first))
        if not page and run * PAGE - skip >= length:
            return bytes(length)
        parts: list[bytes | memoryview] = []
        left = length
        while left:
            page, run = filemap.find(FilePage(first))
            step = min(run * PAGE - skip, left)
            start = page * PAGE + skip
            parts.append(self.region.present(start, step) if page else bytes(step))
            first += run
            skip = 0
            left -= step
        return b"".join(parts)

    def _mapped(self, ino: Ino, inode: Inode, offset: int, length: int) -> int:
        """The region offset of [offset, offset + length) of a file, when that lies in one piece; else 0.

        The piece that was found last is tried first: mostly the next call is for the same one.
        """
        volume = self.volume
        start, end, shift = volume.pieces.get(ino, NO_PIECE)
        if start <= offset and offset + length <= end:
            return offset + shift
        first = FilePage(offset // PAGE)
        page, run = FileMap(volume, ino, inode).find(first)
        if not page:
            return 0
        start, end, shift = volume.pieces[ino] = (first * PAGE, (first + run) * PAGE, (page - first) * PAGE)
        return offset + shift if offset + length <= end else 0

    def write(self, ino: Ino, offset: int, data: bytes | memoryview, *, kill_priv: bool = False) -> int:
        """Store ``data`` at ``offset``; how many bytes were stored, fewer than asked when the space ends.

        ``kill_priv``: the writer may not keep set-user-ID and set-group-ID bits.  Raises FsError: EFBIG, ENOSPC,
        EDQUOT, EPERM for page tables and held files.
        """
        if offset >= MAX_FILE_SIZE and data:
            raise FsError(errno.EFBIG, f"inode {ino}: expected an offset below {MAX_FILE_SIZE}, found {offset}")
        data = data[: MAX_FILE_SIZE - offset]
        if not data:
            return 0
        if self.region.readonly:
            raise FsError(errno.EROFS, "the region is open for reading only")
        volume = self.volume
        volume.damage.check_changeable(ino)
        inode = volume.inode(ino)
        if inode.flags & UNWRITABLE:
            check_not_held(ino, inode)
            self.guard.may_write(ino)
        if kill_priv and inode.mode & (stat.S_ISUID | stat.S_ISGID):
            inode = self._kill_priv(ino, inode)
        end = offset + len(data)
        if inode.orphan_next and (offset > inode.size or (end > inode.size and pins(inode))):
            # Memory beyond the end must not come back as it is; where hardware may have cached it, not at all.
            self.reclaimer.finish_cut(ino)
            inode = volume.inode(ino)
        mtime, ctime = inode.mtime, inode.ctime
        if self.times.on_write or inode.flags & FLAG_REGION_MAPPED:
            mtime = ctime = volume.clock()
        start = self._mapped(ino, inode, offset, len(data))
        if start:
            # Mapped already, in one piece: no metadata change but the words.
            if offset > inode.size:
                self._zero_mapped(FileMap(volume, ino, inode), inode.size, offset)
            self.region.store(start, data)
            self._written(ino, inode, end, mtime, ctime)
            return len(data)
        first, last = FilePage(offset // PAGE), end_of(end)

        def extend(tx: Transaction, compact: bool) -> None:
            filemap = FileMap(volume, ino, inode, compact=compact)
            allocate(tx, filemap, first, last)
            if offset > inode.size:
                self._zero_mapped(filemap, inode.size, offset)
            self.store(filemap, offset, data)
            tx.put_inode(ino, filemap.finish()._replace(size=max(inode.size, end), mtime=mtime, ctime=ctime))

        try:
            volume.compacting(extend)
        except FsError as error:
            if error.errno not in OUT_OF_SPACE or last - first == 1:
                raise
            middle = (first + last) // 2 * PAGE
            return self.write(ino, offset, data[: middle - offset])
        return len(data)

    def _written(self, ino: Ino, inode: Inode, end: int, mtime: int, ctime: int) -> None:
        """Store the words that a write changes: the size last, when the bytes are there."""
        base = ino * INODE_SIZE
        store_word = self.region.store_word
        if mtime != inode.mtime:
            store_word(base + INODE_MTIME_AT, mtime)
        if ctime != inode.ctime:
            store_word(base + INODE_CTIME_AT, ctime)
        if end > inode.size:
            # What stands beyond the old end on the medium may be anything but what was stored there now.
            self.region.barrier()
            store_word(base + INODE_SIZE_AT, end)
        # As _replace() does it, at a third of its cost.
        self.volume.inodes[ino] = Inode._make((max(end, inode.size), inode.atime, mtime, ctime, *inode[4:]))

    def _kill_priv(self, ino: Ino, inode: Inode) -> Inode:
        mode = killed_mode(inode.mode)
        if mode != inode.mode:
            with self.volume.transaction() as tx:
                inode = inode._replace(mode=mode)
                tx.put_inode(ino, inode)
        return inode

    def store(self, filemap: FileMap, offset: int, data: bytes | memoryview) -> None:
        """Store into pages that are all mapped."""
        first, skip = divmod(offset, PAGE)
        view = memoryview(data)
        at = 0
        while at < len(view):
            page, run = filemap.find(FilePage(first))
            step = min(run * PAGE - skip, len(view) - at)
            self.region.store(page * PAGE + skip, view[at : at + step])
            first += run
            skip = 0
            at += step

    def _zero_mapped(self, filemap: FileMap, start: int, end: int) -> None:
        """Zero what is mapped of [start, end): beyond the end of a file mapped memory may hold anything."""
        while start < end:
            first, skip = divmod(start, PAGE)
            page, run = filemap.find(FilePage(first))
            step = min(run * PAGE - skip, end - start)
            if page:
                self.region.zero(page * PAGE + skip, step)
            start += step

    def resized(self, tx: Transaction, ino: Ino, inode: Inode, size: int, *, compact: bool = True) -> Inode:
        """The inode with its content cut or grown to ``size``; mtime is the caller's.

        Growing maps all of the new range to memory: a promise that no later store into it fails.  What a cut leaves
        beyond the end is still mapped.  Raises FsError: EFBIG, ENOSPC, EDQUOT.
        """
        if size > MAX_FILE_SIZE:
            raise FsError(errno.EFBIG, f"inode {ino}: expected a size of at most {MAX_FILE_SIZE}, found {size}")
        self.volume.damage.check_changeable(ino)
        filemap = FileMap(self.volume, ino, inode, compact=compact)
        if size > inode.size:
            first, last = FilePage(inode.size // PAGE), end_of(size)
            if last - first > self.volume.total_pages:
                raise FsError(errno.ENOSPC, f"{size} bytes in a region of {self.volume.total_pages * PAGE}")
            self._zero_mapped(filemap, inode.size, size)
            allocate(tx, filemap, first, last)
        return filemap.finish()._replace(size=size)

    def readlink(self, ino: Ino) -> bytes:
        """The target of a symbolic link.  Raises FsError(EINVAL) for anything else."""
        inode = self.volume.inode(ino)
        if not stat.S_ISLNK(inode.mode):
            raise FsError(errno.EINVAL, f"inode {ino} is not a symbolic link")
        if not has_extents(inode):
            self.times.accessed(ino, inode)
            return inode.inline[: inode.size]
        return bytes(self.read(ino, 0, inode.size))

    def file_map(self, ino: Ino) -> FileMap:
        """The extents of a regular file, for reading.  Raises FsError(EINVAL) for anything else."""
        inode = self.volume.inode(ino)
        if not stat.S_ISREG(inode.mode):
            raise FsError(errno.EINVAL, f"inode {ino} is not a regular file")
        return FileMap(self.volume, ino, inode)

    def extents(self, ino: Ino) -> list[Extent]:
        """The extents of a regular file, in pages.  Raises FsError(EINVAL)."""
        return list(self.file_map(ino).extents())


def killed_mode(mode: int) -> int:
    """``mode`` after a write by somebody who may not keep privileges, or a change of owner.

    Without set-user-ID, and without set-group-ID if the group may execute; those of directories mean something else.
    """
    if stat.S_ISDIR(mode):
        return mode
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode
