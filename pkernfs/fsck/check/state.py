"""The state of one check, in parts, and the walk from inode to inode.

The checks themselves are functions over it, in the other modules; ``passes`` has them in order.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pkernfs.errors import CorruptError
from pkernfs.format import INODES_PER_PAGE, Attachment, Ino, Inode, IovaPage, Mapping
from pkernfs.fs.pages import raw_inode, read_inode
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.memory import Memory
from pkernfs.fsck.check.rules import plausible
from pkernfs.fsck.findings import Findings, Fits, Plausible, Structure, StructureField, Tally, Unusable
from pkernfs.fsck.problems import Code

STEP = 1000  #: inodes from one call of ``tell`` to the next


class Reached:
    """Which inodes were reached so far, and what is to be compared when all are."""

    def __init__(self) -> None:
        self.files = 0
        self.directories = 0
        self.slots: dict[int, int] = {}  #: by page of inodes: bitmap of those that were reached
        self.damaged: set[Ino] = set()  #: those that cannot be read, which was noted
        self.wrong_flags: set[Ino] = set()  #: those whose flags are to be corrected
        self.held = False  #: whether one is held
        self.names_left: dict[Ino, int] = {}  #: files of which not all names, or too many, were found yet
        self.says_listed: set[Ino] = set()  #: those that say they are on the list of orphans
        self.listed: set[Ino] = set()  #: those that are

    def mark(self, ino: Ino) -> bool:
        """Note that the inode was reached; whether for the first time."""
        page, slot = divmod(ino, INODES_PER_PAGE)
        before = self.slots.get(page, 0)
        self.slots[page] = before | 1 << slot
        return not before >> slot & 1

    def __contains__(self, ino: Ino) -> bool:
        page, slot = divmod(ino, INODES_PER_PAGE)
        return bool(self.slots.get(page, 0) >> slot & 1)


class QuotaUse:
    """What counts against which quota."""

    def __init__(self) -> None:
        self.used: dict[Ino, int] = {}  #: by project: bytes of the inodes that name it
        self.odd: dict[tuple[Ino, Ino], Ino] = {}  #: (directory, other project of an entry): the entry's inode
        self.linked: dict[Ino, set[Ino]] = {}  #: files with many names, under quotas: the directories that name them


class TableRecords:
    """What the records of page tables name."""

    def __init__(self) -> None:
        self.domains: set[Ino] = set()
        self.ids: dict[int, list[Ino]] = {}  #: by domain id: the domains that have it
        self.mappings: dict[Ino, list[tuple[Ino, IovaPage, Mapping]]] = {}  #: by file: (domain, key, mapping)
        self.pinned: dict[Ino, int] = {}  #: inodes without page tables: the pins that they count
        self.attachments: list[tuple[int, Attachment]] = []  #: (key, attachment)
        self.awaiting: list[tuple[int, Ino, int]] = []  #: (key, inode, domain id) of content
        self.pending: set[int] = set()  #: domain ids of the invalidations that are pending


class Check:
    """One check of one volume.

    ``for_repair``: it keeps what can be kept of structures that cannot stay, and reads also what no inner node points
    to any more.  A check that only looks does neither: it would hold all entries of a directory to the last of them.
    ``each_inode``: the checks of every inode that is reached.  ``tell`` is called every STEP inodes.
    """

    def __init__(
        self,
        volume: Volume,
        each_inode: Sequence[InodeCheck],
        *,
        for_repair: bool = False,
        tell: Callable[[], None] | None = None,
    ) -> None:
        self.volume = volume
        self.region = volume.region
        self.for_repair = for_repair
        self.findings = Findings()
        self.note = self.findings.note
        self.memory = Memory(volume, self.findings)
        self.reached = Reached()
        self.quotas = QuotaUse()
        self.records = TableRecords()
        self.todo: list[Ino] = []  #: directories to walk
        self._each_inode = each_inode
        self._tell = tell

    # -- inodes ---------------------------------------------------------------------------------------------------

    def inode(self, ino: Ino) -> Inode | None:
        """The inode; None when it is damaged, which is noted once."""
        try:
            return read_inode(self.region, ino)
        except CorruptError as error:
            if ino not in self.reached.damaged:
                self.reached.damaged.add(ino)
                raw = raw_inode(self.region, ino)
                data = Plausible(ino, raw) if plausible(ino, raw) else Unusable(ino, "damaged")
                self.findings.note_error(Code.INODE_CHECKSUM, error, ino=ino, data=data)
            return None

    # -- the walk -------------------------------------------------------------------------------------------------

    def content(self, ino: Ino, inode: Inode) -> None:
        """The inode itself and all that it holds; of a directory the subdirectories are put on the list to walk."""
        reached, findings = self.reached, self.findings
        outer, findings.tally = findings.tally, Tally(ino)
        if stat.S_ISDIR(inode.mode):
            reached.directories += 1
        else:
            reached.files += 1
        if self._tell and not (reached.files + reached.directories) % STEP:
            self._tell()
        for one in self._each_inode:
            one(self, ino, inode)
        findings.tally = outer

    def walk(self, ino: Ino) -> None:
        """Inode ``ino`` and all below it; a list and no recursion, for names may be nested without a limit."""
        self.todo.append(ino)
        while self.todo:
            ino = self.todo.pop()
            inode = self.inode(ino)
            if inode:
                self.content(ino, inode)

    def structure(self, field: StructureField, fits: Fits) -> Structure:
        """A structure of the inode at work, which is looked at from now on until ``close``."""
        tally = self.findings.tally
        tally.structure = Structure(tally.owner, field, fits, keeps=self.for_repair)
        return tally.structure

    def close(self, structure: Structure) -> None:
        """All of the structure was looked at."""
        self.findings.tally.structure = None
        if structure.kept and not structure.must_change:
            structure.kept.clear()  # a finding may hold on to the structure


InodeCheck: TypeAlias = Callable[[Check, Ino, Inode], None]
