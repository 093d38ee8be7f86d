"""The options of a mount, as they are written after -o: each is declared once.

A field of MountOptions carries how it is written and what it means; parsing, the help of mount.pkernfs and its man page
are made from that.  Below the server and the commands, as both need it, and `mount.pkernfs --help` loads no server.

Not argparse: a list has commas, a later word undoes an earlier one (rw after ro), and mount(8) hands on words that are
to be ignored.  Not msgspec: it knows types, but not the words, of which several can set one field.  It would do if the
options became a file.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, get_type_hints

from pkernfs.errors import UsageError, quoted


class Choice(NamedTuple):
    """An option that is written as one of some words, each with the value that it gives the field."""

    values: Mapping[str, Any]
    help: str
    synonyms: Mapping[str, Any] = {}  #: accepted too, and not in the help

    def forms(self, _field: str) -> list[str]:
        """How it is written, for people."""
        return list(self.values)


class Value(NamedTuple):
    """An option NAME=VALUE.  ``parse`` raises ValueError for what is not ``expected``."""

    parse: Callable[[str], Any]
    expected: str
    example: str
    metavars: tuple[str, ...]
    help: str

    def forms(self, field: str) -> list[str]:
        """How it is written, for people."""
        return [f"{field}={metavar}" for metavar in self.metavars]


def _number(value: str, base: int = 10) -> int:
    number = int(value, base)
    if not 0 <= number < 1 << 32:
        raise ValueError
    return number


def _mode(value: str) -> int:
    return _number(value, 8) & 0o7777


def _seconds(value: str) -> float:
    number = float(value)
    if not 0.1 <= number <= 86400:
        raise ValueError
    return number


def _exporter(value: str) -> str:
    port = value.rpartition(":")[2]
    if not value.startswith("/") and not (port.isdigit() and 0 < int(port) < 1 << 16):
        raise ValueError
    return value


class MountOptions(NamedTuple):
    """What a mount is asked for, in the order in which the help lists it."""

    readonly: Annotated[
        bool,
        Choice({"ro": True, "rw": False}, "read-only: nothing in the region is changed, not even by recovery"),
    ] = False
    remount: Annotated[
        bool,
        Choice({"remount": True}, "with ro, rw, nosuid and so on: change the flags of a mount that is there"),
    ] = False
    allow_other: Annotated[
        bool | None,
        Choice(
            {"allow_other": True, "noallow_other": False},
            "whether other users may use the mount (default: yes where root mounts it)",
        ),
    ] = None
    uid: Annotated[
        int | None, Value(_number, "a number", "0", ("N",), "give the root directory this owner, as tmpfs does")
    ] = None
    gid: Annotated[int | None, Value(_number, "a number", "0", ("N",), "give the root directory this group")] = None
    mode: Annotated[
        int | None, Value(_mode, "a number", "0", ("MODE",), "give the root directory this mode (octal)")
    ] = None
    atime: Annotated[
        str,
        Choice(
            {"relatime": "relatime", "strictatime": "strictatime", "noatime": "noatime"},
            "when reading updates access times (default relatime), as mount(8) describes",
            synonyms={"atime": "relatime"},
        ),
    ] = "relatime"
    log: Annotated[str, Value(str, "a file", "/var/log/pkernfs", ("FILE",), "log there, not to the journal")] = ""
    hang: Annotated[
        float,
        Value(
            _seconds,
            "seconds, 0.1 to 86400",
            "30",
            ("SECONDS",),
            "replace a worker that has not answered for so long (default 30)",
        ),
    ] = 30.0
    metrics: Annotated[
        str,
        Value(
            _exporter,
            "[ADDRESS:]PORT or /FILE",
            "9464",
            ("[ADDRESS:]PORT", "/FILE"),
            "metrics for Prometheus (see pkernfs metrics --help; default: none)",
        ),
    ] = ""
    foreground: bool = False  #: no option after -o: mount.pkernfs --foreground
    tune: Annotated[
        bool,
        Choice(
            {"notune": False},
            "leave the kernel's page cache limits for this mount alone (they are raised when root mounts: random "
            "writes to mapped memory are hundreds of times slower without)",
        ),
    ] = True
    barriers: Annotated[
        bool | None,
        Choice(
            {"barrier": True, "nobarrier": False},
            "whether what is stored in a region on a disk is flushed in order (the default there), so that a power "
            "cut leaves it whole; fsync flushes either way",
            synonyms={"barrier=1": True, "barrier=0": False},  # as ext4 has them
        ),
    ] = None
    writeback: Annotated[
        bool,
        Choice(
            {"writeback": True, "nowriteback": False},
            "written data stays in the kernel's page cache until close, fsync, or some 30 s later (default: no).  "
            "Small writes are several times as fast.  It outlives every server of this mount, but not the mount: it "
            "is lost when all its processes are killed, or with a kexec, without a sync.  That space or a quota has "
            "run out is told by fsync and close, not by write.  No file can be mapped directly from the region",
        ),
    ] = False
    cold: Annotated[
        bool,
        Choice(
            {"cold": True},
            "a boot without live update: no device stays attached to its domain in iommu/ (default: those stay that "
            "were declared persistent, see pkernfs iommu attach --help)",
        ),
    ] = False
    kernel: tuple[str, ...] = ()  #: those of KERNEL that go on to mount(2) as they are


#: Flags of mount(2), each with the one that it undoes.
KERNEL = {
    **{"suid": "nosuid", "nosuid": "suid", "dev": "nodev", "nodev": "dev", "exec": "noexec", "noexec": "exec"},
    **{"sync": "", "dirsync": ""},
}
#: Words that mount(8) and fstab use among themselves.
IGNORED = {
    *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"),
    *("default_permissions", "async", "norelatime", "nostrictatime"),
}
#: Words of the kernel's own, which mount(8) repeats when it remounts.
IGNORED_NAMES = {"user_id", "group_id", "rootmode", "max_read", "blksize", "comment"}

#: Field -> how it is written.
DECLARED: dict[str, Choice | Value] = {
    field: hint.__metadata__[0]
    for field, hint in get_type_hints(MountOptions, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
_VALUES = {field: option for field, option in DECLARED.items() if isinstance(option, Value)}
_CHOICES = {
    word: (field, value)
    for field, option in DECLARED.items()
    if isinstance(option, Choice)
    for word, value in (option.values | option.synonyms).items()  # type: ignore[operator]
}


def descriptions() -> Iterator[tuple[str, str]]:
    """How each option is written, and what it means: for the help and the man page."""
    for field, option in DECLARED.items():
        yield ", ".join(option.forms(field)), option.help
    yield ", ".join(KERNEL), "go to the kernel, which mount(8) describes; the words that only mount(8) uses are ignored"


def parse_options(lists: list[str]) -> MountOptions:
    """Parse comma-separated lists of options; a later word wins.  Raises UsageError for an unknown one."""
    fields: dict[str, Any] = {}
    kernel: dict[str, None] = {}
    for word in ",".join(lists).split(","):
        name, _, value = word.partition("=")
        if word in _CHOICES:
            fields.update([_CHOICES[word]])
        elif name in _VALUES:
            option = _VALUES[name]
            try:
                fields[name] = option.parse(value)
            except ValueError:
                raise UsageError(
                    f"-o {word}: expected {option.expected}, found {quoted(value)}",
                    hint=f"for example {name}={option.example}",
                ) from None
        elif word in KERNEL:
            kernel.pop(KERNEL[word], None)
            kernel[word] = None
        elif word and word not in IGNORED and name not in IGNORED_NAMES and not name.startswith(("x-", "X-")):
            raise UsageError(f"-o {word}: no such option", hint="see mount.pkernfs --help")
    if fields.get("atime") == "noatime":
        kernel["noatime"] = None  # the only one of them that libfuse hands on
    return MountOptions(**fields, kernel=tuple(kernel))
