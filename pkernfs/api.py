r"""The control protocol of a mount: every request, every reply, and the one table of verbs.

Two sockets speak it, each with one JSON object a line each way (codec.py): the worker's answers about the region and
its files, the keeper's about the mount, also while no worker serves.  By hand:

    W=$(getfattr --only-values -n user.pkernfs.control /mnt/pkernfs)
    echo '{"verb": "info"}' | socat - UNIX:$W
        {"result": {"region": "/dev/shm/pkernfs.img", "kind": "file", ...}}
    echo '{"verb": "inof"}' | socat - UNIX:$W
        {"error": "no verb \"inof\"", "errno": 95, "hint": "known are info, ...", "known": ["info", ...]}

A request is an object with "verb" and the fields of its class below.  Whoever writes programs adds "version":
API_VERSION, and is refused (EPROTONOSUPPORT) by a server that means something else by it; without it a request is
taken as one of the server's own version, which is what one wants by hand.  A verb, a field or a version that is not
known is refused, and the reply lists under "known" those that are.  A reply may have more fields than a client knows.

What changes things has a "key", a number that no other request has: asked again with the same one, after a worker that
has ended, it is not executed twice (0: no such promise).  Python programs use pkernfs.client, which sees to all of it.

pkernfs 0.1 had no versions, and one verb "iommu" with the operation in "op" and the key in "request".  This release
still answers such requests (``of_first_release``); the next one refuses the verb, as it does any that is not known.

All sizes, offsets and addresses are in bytes; lengths of time in seconds, points of time in nanoseconds since the
epoch unless a field says otherwise.  Numbers are plain ints, not the types of format.py (Ino, Iova): programs have them
from stat(2) or a log, and the server gives them a type when it has looked at them.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct, field

API_VERSION: Final = 1
PATIENCE: Final = 60.0  #: seconds: for a line to come, for a reply to be taken, for most verbs to be answered

Number = Annotated[int, Meta(ge=0)]  #: 64 bits
InodeNumber = Annotated[int, Meta(ge=0, lt=1 << 60)]
Key = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Segment = Annotated[int, Meta(ge=0, lt=1 << 16)]  #: of PCI
Id = Annotated[int, Meta(ge=0, lt=(1 << 32) - 1)]  #: of a user or a group
Access = Literal["rw", "ro", "wo"]  #: what a device may do
Format = Literal["vtd", "amd"]  #: of tables: Intel VT-d second level, AMD-Vi v1

R = TypeVar("R")


class Server(enum.Enum):
    """Who answers a verb."""

    WORKER = "worker"
    KEEPER = "keeper"


# -- requests -------------------------------------------------------------------------------------------------------


class Request(Struct, Generic[R], kw_only=True, forbid_unknown_fields=True, tag_field="verb"):
    """What all requests have; R is the class of the reply's "result"."""

    version: int = API_VERSION

    def __post_init__(self) -> None:
        """Raise ValueError for a number of more than 64 bits (msgspec's own limits end at 63)."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and value >> 64:
                raise ValueError(f'"{name}": expected at most 64 bits, found {value:#x}')


class WorkerRequest(Request[R], Generic[R], kw_only=True):
    """What the worker is asked.  ``ino``: the inode that it is about; verbs about the whole mount do not look at it.

    pkernfs.client puts the inode of its path there.
    """

    ino: InodeNumber = 0


class Change(WorkerRequest[R], Generic[R], kw_only=True):
    """What is to be executed once, however often it comes."""

    key: Key = 0


class Info(WorkerRequest["MountInfo"], tag="info"):
    """Geometry, use and features of the region."""


class File(WorkerRequest["FileInfo"], tag="file"):
    """The memory of a regular file, and which domains map it."""


class Direct(WorkerRequest["FileInfo"], kw_only=True, tag="direct"):
    """Mark a file as mapped directly from the region, or as no longer so.

    EBUSY: a process has mapped it, through the mount or directly, which the other way would not be coherent with.
    """

    on: bool = True


class CreateRam(Change["FileInfo"], kw_only=True, tag="create-ram"):
    """Make a guest's memory: a new file, whole and allocated; ``ino`` is that of the directory.

    In one piece of the region, but for ``fragmented``.
    """

    name: str
    size: Number
    owner: Id
    group: Id
    mode: Annotated[int, Meta(ge=0, le=0o7777)] = 0o600
    fragmented: bool = False


class Hold(WorkerRequest["FileInfo"], kw_only=True, tag="hold"):
    """Let nobody change a file, its attributes and its names.  EBUSY: somebody has it open for writing."""

    reason: str


class Release(WorkerRequest["FileInfo"], tag="release"):
    """End that; of a file that is not held nothing changes."""


class Holds(WorkerRequest["HeldFiles"], tag="holds"):
    """All files that are held."""


class GetOthers(WorkerRequest["Others"], tag="others"):
    """Whose files, beside those of the owner of a file, the region holds."""


class Scrub(WorkerRequest["Scrubbed"], kw_only=True, tag="scrub"):
    """Verify some checksums, from ``page`` on; one goes on with the reply's ``next``."""

    page: Number


