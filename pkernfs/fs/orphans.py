"""Freeing memory in bounded steps: files without a name, and what lies beyond the end of files that were cut.

What a step leaves is listed in the region, so that the next mount goes on after a crash.
"""

from __future__ import annotations

import stat
from itertools import islice

from pkernfs.errors import CorruptError
from pkernfs.format import INLINE_SIZE, INODE_SIZE, ORPHANS_INO, PAGE, Inode
from pkernfs.fs.content import Content
from pkernfs.fs.filemap import MAX_PAGES, FileMap
from pkernfs.fs.xattrs import Xattrs

#: Extents and attributes that one transaction frees: what it changes must fit in the journal (an attribute's value can
#: lie in 17 slabs), and take little time.
STEP = 32


class Orphans(Content):
    """The list of orphans, and what is done with its members."""

    def orphans(self) -> list[int]:
        """The listed inodes.  Raises CorruptError when the list does not come back to its beginning."""
        found: list[int] = []
        seen = set()
        ino = self.volume.inode(ORPHANS_INO).orphan_next
        while ino != ORPHANS_INO:
            if not ino or ino in seen:
                raise CorruptError("the list of orphans", ORPHANS_INO * INODE_SIZE, f"inode {ino} after {found[-3:]}")
            seen.add(ino)
            found.append(ino)
            ino = self.volume.inode(ino).orphan_next
        return found

    def list_orphan(self, ino: int) -> None:
        """Put an inode at the head of the list, within a transaction."""
        volume = self.volume
        head = volume.inode(ORPHANS_INO)
        inode = volume.inode(ino)
        if inode.orphan_next:
            return
        first = head.orphan_next
        volume.put_inode(ORPHANS_INO, head._replace(orphan_next=ino))
        volume.put_inode(ino, inode._replace(orphan_next=first, orphan_prev=ORPHANS_INO))
        volume.put_inode(first, volume.inode(first)._replace(orphan_prev=ino))

    def unlist_orphan(self, ino: int) -> None:
        """Take an inode from the list if it is there, within a transaction."""
        volume = self.volume
        inode = volume.inode(ino)
        if not inode.orphan_next:
            return
        volume.put_inode(inode.orphan_prev, volume.inode(inode.orphan_prev)._replace(orphan_next=inode.orphan_next))
        volume.put_inode(inode.orphan_next, volume.inode(inode.orphan_next)._replace(orphan_prev=inode.orphan_prev))
        volume.put_inode(ino, volume.inode(ino)._replace(orphan_next=0, orphan_prev=0))

    def is_small(self, ino: int, inode: Inode) -> bool:
        """Whether one transaction can free all that belongs to the inode."""
        if inode.xattrs and len(Xattrs(self.volume, ino, inode).some(STEP + 1)) > STEP:
            return False
        if not inode.root or not self.has_content(inode):
            return True
        return len(list(islice(FileMap(self.volume, ino, inode).extents(), STEP + 1))) <= STEP

    def has_content(self, inode: Inode) -> bool:
        """Whether the inode has extents (and not entries, or a target inside itself)."""
        return stat.S_ISREG(inode.mode) or (stat.S_ISLNK(inode.mode) and inode.size > INLINE_SIZE)

    def free_part(self, ino: int, inode: Inode) -> bool:
        """Give back a part of an inode without a name, within a transaction; True: all of it, and the inode."""
        volume = self.volume
        done = True
        if inode.xattrs:
            xattrs = Xattrs(volume, ino, inode)
            for attribute in xattrs.some(STEP):
                xattrs.remove(attribute)
            inode = xattrs.finish(inode.ctime)
            done = not inode.xattrs
        if done and self.has_content(inode):
            filemap = FileMap(volume, ino, inode)
            done = filemap.remove(0, MAX_PAGES, STEP)
            inode = filemap.finish()
        volume.put_inode(ino, inode)
        if done:
            self.unlist_orphan(ino)
            volume.free_inode(ino, volume.inode(ino))
        return done

    def finish_truncate(self, ino: int) -> None:
        """Free what lies beyond the end of a file, in several transactions when it is much."""
        done = False
        while not done:
            with self.volume.transaction():
                inode = self.volume.inode(ino)
                filemap = FileMap(self.volume, ino, inode)
                done = filemap.truncate(-(-inode.size // PAGE), STEP)
                self.volume.put_inode(ino, filemap.finish())
                if done:
                    self.unlist_orphan(ino)

    def finish_orphans(self) -> None:
        """After the end of a mount: free what it kept for open files, and finish what it had begun."""
        for ino in self.orphans():
            if self.volume.inode(ino).nlink:
                self.finish_truncate(ino)
            else:
                self.reap(ino)

    def reap(self, ino: int) -> None:
        """Free a file without a name that nobody refers to any more; a large one in several transactions."""
        done = False
        while not done:
            with self.volume.transaction():
                done = self.free_part(ino, self.volume.inode(ino))
