"""What a check finds: findings with their place and typed data, by which a repair goes.

Nothing here reads the region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

from pkernfs.errors import CorruptError
from pkernfs.format import BlockNo, Ino, Inode, PageNo
from pkernfs.fsck.problems import PROBLEMS, Code, Severity, Stage

NO_INO = Ino(0)  #: it is about no inode
#: More are not shown: nobody reads them, and a region that is damaged all over would fill memory with text.  A repair
#: still gets all that it needs, else it would go in rounds of so many, each with a check of everything.
MAX_FINDINGS = 10_000

#: whether a key and a value can be an item of a tree: the trees of one inode are told apart by it
Fits = Callable[[int, bytes], bool]


# -- the data of a finding: what the stage that mends it has to know --------------------------------------------------


class UsedAsSlab(NamedTuple):
    """A block that is used like a slab, and is marked as something else."""

    block: BlockNo


class UsedAsData(NamedTuple):
    """A block that a file uses whole, and that is marked as something else."""

    block: BlockNo


class DamagedHeader(NamedTuple):
    """A slab whose header cannot be read."""

    block: BlockNo
    kinds: bytearray  #: what its pages are used as; complete when the check is


class UsedAs(NamedTuple):
    """A page of a slab that is used as another kind than the header says."""

    page: PageNo
    kind: int


class NoInodes(NamedTuple):
    """A page of a slab that holds no inodes, and has slots in use."""

    page: PageNo


class NamedSlot(NamedTuple):
    """A slot that is free, and that a name points to."""

    ino: Ino
    mode: int  #: S_IFMT bits that the name says


class Plausible(NamedTuple):
    """An inode with a wrong checksum that looks right."""

    ino: Ino
    inode: Inode


class Unusable(NamedTuple):
    """An inode that cannot be kept."""

    ino: Ino
    why: str  #: behind "was"


class Values(TypedDict, total=False):
    """Fields of an inode that a check can tell the right value of."""

    mode: int
    nlink: int
    flags: int
    size: int
    pages: int
    parent: Ino
    project: Ino
    root: PageNo
    xattrs: PageNo
    iommu: int  #: pins; or, of page tables, the page of the root of their records' tree
    inline: bytes


class Fields(NamedTuple):
    """What fields of an inode should be."""

    ino: Ino
    values: Values


class WrongHold(NamedTuple):
    """An inode of which not all says that it is held, or that is none that can be."""

    ino: Ino


class NoFeature(NamedTuple):
    """A feature of the format that is in use, and that the superblock does not name."""

    ro_compat: int


class NotEmpty(NamedTuple):
    """A free slot with something in it."""

    ino: Ino


class Unlisted(NamedTuple):
    """An inode without a name that is missing in the list of orphans."""

    ino: Ino


class Nameless(NamedTuple):
    """An inode that should have a name, and has none."""

    ino: Ino


class Leak(NamedTuple):
    """Pages of slabs, or blocks, that are allocated and have no owner."""

    first: int  #: PageNo or BlockNo, as the code says
    number: int


class BadRecord(NamedTuple):
    """A record of page tables that names what is not there."""

    ino: Ino
    key: int


class NotPending(NamedTuple):
    """A domain id of which content awaits an invalidation, and none is pending."""

    number: int


class FeatureOff(NamedTuple):
    """A feature that is in use, and that is off."""

    ro_compat: int


class NewId(NamedTuple):
    """A domain whose id another has, too."""

    ino: Ino
    number: int  #: one that is free; 0: none is


class FreeBitmap(NamedTuple):
    """A page of the bitmap of page tables that does not say that itself is in use."""

    ino: Ino
    page: PageNo


Data = (
    UsedAsSlab
    | UsedAsData
    | DamagedHeader
    | UsedAs
    | NoInodes
    | NamedSlot
    | Plausible
    | Unusable
    | Fields
    | WrongHold
    | NoFeature
    | NotEmpty
    | Unlisted
    | Nameless
    | Leak
    | BadRecord
    | NotPending
    | FeatureOff
    | NewId
    | FreeBitmap
)


#: The field of an inode that holds the root of a structure.
StructureField = Literal["root", "xattrs", "iommu"]


class Structure:
    """A tree of an inode, or the extents inside it: what of it can be kept where it cannot stay as it is.

    ``keeps``: a repair may follow.  Else only the problems are of interest, and nothing is kept.
    """

    __slots__ = ("broken", "damaged", "dropped", "field", "fits", "keeps", "kept", "nodes", "noted", "owner")

    def __init__(self, owner: Ino, field: StructureField, fits: Fits, *, keeps: bool) -> None:
        self.owner = owner
        self.field = field
        self.fits = fits
        self.keeps = keeps
        self.kept: list[tuple[int, bytes]] = []  #: key (may be the wrong one, for names) and value
        self.nodes: list[PageNo] = []  #: pages of the tree as it is
        self.damaged: list[PageNo] = []  #: pages of nodes with wrong checksums
        self.dropped: list[str] = []  #: what is not among those kept
        self.broken = False  #: a node of it cannot be used as it is
        self.noted = False  #: a finding names it

    @property
    def must_change(self) -> bool:
        """Whether it cannot stay as it is."""
        return self.broken or bool(self.dropped)

    def keep(self, key: int, value: bytes) -> None:
        """An item can be kept."""
        if self.keeps:
            self.kept.append((key, value))


# -- findings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One invariant that does not hold at one place."""

    code: Code
    text: str  #: one line: what, where, expected, found
    ino: Ino = NO_INO  #: the inode concerned, or 0
    offset: int = 0  #: region offset in bytes, or 0
    data: Data | None = field(default=None, compare=False, repr=False)
    structure: Structure | None = field(default=None, compare=False, repr=False)  #: in which it was found


class Tally:
    """The inode at work.  Its totals are compared only where everything below it could be read."""

    __slots__ = ("owner", "pages", "sound", "structure")

    def __init__(self, owner: Ino) -> None:
        self.owner = owner
        self.pages = 0  #: 4 KiB pages claimed
        self.sound = True
        self.structure: Structure | None = None  #: which of its structures is at work


class Findings:
    """All findings of one check."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self.incomplete = False  #: something could not be read, so what is below it may seem lost
        self.tally = Tally(NO_INO)

    def note(self, code: Code, text: str, *, ino: Ino | None = None, offset: int = 0, data: Data | None = None) -> None:
        """Note a problem of the inode at work, or of ``ino``.

        Beyond MAX_FINDINGS only those are kept that a repair needs: with data, or the first of a structure.
        """
        tally, structure = self.tally, self.tally.structure
        tally.sound = False
        self.incomplete |= PROBLEMS[code].severity is Severity.UNREADABLE
        first = structure is not None and not structure.noted
        if len(self.all) < MAX_FINDINGS or data is not None or first:
            owner = tally.owner if ino is None else ino
            self.all.append(Finding(code, text, owner, offset, data, structure))
            if structure is not None and data is None:
                structure.noted = True

    def note_error(self, code: Code, error: CorruptError, *, ino: Ino | None = None, data: Data | None = None) -> None:
        """Note what a reader would raise."""
        self.note(code, f"{error.what}: {error.found}", ino=ino, offset=error.offset, data=data)

    def shown(self) -> list[Finding]:
        """Those for a person to read."""
        return self.all[:MAX_FINDINGS]

    def of(self, stage: Stage) -> Iterator[Finding]:
        """The findings that a stage may mend."""
        return (finding for finding in self.all if stage in PROBLEMS[finding.code].mended_by)