class Quota(WorkerRequest["QuotaUse"], kw_only=True, tag="quota"):
    """The quota of a directory (or of what is above it), after setting it to ``limit``; 0 takes it away."""

    limit: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None


class IommuCreate(Change["Domain"], kw_only=True, tag="iommu-create"):
    """Make a domain; ``ino`` is that of the directory iommu."""

    name: str
    format: Format = "vtd"
    levels: Number = 4


class IommuDestroy(Change["Destroyed"], tag="iommu-destroy"):
    """Remove a domain that no device is attached to."""


class IommuMap(Change["Mapped"], kw_only=True, tag="iommu-map"):
    """Map ``length`` bytes of a file, 0: up to its end, to an IOVA.  ``live_update``: verify that they are, instead."""

    iova: Number
    file_ino: InodeNumber
    offset: Number = 0
    length: Number = 0
    access: Access = "rw"
    live_update: bool = False


class IommuUnmap(Change["Unmapped"], kw_only=True, tag="iommu-unmap"):
    """Take away what is mapped in a range."""

    iova: Number
    length: Number


class IommuAttach(Change["Device"], kw_only=True, tag="iommu-attach"):
    """Let a device do DMA through a domain.  ``persistent``: also while no kernel runs."""

    device: str  #: as lspci prints it
    persistent: bool = False


class IommuDetach(Change["Detached"], kw_only=True, tag="iommu-detach"):
    """Stop that."""

    device: str


class IommuReplace(Change["Replaced"], kw_only=True, tag="iommu-replace"):
    """Build a domain's tables anew, and switch to them.  ``rebuild``: the old ones are damaged."""

    leaf: Annotated[int, Meta(ge=0, lt=256)] | None = None  #: largest level of leaves from now on; None: as before
    rebuild: bool = False


class IommuInvalidations(Change["Invalidations"], kw_only=True, tag="iommu-invalidations"):
    """What hardware must invalidate, after acknowledging that the list with token ``acknowledge`` was invalidated.

    0 acknowledges whatever is listed, None nothing.  EAGAIN: there is more by now.
    """

    acknowledge: Number | None = None


class IommuRoot(Change["RootTable"], kw_only=True, tag="iommu-root"):
    """The root table (device table) of a PCI segment, which is made if there is none."""

    format: Format = "vtd"
    segment: Segment = 0


class IommuList(WorkerRequest["Domains"], tag="iommu-list"):
    """All domains, their mappings and devices."""


class IommuWalk(WorkerRequest["Walk"], kw_only=True, tag="iommu-walk"):
    """What the tables make of an IOVA of ``device``, or of the domain that ``ino`` is."""

    iova: Number
    device: str | None = None


class IommuAudit(WorkerRequest["Audited"], tag="iommu-audit"):
    """Prove that the tables say what the mappings say."""


class GetStatus(Request["Status"], tag="status"):
    """Who serves the mount, and how it has been doing."""


class Upgrade(Request["Upgraded"], kw_only=True, tag="upgrade"):
    """Let workers of another program serve."""

    command: Annotated[list[str], Meta(min_length=1)]
    probation: Annotated[float, Meta(ge=0, le=3600)] = 5.0  #: seconds


class Share(Request["Shared"], tag="share"):
    """Let the mount be mounted once more, with what comes along: the descriptor of its connection (/dev/fuse)."""


class HandOver(Request[dict[str, object]], tag="hand-over"):
    """Give the mount to the keeper that asks: the reply is the state (server/state.py), with all descriptors.

    It has taken over when it sends one byte more; when the connection ends before, the old keeper goes on.
    """


# -- replies --------------------------------------------------------------------------------------------------------


class Refusal(Struct, omit_defaults=True):
    """A reply to what was not done.  All others are {"result": ...}."""

    error: str
    errno: int
    hint: str = ""  #: what to do next
    known: list[str] = []  #: verbs, fields or versions, when another one was found


