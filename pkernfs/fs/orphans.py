"""Freeing memory in bounded steps: files without a name, and what lies beyond the end of files that were cut.

What a step leaves is listed in the region, so that the next mount goes on after a crash.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable
from contextlib import suppress
from itertools import islice, takewhile

from pkernfs.errors import CorruptError, PkernfsError
from pkernfs.format import GUARDED, ORPHANS_INO, PAGE, Ino, Inode
from pkernfs.fs.content import Content
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.filemap import MAX_PAGES, FileMap
from pkernfs.fs.guard import Guard, has_records, pins
from pkernfs.fs.lookups import Lookups
from pkernfs.fs.pages import has_extents
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Xattrs

log = logging.getLogger("pkernfs")

#: Extents and attributes that one transaction frees: what it changes must fit in the journal (an attribute's value can
#: lie in 17 slabs), and take little time.
STEP = 32
BATCH = 1000  #: inodes that one transaction marks: less than the journal holds
#: Inodes that one transaction frees at once, when each has no more pages than that.  More than are unlinked between two
#: steps in the background (loop.PASS_EVERY).
TINY_BATCH, TINY = 128, 4


def listed(volume: Volume) -> list[Ino]:
    """The inodes on the list of orphans.  Raises CorruptError when it does not come back to its beginning."""
    found: list[Ino] = []
    seen = set()
    ino = linked(volume, ORPHANS_INO).orphan_next
    while ino != ORPHANS_INO:
        if not ino or ino in seen:
            raise bad_list(f"inode {ino} after {found[-3:]}")
        seen.add(ino)
        found.append(Ino(ino))
        ino = linked(volume, ino).orphan_next
    return found


def linked(volume: Volume, ino: int) -> Inode:
    """The inode that a link of the list names."""
    return volume.inode_named_by(ORPHANS_INO, ino)


def bad_list(found: str) -> CorruptError:
    """The list of orphans is damaged."""
    return corrupt_inode(ORPHANS_INO, found, "the list of orphans")


class Orphans(Content):
    """The list of orphans, and what is done with its members.

    ``pending``: listed inodes with memory to be freed.  With ``in_background`` the owner of this object takes the steps
    between other calls, with ``pending_step``; without, every call finishes what it began.
    """

    def __init__(self, volume: Volume, guard: Callable[[Volume], Guard], lookups: Lookups | None = None) -> None:
        super().__init__(volume, guard)
        self.lookups = lookups or Lookups(self.region.size)
        self.ended = False  #: nobody refers to anything any more
        self.in_background = False
        self.pending: dict[int, None] = {}

    def referenced(self, ino: int) -> bool:
        """Whether the inode is needed: the kernel knows it, so that it may be open; it is pinned; or guarded."""
        if not self.ended and self.lookups[ino] > 0:
            return True
        return self._is_kept(ino)

    def _is_kept(self, ino: int) -> bool:
        return pins(self.volume.inode(ino)) > 0 or self.is_guarded(ino)

    def is_guarded(self, ino: int) -> bool:
        """Whether the guard does not let the inode go yet; where that cannot be told: yes."""
        try:
            inode = self.volume.inode(ino)
            return bool(inode.flags & GUARDED) and not self.guard.may_free(Ino(ino), inode)
        except PkernfsError as error:
            self.complain(error)
            return True

    def orphans(self) -> list[Ino]:
        """The listed inodes.  Raises CorruptError when the list does not come back to its beginning."""
        return listed(self.volume)

    def _linked(self, ino: int) -> Inode:
        return linked(self.volume, ino)

    def awaits_forget(self) -> bool:
        """Whether there are listed inodes that go when nobody has them open any more.  Raises CorruptError."""
        return not all(map(self._is_kept, self.orphans()))

    def list_orphan(self, tx: Transaction, ino: int) -> None:
        """Put an inode at the head of the list.

        Where the list is damaged the inode is not listed, so that files can still be removed: a crash before it is
        freed then leaves it to fsck.
        """
        volume = self.volume
        inode = volume.inode(ino)
        if inode.orphan_next:
            return
        try:
            first = self._linked(ORPHANS_INO).orphan_next
            self._linked(first)
            for neighbour in (ORPHANS_INO, first):
                volume.damage.check_changeable(neighbour)
        except PkernfsError as error:
            self.complain(error)
            return
        tx.put_inode(ORPHANS_INO, volume.inode(ORPHANS_INO)._replace(orphan_next=ino))
        tx.put_inode(ino, inode._replace(orphan_next=first, orphan_prev=ORPHANS_INO))
        tx.put_inode(first, volume.inode(first)._replace(orphan_prev=ino))

    def unlist_orphan(self, tx: Transaction, ino: int) -> None:
        """Take an inode from the list if it is there."""
        volume = self.volume
        inode = volume.inode(ino)
        if not inode.orphan_next:
            return
        before, after = inode.orphan_prev, inode.orphan_next
        if self._linked(before).orphan_next != ino or self._linked(after).orphan_prev != ino:
            raise bad_list(f"inode {ino} between {before} and {after}, which name others")
        tx.put_inode(before, volume.inode(before)._replace(orphan_next=after))
        tx.put_inode(after, volume.inode(after)._replace(orphan_prev=before))
        tx.put_inode(ino, volume.inode(ino)._replace(orphan_next=0, orphan_prev=0))

    def move_orphans(self, project: int, to: int) -> None:
        """Let what is listed and counts against one project count against another."""
        volume = self.volume
        inos = [ino for ino in self.orphans() if volume.inode(ino).project == project]
        for at in range(0, len(inos), BATCH):
            with volume.transaction(preparing=True) as tx:
                for ino in inos[at : at + BATCH]:
                    tx.put_inode(ino, volume.inode(ino)._replace(project=to))

    def is_small(self, ino: int, inode: Inode) -> bool:
        """Whether one transaction can free all that belongs to the inode."""
        if has_records(inode):
            return False
        if inode.xattrs and len(Xattrs(self.volume, ino, inode).some(STEP + 1)) > STEP:
            return False
        if not inode.root or not has_extents(inode):
            return True
        return len(list(islice(FileMap(self.volume, ino, inode).extents(), STEP + 1))) <= STEP

    def _is_tiny(self, ino: int) -> bool:
        """Whether the inode is unused and has so little that many like it can be freed by one transaction."""
        with suppress(PkernfsError):
            inode = self.volume.inode(ino)
            tiny = inode.pages <= TINY and not inode.xattrs and not inode.iommu
            return tiny and not inode.nlink and not self.referenced(ino)
        return False

    def free_part(self, tx: Transaction, ino: int, inode: Inode) -> bool:
        """Give back a part of an inode without a name; True: all of it, and the inode."""
        volume = self.volume
        if stat.S_ISDIR(inode.mode) and inode.root:
            found = "a directory without a name that has entries"
            raise corrupt_inode(ino, found)
        if has_records(inode):
            self.guard.drop_records(tx, Ino(ino))
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
            done = filemap.remove(tx, 0, MAX_PAGES, STEP)
            inode = filemap.finish()
        tx.put_inode(ino, inode)
        if done:
            self.unlist_orphan(tx, ino)
            tx.free_inode(ino, volume.inode(ino))
        return done

    def _truncate_part(self, tx: Transaction, ino: int, inode: Inode, compact: bool) -> bool:
        """Free a part of what lies beyond the end of a file; True: all of it."""
        done = True
        if has_extents(inode):
            filemap = FileMap(self.volume, ino, inode, compact=compact)
            done = filemap.truncate(tx, -(-inode.size // PAGE), STEP)
            tx.put_inode(ino, filemap.finish())
        if done and inode.nlink:
            self.unlist_orphan(tx, ino)
        return done

    def free_step(self, ino: int) -> bool:
        """One transaction that frees a part of what a listed inode has too much; True: all of it."""
        if self._maps_for_nobody(ino):
            self._unmap_part(ino)
            return False

        def step(tx: Transaction, compact: bool) -> bool:
            inode = self.volume.inode(ino)
            # A file that was cut may have been removed since, and still be open.
            is_used = inode.nlink or self.referenced(ino)
            return self._truncate_part(tx, ino, inode, compact) if is_used else self.free_part(tx, ino, inode)

        return self.volume.compacting(step)

    def _maps_for_nobody(self, ino: int) -> bool:
        """Whether the inode is a domain without a name that still has mappings."""
        inode = self.volume.inode(ino)
        if inode.nlink or not has_records(inode):
            return False
        try:
            return self.guard.is_pinning(Ino(ino))
        except PkernfsError as error:
            self.complain(error)
            return False

    def _unmap_part(self, ino: int) -> None:
        """Drop some of the records of a domain without a name.  Files that nobody needs any more are freed later."""
        with self.volume.transaction() as tx:
            unpinned = self.guard.unpin(tx, Ino(ino), STEP)
        for file in unpinned:
            if not self.volume.inode(file).nlink and not self.referenced(file):
                self.pending[file] = None

    def unmap_all(self, ino: int) -> None:
        """Drop the mappings of a domain without a name, be it open or not: the files that they name are free then."""
        try:
            while self._maps_for_nobody(ino):
                self._unmap_part(ino)
            if not self.in_background:
                self.settle()
        except PkernfsError as error:
            self.complain(error)

    def reap(self, ino: int) -> None:
        """Free the inode if it has no name and nobody needs it any more: after references, names or pins were dropped.

        The mappings of a domain without a name go at once.
        """
        if not self.volume.space.inode_in_use(ino):
            self.pending.pop(ino, None)
            return
        if self._maps_for_nobody(ino):
            self.unmap_all(ino)
        if not self.referenced(ino) and not self.volume.inode(ino).nlink:
            self.begin_freeing(ino)

    def begin_freeing(self, ino: int) -> None:
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
            self.complain(error)

    def pending_step(self) -> None:
        """Take one step with the first of ``pending``, or free some small ones at once; one that cannot be freed stays
        listed for the next mount."""
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

    def finish_cut(self, ino: int) -> None:
        """Free all that lies beyond the end of a file whose cut is pending: before it grows again."""
        while not self.free_step(ino):
            pass
        self.pending.pop(ino, None)

    def settle(self) -> None:
        """Finish all that is pending."""
        while self.pending:
            self.pending_step()

    def finish_orphans(self) -> None:
        """After the end of a server or a mount: finish what it had begun, and free what nobody has open any more.

        What is damaged is logged and left: the rest of the region can be used.
        """
        try:
            listed = self.orphans()
        except PkernfsError as error:
            self.complain(error)
            return
        self.pending = {ino: None for ino in listed if self._is_to_be_freed(ino)}
        if self.in_background:
            return
        while self.pending:
            try:
                self.pending_step()
            except PkernfsError as error:
                self.complain(error)

    def _is_to_be_freed(self, ino: int) -> bool:
        """Whether a listed inode has something to be freed now."""
        return bool(self.volume.inode(ino).nlink) or not self.referenced(ino) or self._maps_for_nobody(ino)

    def complain(self, error: PkernfsError) -> None:
        """Log what no caller gets to see; damage once, and not that it keeps an inode from being changed."""
        if isinstance(error, CorruptError):
            self.volume.damage.note(error)
        elif error.errno != errno.EROFS:
            log.error("%s", error)
