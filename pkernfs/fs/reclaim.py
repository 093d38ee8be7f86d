"""Reclaiming memory in bounded steps: of files without a name, and of what lies beyond the end of files that were cut.

What a step leaves is on the list of orphans, so that the next mount goes on after a crash.
"""

from __future__ import annotations

import stat
from contextlib import suppress
from itertools import islice, takewhile

from pkernfs.errors import FsError, PkernfsError
from pkernfs.format import GUARDED, PAGE, FilePage, Ino, Inode
from pkernfs.fs.chunks import cut_at, truncate
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.filemap import END, FIRST, FileMap, end_of
from pkernfs.fs.guard import Guard, has_records, pins
from pkernfs.fs.lookups import Lookups
from pkernfs.fs.orphans import Orphans
from pkernfs.fs.pages import has_extents, new_inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Xattrs

#: Extents and attributes that one transaction frees: what it changes must fit in the journal (an attribute's value can
#: lie in 17 slabs), and take little time.
STEP = 32
#: Inodes that one transaction frees at once, when each has no more pages than that.  More than are unlinked between two
#: steps in the background (loop.PASS_EVERY).
TINY_BATCH, TINY = 128, 4
ASIDE = 256  #: extents that one transaction moves to another inode: some ten nodes of trees


class Reclaimer:
    """Frees what nobody needs any more.

    ``pending``: listed inodes with memory to be freed.  With ``in_background`` the owner of this object takes the steps
    between other calls, with ``step``; without, every call finishes what it began.
    """

    def __init__(self, volume: Volume, lookups: Lookups, orphans: Orphans, guard: Guard) -> None:
        self.volume = volume
        self.lookups = lookups
        self.orphans = orphans
        self.guard = guard
        self.ended = False  #: nobody refers to anything any more
        self.in_background = False
        self.pending: dict[Ino, None] = {}

    # -- what is needed -------------------------------------------------------------------------------------------

    def referenced(self, ino: Ino) -> bool:
        """Whether the inode is needed: the kernel knows it, so that it may be open; it is pinned; or guarded."""
        if not self.ended and self.lookups[ino] > 0:
            return True
        return self._is_kept(ino)

    def _is_kept(self, ino: Ino) -> bool:
        return pins(self.volume.inode(ino)) > 0 or self.is_guarded(ino)

    def is_guarded(self, ino: Ino) -> bool:
        """Whether the guard does not let the inode go yet; where that cannot be told: yes."""
        try:
            inode = self.volume.inode(ino)
            return bool(inode.flags & GUARDED) and not self.guard.may_free(ino, inode)
        except PkernfsError as error:
            self.volume.damage.complain(error)
            return True

    def awaits_forget(self) -> bool:
        """Whether there are listed inodes that go when nobody has them open any more.  Raises CorruptError."""
        return not all(map(self._is_kept, self.orphans.inos()))

    def forget(self, ino: Ino, count: int) -> None:
        """FUSE_FORGET: ``count`` references are gone; with the last one an orphan is freed."""
        if not self.lookups.drop(ino, count):
            self.reap(ino)

    # -- in one transaction -------------------------------------------------------------------------------------------

    def is_small(self, ino: Ino, inode: Inode) -> bool:
        """Whether one transaction can free all that belongs to the inode."""
        if has_records(inode):
            return False
        if inode.xattrs and len(Xattrs(self.volume, ino, inode).some(STEP + 1)) > STEP:
            return False
        if not inode.root or not has_extents(inode):
            return True
        return len(list(islice(FileMap(self.volume, ino, inode).extents(), STEP + 1))) <= STEP

    def _is_tiny(self, ino: Ino) -> bool:
        """Whether the inode is unused and has so little that many like it can be freed by one transaction."""
        with suppress(PkernfsError):
            inode = self.volume.inode(ino)
            tiny = inode.pages <= TINY and not inode.xattrs and not has_records(inode)
            return tiny and not inode.nlink and not self.referenced(ino)
        return False

    def free_part(self, tx: Transaction, ino: Ino, inode: Inode) -> bool:
        """Give back a part of an inode without a name; True: all of it, and the inode."""
        volume = self.volume
        if stat.S_ISDIR(inode.mode) and inode.root:
            found = "a directory without a name that has entries"
            raise corrupt_inode(ino, found)
        if has_records(inode):
            self.guard.drop_records(tx, ino)
            inode = volume.inode(ino)
        done = True
        if inode.xattrs:
            xattrs = Xattrs(volume, ino, inode)
            for attribute in xattrs.some(STEP):
                xattrs.remove(tx, attribute)
            inode = xattrs.finish(inode.ctime)
            done = not inode.xattrs
        if done and has_extents(inode):
            filemap = FileMap(volume, ino, inode)
            done = filemap.remove(tx, FIRST, END, STEP)
            inode = filemap.finish()
        tx.put_inode(ino, inode)
        if done:
            self.orphans.remove(tx, ino)
            tx.free_inode(ino, volume.inode(ino))
        return done

    def _truncate_part(self, tx: Transaction, ino: Ino, inode: Inode, compact: bool) -> bool:
        """Free a part of what lies beyond the end of a file; True: all of it."""
        done = True
        if has_extents(inode):
            filemap = FileMap(self.volume, ino, inode, compact=compact)
            first = cut_at(filemap, end_of(inode.size))
            if pins(inode) and self.guard.awaits(ino, first):
                done = self._put_aside(tx, ino, filemap, first)
            else:
                done = truncate(tx, filemap, end_of(inode.size), STEP)
                tx.put_inode(ino, filemap.finish())
        if done and inode.nlink:
            self.orphans.remove(tx, ino)
        return done

    def _put_aside(self, tx: Transaction, ino: Ino, filemap: FileMap, first: FilePage) -> bool:
        """Move a part of what lies in a file from page ``first`` on to a new orphan, which is pinned; True: all of it.

        Raises FsError(ENOSPC): it lies beyond the end of the file until it can be freed, or put aside.
        """
        try:
            done = next(filemap.extents(first), None) is None or self._move_aside(tx, ino, filemap, first)
        except FsError as error:
            what = f"inode {ino} was cut, and what awaits an invalidation of it cannot be put aside"
            raise FsError(error.errno, what) from None
        if done:
            self.guard.cut(tx, ino, first)
        return done

    def _move_aside(self, tx: Transaction, ino: Ino, filemap: FileMap, first: FilePage) -> bool:
        """The same of what is there.  The orphan belongs to the file's owner, and counts against its quota."""
        volume, like = self.volume, filemap.inode
        aside = volume.allocator.alloc_inode(tx)
        now = volume.clock()
        made = new_inode(stat.S_IFREG | 0o600, now, like.uid, like.gid, generation=now >> 10, project=like.project)
        other = FileMap(volume, aside, made._replace(nlink=0))
        done = filemap.move(tx, first, END, other, ASIDE)
        end = max(extent.start + extent.length for extent in other.extents())
        tx.put_inode(aside, other.finish()._replace(size=end * PAGE))
        tx.put_inode(ino, filemap.finish())
        self.orphans.add(tx, aside)
        self.guard.hand_on(tx, ino, aside, first)
        return done

    # -- step by step ------------------------------------------------------------------------------------------------

    def free_step(self, ino: Ino) -> bool:
        """One transaction that frees a part of what a listed inode has too much; True: all of it."""
        if self._pins_for_nobody(ino):
            self._unpin_part(ino)
            return False

        def step(tx: Transaction, compact: bool) -> bool:
            inode = self.volume.inode(ino)
            # A file that was cut may have been removed since, and still be open.
            is_used = inode.nlink or self.referenced(ino)
            return self._truncate_part(tx, ino, inode, compact) if is_used else self.free_part(tx, ino, inode)

        return self.volume.compacting(step)

    def _pins_for_nobody(self, ino: Ino) -> bool:
        """Whether the inode is a guarded one without a name that still pins files."""
        inode = self.volume.inode(ino)
        if inode.nlink or not has_records(inode):
            return False
        try:
            return self.guard.is_pinning(ino)
        except PkernfsError as error:
            self.volume.damage.complain(error)
            return False

    def _unpin_part(self, ino: Ino) -> None:
        """Drop some of the pins of a guarded inode without a name.  Files that nobody needs then are freed later."""
        for file in self.guard.unpin(ino, STEP):
            if not self.volume.inode(file).nlink and not self.referenced(file):
                self.pending[file] = None

    def _unpin_all(self, ino: Ino) -> None:
        """Drop the pins of a guarded inode without a name, be it open or not: what it pinned is free then."""
        try:
            while self._pins_for_nobody(ino):
                self._unpin_part(ino)
            if not self.in_background:
                self.settle()
        except PkernfsError as error:
            self.volume.damage.complain(error)

    def reap(self, ino: Ino) -> None:
        """Free the inode if it has no name and nobody needs it any more: after references, names or pins were dropped.

        The pins that a guarded inode without a name holds go at once.
        """
        if not self.volume.space.inode_in_use(ino):
            self.pending.pop(ino, None)
            return
        if self._pins_for_nobody(ino):
            self._unpin_all(ino)
        inode = self.volume.inode(ino)
        # With a name: it was cut, and there was no room to put aside what nobody need put aside any more.
        if (inode.nlink and inode.orphan_next) or (not inode.nlink and not self.referenced(ino)):
            self.begin_freeing(ino)

    def begin_freeing(self, ino: Ino) -> None:
        """Free what a listed inode has too much: the first step now, the rest now too or later (``in_background``).

        There, what is tiny is freed later, together with others.

        What is damaged stays listed, and is logged: the call that came here has done what it was to do.
        """
        try:
            if self.in_background and self._is_tiny(ino):
                self.pending[ino] = None
                return
            if self.free_step(ino):
                self.pending.pop(ino, None)
                return
            self.pending[ino] = None
            if not self.in_background:
                self.settle()
        except PkernfsError as error:
            self.pending.pop(ino, None)
            self.volume.damage.complain(error)

    def step(self) -> None:
        """Take one step with the first of ``pending``, or free some small ones at once.

        One that cannot be freed stays listed for the next mount.
        """
        small = list(takewhile(self._is_tiny, islice(self.pending, TINY_BATCH)))
        if len(small) > 1:
            try:
                with self.volume.transaction() as tx:
                    for ino in small:
                        self.free_part(tx, ino, self.volume.inode(ino))
            except PkernfsError:
                pass  # one after the other, to see which
            else:
                for ino in small:
                    del self.pending[ino]
                return
        ino = next(iter(self.pending))
        try:
            if self.free_step(ino):
                self.pending.pop(ino, None)
        except BaseException:
            self.pending.pop(ino, None)
            raise

    def finish_cut(self, ino: Ino) -> None:
        """Free all that lies beyond the end of a file whose cut is pending: before it grows again."""
        while not self.free_step(ino):
            pass
        self.pending.pop(ino, None)

    def settle(self) -> None:
        """Finish all that is pending."""
        while self.pending:
            self.step()

    def finish_listed(self) -> None:
        """After the end of a server or a mount: finish what it had begun, and free what nobody has open any more.

        What is damaged is logged and left: the rest of the region can be used.
        """
        try:
            listed = self.orphans.inos()
        except PkernfsError as error:
            self.volume.damage.complain(error)
            return
        self.pending = {ino: None for ino in listed if self._is_to_be_freed(ino)}
        if self.in_background:
            return
        while self.pending:
            try:
                self.step()
            except PkernfsError as error:
                self.volume.damage.complain(error)

    def _is_to_be_freed(self, ino: Ino) -> bool:
        """Whether a listed inode has something to be freed now."""
        return bool(self.volume.inode(ino).nlink) or not self.referenced(ino) or self._pins_for_nobody(ino)