class Features(Struct):
    """Bits that a program must know: to open at all, to write; and others."""

    compat: int
    ro_compat: int
    incompat: int


class JournalInfo(Struct):
    """The journal."""

    offset: int
    size: int
    sequence: int  #: transactions so far
    replayed_records: int  #: when it was opened


class Finding(Struct):
    """A structure that was found damaged."""

    structure: str
    offset: int  #: in the region
    ino: int | None  #: that it belongs to
    found: str


class RegionInfo(Struct):
    """A region."""

    region: str
    kind: str
    readonly: bool
    volatile: bool  #: the end of the machine ends what is in it
    barriers: bool
    version: int  #: of the format
    uuid: str
    label: str
    features: Features
    size: int
    block_size: int
    page_size: int
    blocks: int
    blocks_free: int
    blocks_largest_free_run: int
    slabs: int
    space: int
    space_used: int
    space_free: int  #: and for which the host has memory: can be less than is not used
    memory: int  #: how much of the region has memory
    host_free: int | None  #: how much more the host can give it; None: it has all
    inodes: int
    orphans: int | None  #: inodes without a name; None: their list is damaged
    phys_base: int
    journal: JournalInfo
    first_block: int
    pages_per_block: int
    created: int
    mounts: int
    last_mounted: int
    last_unmounted: int
    damaged: list[Finding]
    awaiting: int | None = None  #: bytes that nobody uses, and that await an invalidation; None: not known, for damage


class MountInfo(RegionInfo, kw_only=True):
    """A region that is mounted."""

    server: int  #: process id of the worker


class Extent(Struct):
    """A run of a file's bytes."""

    file_offset: int
    region_offset: int
    physical: int
    length: int


class Pin(Struct):
    """A mapping that names a file, which therefore does not move."""

    domain: str | None  #: None: it is being removed
    iova: int
    offset: int
    length: int
    access: str


class Awaiting(Struct):
    """What hardware may have cached of a file, and so pins it, since a mapping of it was taken away."""

    id: int  #: of the domain
    offset: int
    length: int


class Held(Struct):
    """Why nobody can change a file, and since when."""

    since: int  #: 0: that cannot be read
    reason: str


class HeldFile(Held):
    """A file that is held."""

    ino: int
    file: str | None  #: path in the mount; None: it was not found


class HeldFiles(Struct):
    """All of them, in the order of their inodes."""

    files: list[HeldFile]


class Mapper(Struct):
    """A process that maps a file's memory, shared with others."""

    pid: int
    text: str  #: which process, for people: its program, and the name of its guest
    map: Literal["direct", "path"]  #: from the region, or through the mount


class FileInfo(Struct):
    """The memory of a file."""

    region: str
    ino: int
    size: int
    allocated: int
    flags: list[str]
    contiguous: bool
    direct: bool  #: marked as mapped directly from the region
    extents: list[Extent]
    pins: list[Pin]
    awaiting: list[Awaiting] = []
    held: Held | None = None  #: None also from a server of 0.2
    mapped_by: list[Mapper] = []  #: those that the worker may look at


class Others(Struct):
    """Files of a region beside one: of another owner, or region-mapped, which may be another guest's memory."""

    files: int
    path: str  #: of one of them from the root of the filesystem on; "": none, or it has no name


class DamagedChecksum(Struct):
    """A structure whose checksum does not hold."""

    text: str
    ino: int  #: 0: it belongs to none
    offset: int


class Scrubbed(Struct):
    """What a step of scrubbing found."""

    next: int
    structures: int
    problems: list[DamagedChecksum]


class QuotaUse(Struct):
    """A quota.  ``ino``: of the directory that has it; 0: there is none."""

    ino: int
    limit: int
    used: int


class Invalidation(Struct):
    """What hardware may have cached of something that has changed since."""

    kind: Literal["context", "iotlb"]
    id: int  #: of the domain
    device: str | None  #: whose context it is
    iova: int | None
    length: int | None  #: None: all of the domain


class DomainMapping(Struct):
    """A range of IOVAs that is a range of a file."""

    iova: int
    length: int
    ino: int
    file: str | None  #: path in the mount; None: the file has no name any more
    offset: int
    access: str


class Device(Struct):
    """A device that is attached."""

    device: str
    domain: str
    id: int
    persistent: bool
    state: Literal["attached", "deferred"]


