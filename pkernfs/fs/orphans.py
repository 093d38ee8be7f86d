"""The list of orphans: inodes without a name that are still in use, and files with memory beyond their end.

It is a circular list through the inodes themselves, so that removing a file never allocates; what is on it when a mount
ends is finished by the next one.
"""

from __future__ import annotations

from pkernfs.errors import CorruptError, PkernfsError
from pkernfs.format import ORPHANS_INO, Ino, Inode
from pkernfs.fs.damage import NO_INO, corrupt_inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume

BATCH = 1000  #: inodes that one transaction marks: less than the journal holds


class Orphans:
    """The list.  It begins and ends at the reserved inode ORPHANS_INO."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume

    def inos(self) -> list[Ino]:
        """The listed inodes.  Raises CorruptError when the list does not come back to its beginning."""
        found: list[Ino] = []
        seen = set()
        ino = self._linked(ORPHANS_INO).orphan_next
        while ino != ORPHANS_INO:
            if not ino or ino in seen:
                before = found[-1] if found else ORPHANS_INO
                why = f"back to inode {ino}, which is in it already" if ino else "nowhere, and not to its beginning"
                raise self._bad(f"inode {before} points {why}")
            seen.add(ino)
            found.append(ino)
            ino = self._linked(ino).orphan_next
        return found

    def _bad(self, found: str) -> CorruptError:
        return corrupt_inode(ORPHANS_INO, found, "the list of orphans")

    def _linked(self, ino: Ino) -> Inode:
        """The inode that a link of the list names."""
        return self.volume.inode_named_by(ORPHANS_INO, ino)

    def add(self, tx: Transaction, ino: Ino) -> None:
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
            volume.damage.complain(error)
            return
        tx.put_inode(ORPHANS_INO, volume.inode(ORPHANS_INO)._replace(orphan_next=ino))
        tx.put_inode(ino, inode._replace(orphan_next=first, orphan_prev=ORPHANS_INO))
        tx.put_inode(first, volume.inode(first)._replace(orphan_prev=ino))

    def remove(self, tx: Transaction, ino: Ino) -> None:
        """Take an inode from the list if it is there."""
        volume = self.volume
        inode = volume.inode(ino)
        if not inode.orphan_next:
            return
        before, after = inode.orphan_prev, inode.orphan_next
        if self._linked(before).orphan_next != ino or self._linked(after).orphan_prev != ino:
            raise self._bad(
                f"inode {ino} points to {before} before it and {after} behind it, which do not both point back"
            )
        tx.put_inode(before, volume.inode(before)._replace(orphan_next=after))
        tx.put_inode(after, volume.inode(after)._replace(orphan_prev=before))
        tx.put_inode(ino, volume.inode(ino)._replace(orphan_next=NO_INO, orphan_prev=NO_INO))

    def move(self, project: Ino, to: Ino) -> None:
        """Let what is listed and counts against one project count against another."""
        volume = self.volume
        inos = [ino for ino in self.inos() if volume.inode(ino).project == project]
        for at in range(0, len(inos), BATCH):
            with volume.transaction(preparing=True) as tx:
                for ino in inos[at : at + BATCH]:
                    tx.put_inode(ino, volume.inode(ino)._replace(project=to))
