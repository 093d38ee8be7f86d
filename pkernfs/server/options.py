"""The words after -o, as mount(8) passes them."""

from typing import NamedTuple

from pkernfs.errors import UsageError


class MountOptions(NamedTuple):
    """What a mount is asked for.  ``kernel``: options that go on to mount(2) as they are."""

    readonly: bool = False
    remount: bool = False  #: change the flags of a mount that is there
    allow_other: bool | None = None  #: None: yes for root, no for others
    uid: int | None = None  #: owner that the root directory is given, as tmpfs has it
    gid: int | None = None
    mode: int | None = None
    atime: str = "relatime"
    log: str = ""  #: file; "": the journal (or syslog)
    hang: float = 30.0  #: seconds without an answer after which a worker is replaced
    metrics: str = ""  #: [ADDRESS:]PORT or /FILE for Prometheus; "": none
    foreground: bool = False
    tune: bool = True  #: raise the limits of the backing device
    barriers: bool | None = None  #: flush so that a power cut leaves the region whole; None: on a disk
    writeback: bool = False  #: written data stays in the kernel's cache for a while
    cold: bool = False  #: a boot without live update: no device stays attached to its domain
    kernel: tuple[str, ...] = ()


#: Words that mount(8) and fstab use among themselves.
IGNORED = {
    *("defaults", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev"),
    *("default_permissions", "async", "norelatime", "nostrictatime"),
}
#: Words of the kernel's own, which mount(8) repeats when it remounts.
IGNORED_NAMES = {"user_id", "group_id", "rootmode", "max_read", "blksize", "comment"}
KERNEL = {"nosuid", "suid", "nodev", "dev", "noexec", "exec", "sync", "dirsync"}
BARRIERS = {"barrier": True, "barrier=1": True, "nobarrier": False, "barrier=0": False}  #: as ext4 has them
ATIME = {"relatime": "relatime", "noatime": "noatime", "strictatime": "strictatime", "atime": "relatime"}


def _number(word: str, base: int = 10) -> int:
    name, _, value = word.partition("=")
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 32:
        raise UsageError(f"-o {word}: expected a number, found {value!r}", hint=f"for example {name}=0")
    return number


def _seconds(word: str) -> float:
    value = word.partition("=")[2]
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.1 <= number <= 86400:
        raise UsageError(f"-o {word}: expected seconds, 0.1 to 86400, found {value!r}", hint="for example hang=30")
    return number


def _metrics(word: str) -> str:
    value = word.partition("=")[2]
    port = value.rpartition(":")[2]
    if not value.startswith("/") and not (port.isdigit() and 0 < int(port) < 1 << 16):
        raise UsageError(
            f"-o {word}: expected [ADDRESS:]PORT or /FILE, found {value!r}", hint="for example metrics=9464"
        )
    return value


def parse_options(words: list[str]) -> MountOptions:
    """Parse comma-separated lists of options; a later word wins.  Raises UsageError for an unknown one."""
    options = MountOptions()
    kernel: dict[str, None] = {}
    for word in ",".join(words).split(","):
        name = word.partition("=")[0]
        if not word or word in IGNORED or name in IGNORED_NAMES or name.startswith(("x-", "X-")):
            if word == "rw":
                options = options._replace(readonly=False)
        elif word == "ro":
            options = options._replace(readonly=True)
        elif word == "remount":
            options = options._replace(remount=True)
        elif word == "allow_other":
            options = options._replace(allow_other=True)
        elif word == "noallow_other":
            options = options._replace(allow_other=False)
        elif word in ATIME:
            options = options._replace(atime=ATIME[word])
            kernel.pop("noatime", None)
            if word == "noatime":  # the only one of them that libfuse hands on
                kernel[word] = None
        elif word in KERNEL:
            kernel.pop(word.removeprefix("no") if word.startswith("no") else "no" + word, None)
            kernel[word] = None
        elif name == "uid":
            options = options._replace(uid=_number(word))
        elif name == "gid":
            options = options._replace(gid=_number(word))
        elif name == "mode":
            options = options._replace(mode=_number(word, 8) & 0o7777)
        elif name == "hang":
            options = options._replace(hang=_seconds(word))
        elif name == "metrics":
            options = options._replace(metrics=_metrics(word))
        elif name == "log":
            options = options._replace(log=word.partition("=")[2])
        elif word in BARRIERS:
            options = options._replace(barriers=BARRIERS[word])
        elif word in ("writeback", "nowriteback"):
            options = options._replace(writeback=word == "writeback")
        elif word == "cold":
            options = options._replace(cold=True)
        elif word == "notune":
            options = options._replace(tune=False)
        else:
            raise UsageError(f"-o {word}: no such option", hint="see mount.pkernfs --help")
    return options._replace(kernel=tuple(kernel))