class Domain(Struct):
    """An address space and its tables."""

    name: str
    ino: int
    format: str
    levels: int
    aperture: int  #: IOVAs are below this
    reserved: list[tuple[int, int]]  #: first and last of IOVAs that cannot be mapped
    id: int  #: 0: none yet
    leaf: int  #: size of the largest
    root: int | None  #: physical; None: there are no tables yet
    size: int
    tables: int
    awaiting: int = field(name="stale")  #: pages of old tables that await invalidation
    mappings: list[DomainMapping]
    devices: list[Device]


class DamagedDomain(Struct):
    """A domain whose records cannot be read."""

    name: str
    ino: int
    text: str


class RootTable(Struct):
    """The table that hardware begins with."""

    format: str
    segment: int
    physical: int
    register: str  #: of the IOMMU, that holds its address
    entries: int


class Domains(Struct):
    """Everything about DMA."""

    phys_base: int
    roots: list[RootTable]
    domains: list[Domain]
    damaged: list[DamagedDomain]
    invalidations: list[Invalidation] = field(name="stale")


class Destroyed(Struct):
    """The inode that the domain was."""

    destroyed: int


class Mapped(Struct):
    """What is mapped now."""

    iova: int
    length: int
    ino: int
    offset: int
    access: str
    entries: int  #: leaves that were stored; 0: it was mapped already
    invalidations: list[Invalidation] = field(name="stale")


class Unmapped(Struct):
    """What was asked for, and how much of it was mapped."""

    iova: int
    length: int
    unmapped: int
    invalidations: list[Invalidation] = field(name="stale")


class Detached(Struct):
    """The device that was detached."""

    device: str
    invalidations: list[Invalidation] = field(name="stale")


class Replaced(Struct):
    """What a replacement has done."""

    tables_before: int
    tables_after: int
    compared: int  #: translations
    invalidations: list[Invalidation] = field(name="stale")


class Invalidations(Struct):
    """What hardware must invalidate; ``token`` names this list, for acknowledging it."""

    invalidations: list[Invalidation] = field(name="stale")
    token: int
    freed: int  #: pages of old tables that the acknowledgement freed
    awaiting: int = 0  #: bytes of content and of removed domains that await it
    released: int = 0  #: bytes of these that the acknowledgement has released


class Step(Struct):
    """One entry that a walk looks at."""

    level: int | str
    table: int  #: physical
    index: int
    address: int  #: of the entry, physical
    entry: int
    means: str


class Walk(Struct):
    """What the tables make of an IOVA, and what the mappings say of it."""

    device: str | None
    domain: str
    iova: int
    steps: list[Step]
    physical: int | None
    page_size: int | None
    access: str
    fault: str | None  #: why there is no translation
    ino: int | None
    file: str | None
    offset: int | None


class Problem(Struct):
    """A finding of an audit."""

    kind: str
    domain: str | None
    device: str | None
    iova: int | None
    text: str


class Audited(Struct):
    """What was looked at, and what is wrong."""

    devices: int
    domains: int
    mappings: int
    tables: int
    bytes: int
    problems: list[Problem]


class Trouble(Struct):
    """Something that the host refuses a server, which goes on with what it has and tries again."""

    what: str  #: standby, worker, metrics, commands, umount, state, log or keeper
    why: str
    since: float
    next_try: float  #: from now


class Status(Struct):
    """A mount.  Lengths of time and points of time in seconds."""

    mountpoint: str
    region: str
    device: str  #: MAJOR:MINOR
    readonly: bool
    keeper: int  #: process id
    keepers: int  #: so far
    worker: int  #: process id
    version: str  #: of the worker
    uptime: float
    worker_uptime: float
    takeovers: int
    last_reason: str  #: how the worker before ended
    last_takeover: float
    longest_stall: float
    standby: int  #: process id; 0: none is ready
    requests: dict[str, int]  #: of the kernel, by kind
    failed_requests: int
    dirty: int | None  #: None: not known
    pinned: int | None
    awaiting: int = 0  #: bytes that await an invalidation
    troubles: list[Trouble] = []  #: what the host refuses at the moment
    memory: int | None = None  #: how much of the region has memory; None: a device, which has all
    host_free: int | None = None  #: how much more the host can give it
    refused: str = ""  #: why requests fail with EIO, as no worker can open the region; "": they do not
    mountpoints: list[str] = []  #: all, in the keeper's mount namespace; "mountpoint" is one that shows the root
    elsewhere: list[str] = []  #: a process of each other mount namespace that has it


