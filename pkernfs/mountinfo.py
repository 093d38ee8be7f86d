"""What is mounted where: /proc/self/mountinfo, as proc_pid_mountinfo(5) describes it."""

from collections.abc import Iterator
from typing import NamedTuple

FSTYPE = "fuse.pkernfs"


class Mount(NamedTuple):
    """One line of mountinfo.  ``device`` is MAJOR:MINOR; names are unescaped; ``owner`` is FUSE's user_id, else 0."""

    device: str
    mountpoint: str
    fstype: str
    source: str
    owner: int = 0


def unescape(field: str) -> str:
    """Undo the octal escapes of mountinfo, as of a space: a backslash and 040."""
    for code in ("\\040", "\\011", "\\012", "\\043"):
        field = field.replace(code, chr(int(code[1:], 8)))
    return field.replace("\\134", "\\")


def mounts() -> Iterator[Mount]:
    """All mounts that this process sees, in the order in which they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            fstype, source, options = fields[fields.index("-") + 1 :][:3]
            owner = next((word[8:] for word in options.split(",") if word.startswith("user_id=")), "0")
            yield Mount(fields[2], unescape(fields[4]), fstype, unescape(source), int(owner))


def mountpoints_of(region: str) -> list[str]:
    """Where the region at the real path ``region`` is mounted."""
    return [mount.mountpoint for mount in mounts() if mount.fstype == FSTYPE and mount.source == region]


def mount_at(mountpoint: str) -> Mount | None:
    """The topmost mount at the real path ``mountpoint``, of whatever type."""
    found = None
    for mount in mounts():
        if mount.mountpoint == mountpoint:
            found = mount
    return found
