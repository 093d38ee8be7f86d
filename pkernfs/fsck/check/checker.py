"""One check of one volume: what was reached so far, what is to be looked at, and what was found."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from pkernfs.errors import CorruptError
from pkernfs.format import FIRST_FREE_SLOT, INODES_PER_PAGE, Attachment, Inode, Mapping
from pkernfs.fs.pages import raw_inode, read_inode
from pkernfs.fs.volume import Volume
from pkernfs.fsck.check.inodes import RESERVED, plausible
from pkernfs.fsck.check.ledger import Ledger, Problem, Tally
from pkernfs.fsck.check.passes import EACH_INODE, PASSES
from pkernfs.fsck.check.trees import Salvage

STEP = 1000


class Progress(NamedTuple):
    """How far a check is."""

    number: int  #: of the pass, from 1
    name: str  #: of the pass
    done: int  #: inodes that were reached so far
    total: int  #: inodes in use, as the headers of slabs say; 0: not known yet


class Checker:
    """``run`` once; then ``problems``, ``files`` and ``directories`` tell what there is.

    ``progress`` is called at each pass, and every STEP inodes.  For a repair: ``fixes``, fields that inodes should
    have; ``bad``, inodes that cannot be kept, and why; with ``salvage``, what can be kept of structures that cannot
    stay.
    """

    def __init__(
        self, volume: Volume, *, salvage: bool = False, progress: Callable[[Progress], None] | None = None
    ) -> None:
        self.volume = volume
        self.region = volume.region
        self.ledger = Ledger(volume, salvage=salvage)
        self.problems = self.ledger.problems
        self.note = self.ledger.note
        self.progress = progress
        self.passed = 0  #: passes that are done
        self.files = 0
        self.directories = 0
        self.todo: list[int] = []  #: directories to walk
        self.seen: dict[int, int] = {}  #: by page of inodes: bitmap of the slots that were reached
        self.names_left: dict[int, int] = {}  #: files of which not all names, or too many, were found yet
        self.says_listed: set[int] = set()  #: inodes that say they are on the list of orphans
        self.listed: set[int] = set()  #: those that are
        self.lost: list[int] = []  #: inodes with a count of names, and without a name
        self.unlisted: list[int] = []  #: inodes without names that are not in the list of orphans
        self.slots_elsewhere: list[int] = []  #: pages that hold no inodes, and have slots in use
        self.not_slabs: set[int] = set()  #: slabs that nothing stands in, and that a file uses whole
        self.free_slots: list[int] = []  #: free slots that are not empty
        self.wrong_slots: dict[int, int] = {}  #: inodes that are named, and whose slots are free: type
        self.used: dict[int, int] = {}  #: by project: bytes of the inodes that name it
        self.odd_projects: dict[tuple[int, int], int] = {}  #: (directory, other project of an entry): the entry's inode
        self.linked: dict[int, set[int]] = {}  #: files with many names, under quotas: the directories that name them
        self.projects_wrong = False
        self.domains: set[int] = set()
        self.mappings: dict[int, list[tuple[int, int, Mapping]]] = {}  #: by file: (domain, key, mapping)
        self.pinned: dict[int, int] = {}  #: inodes without page tables: the pins that they count
        self.domain_ids: dict[int, list[int]] = {}  #: the domains that have one
        self.attachments: list[tuple[int, Attachment]] = []  #: (key, attachment)
        self.bad_records: dict[int, list[int]] = {}  #: by inode of page tables: keys of those that lead to nothing
        self.new_ids: dict[int, int] = {}  #: domains whose id another has too: one that is free; 0: none is
        self.bitmaps: list[tuple[int, int]] = []  #: (inode, page) of bitmaps that do not say that they are in use
        self.fixes: dict[int, dict[str, Any]] = {}
        self.bad: dict[int, str] = {}
        self.unsealed: dict[int, Inode] = {}  #: those with a wrong checksum that look right
        self.salvaged: dict[tuple[int, str], Salvage] = {}  #: by inode and the field of the root: root, xattrs, iommu
        self._damaged: set[int] = set()  #: inodes whose damage was noted

    def run(self) -> list[Problem]:
        """All passes, in order."""
        for self.passed, one in enumerate(PASSES):
            self._tell()
            self.ledger.tally = Tally(0)
            one(self)
        return self.problems

    def _tell(self) -> None:
        if self.progress:
            inodes = sum(slab.inodes for slab in self.ledger.slabs.values())
            name = PASSES[self.passed].__name__.replace("_", " ")
            self.progress(Progress(self.passed + 1, name, self.files + self.directories, inodes))

    # -- inodes ---------------------------------------------------------------------------------------------------

    def in_use(self, ino: int) -> bool:
        """Whether an inode may be read from the slot."""
        if ino < FIRST_FREE_SLOT:
            return ino in RESERVED
        return self.ledger.slot_in_use(ino) and ino < self.volume.total_pages * INODES_PER_PAGE

    def mark(self, ino: int) -> bool:
        """Note that the inode was reached; whether for the first time."""
        page, slot = divmod(ino, INODES_PER_PAGE)
        seen = self.seen.get(page, 0)
        self.seen[page] = seen | 1 << slot
        return not seen >> slot & 1

    def reached(self, ino: int) -> bool:
        """Whether the inode was marked."""
        page, slot = divmod(ino, INODES_PER_PAGE)
        return bool(self.seen.get(page, 0) >> slot & 1)

    def inode(self, ino: int) -> Inode | None:
        """The inode; None when it is damaged, which is noted once."""
        try:
            return read_inode(self.region, ino)
        except CorruptError as error:
            if ino not in self._damaged:
                self._damaged.add(ino)
                raw = raw_inode(self.region, ino)
                if plausible(ino, raw):
                    self.unsealed[ino] = raw
                else:
                    self.bad[ino] = "damaged"
                self.ledger.note_damage("inode-checksum", error, ino=ino)
            return None

    def correct(self, ino: int, **fields: Any) -> None:
        """Note what fields of an inode should be."""
        self.fixes.setdefault(ino, {}).update(fields)

    def content(self, ino: int, inode: Inode) -> None:
        """The inode itself and all that it holds; of a directory the subdirectories are put on the list to walk."""
        outer, self.ledger.tally = self.ledger.tally, Tally(ino)
        if stat.S_ISDIR(inode.mode):
            self.directories += 1
        else:
            self.files += 1
        if not (self.files + self.directories) % STEP:
            self._tell()
        for one in EACH_INODE:
            one(self, ino, inode)
        self.ledger.tally = outer

    def walk(self, ino: int) -> None:
        """Inode ``ino`` and all below it; a list and no recursion, for names may be nested without a limit."""
        self.todo.append(ino)
        while self.todo:
            ino = self.todo.pop()
            inode = self.inode(ino)
            if inode:
                self.content(ino, inode)