class Shared(Struct):
    """A mount that may be mounted once more, and the options that hold for all its mounts."""

    device: str  #: MAJOR:MINOR
    region: str  #: by the name that it was mounted by
    options: dict[str, Any]


class Upgraded(Struct):
    """Versions of the worker, its process id, and for how long nobody answered."""

    before: str = field(name="from")
    after: str = field(name="to")
    worker: int
    longest_stall: float


# -- the table ------------------------------------------------------------------------------------------------------


class Verb(NamedTuple):
    """One line of the table."""

    request: type[Request[Any]]
    reply: Any  #: class of the result
    server: Server  #: who answers
    changes: bool  #: whether it changes something
    patience: float | None  #: seconds that a client waits for the answer; None: as long as it takes
    root: bool = False  #: whether only root may ask, and not the owner of a mount either

    @property
    def name(self) -> str:
        """What stands in "verb"."""
        return str(self.request.__struct_config__.tag)

    @property
    def keyed(self) -> bool:
        """Whether it needs a key, so that it is not executed twice."""
        return issubclass(self.request, Change)

    @property
    def fields(self) -> list[str]:
        """What a request may have."""
        return ["verb", *self.request.__struct_encode_fields__]


def _worker(
    request: type[WorkerRequest[R]], reply: type[R], *, changes: bool = False, slow: bool = False, root: bool = False
) -> Verb:
    return Verb(request, reply, Server.WORKER, changes, None if slow else PATIENCE, root)


def _keeper(request: type[Request[R]], reply: type[R], *, changes: bool = False, slow: bool = False) -> Verb:
    return Verb(request, reply, Server.KEEPER, changes, None if slow else PATIENCE)


#: All verbs, by name.
VERBS: Final[dict[str, Verb]] = {
    verb.name: verb
    for verb in (
        _worker(Info, MountInfo),
        _worker(File, FileInfo),
        _worker(Direct, FileInfo, changes=True),
        _worker(CreateRam, FileInfo, changes=True, slow=True),
        _worker(Hold, FileInfo, changes=True, slow=True, root=True),
        _worker(Release, FileInfo, changes=True, slow=True, root=True),
        _worker(Holds, HeldFiles, slow=True),
        _worker(GetOthers, Others, slow=True),
        _worker(Scrub, Scrubbed),
        _worker(Quota, QuotaUse, changes=True, slow=True),
        _worker(IommuCreate, Domain, changes=True, slow=True),
        _worker(IommuDestroy, Destroyed, changes=True, slow=True),
        _worker(IommuMap, Mapped, changes=True, slow=True),
        _worker(IommuUnmap, Unmapped, changes=True, slow=True),
        _worker(IommuAttach, Device, changes=True, slow=True),
        _worker(IommuDetach, Detached, changes=True, slow=True),
        _worker(IommuReplace, Replaced, changes=True, slow=True),
        _worker(IommuInvalidations, Invalidations, changes=True, slow=True),
        _worker(IommuRoot, RootTable, changes=True, slow=True),
        _worker(IommuList, Domains, slow=True),
        _worker(IommuWalk, Walk, slow=True),
        _worker(IommuAudit, Audited, slow=True),
        _keeper(GetStatus, Status),
        _keeper(Upgrade, Upgraded, changes=True, slow=True),
        _keeper(Share, Shared),
        _keeper(HandOver, dict[str, object], changes=True),
    )
}


def of_first_release(fields: dict[str, Any]) -> dict[str, Any]:
    """A request as pkernfs 0.1 writes it, in the words of this version; any other as it is.  Goes with release 0.3."""
    op = fields.get("op")
    if fields.get("verb") != "iommu" or "version" in fields or not isinstance(op, str):
        return fields
    rest = {name: value for name, value in fields.items() if name not in ("verb", "op", "request")}
    if op == "iotlb-needed":
        op, done, token = "invalidations", rest.pop("done", False), rest.pop("token", 0)
        rest |= {"acknowledge": token} if done else {}
    verb = VERBS.get(f"iommu-{op}")
    if verb is None:
        return fields
    key = fields.get("request", 0)
    return {"verb": verb.name, **rest} | ({"key": key >> 1 if isinstance(key, int) else key} if verb.keyed else {})


def to_builtins(value: object) -> Any:
    """A reply (or a part of one, or a list of them) as dicts and lists, as --json prints it."""
    return msgspec.to_builtins(value)
