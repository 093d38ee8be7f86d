"""One tree of errors.

Each class carries the errno a FUSE reply gives and the exit code a command ends with.  The text is one line that says
what was expected, what was found and, as a hint, what to do next.
"""

import errno as _errno
import os
import stat as _stat

#: File types in the lines that people read.
FILE_TYPES = {
    _stat.S_IFREG: "a regular file",
    _stat.S_IFDIR: "a directory",
    _stat.S_IFLNK: "a symbolic link",
    _stat.S_IFIFO: "a FIFO",
    _stat.S_IFSOCK: "a socket",
    _stat.S_IFCHR: "a character device",
    _stat.S_IFBLK: "a block device",
}


def file_type(mode: int) -> str:
    """The type of a file with this mode, in words."""
    return FILE_TYPES.get(_stat.S_IFMT(mode), f"no type ({_stat.S_IFMT(mode):o})")


def mode_text(mode: int) -> str:
    """A mode in octal, and its type in words."""
    return f"mode 0{mode:o} ({FILE_TYPES.get(_stat.S_IFMT(mode), 'no type')})"


def printable(name: bytes | str) -> str:
    """A name, or a message with names, as part of a line: what is no printable UTF-8 becomes an escape.

    All that others may have chosen comes by here on its way to a terminal: names of files, of processes, of mounts.
    """
    text = name if isinstance(name, str) else name.decode(errors="surrogateescape")
    if text.isprintable():  # nearly all: fsck makes one of these for every name
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    """A letter as an escape; of os.fsdecode's for a byte that is no UTF-8, that byte's."""
    byte = ord(char) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else char.encode("unicode_escape").decode()


def quoted(name: bytes | str) -> str:
    """A name in a message: printable, in quotes."""
    return f'"{printable(name)}"'


class PkernfsError(Exception):
    """An error that a user can act on: one line, no traceback.

    ``errno`` goes to FUSE, ``exit_code`` to the shell, ``hint`` is what to do next.
    """

    errno: int = _errno.EIO
    exit_code: int = 1

    def __init__(self, text: str, *, hint: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.text}: {self.hint}" if self.hint else self.text


class UsageError(PkernfsError):
    """The words of a command are wrong."""

    errno = _errno.EINVAL
    exit_code = 2


class OutputError(PkernfsError):
    """What a command prints cannot be written."""


class RegionError(PkernfsError):
    """The region cannot be used: missing, of the wrong kind or size, or the operating system refuses it."""

    exit_code = 1


class RegionBusyError(RegionError):
    """Somebody else holds the lock of the region."""

    errno = _errno.EBUSY


class FormatError(RegionError):
    """The bytes at the start of the region are not a pkernfs region that this version can use."""

    errno = _errno.EINVAL


class CorruptError(PkernfsError):
    """A structure in the region is damaged.

    ``offset`` is where it begins in the region, in bytes; ``ino`` the inode that it belongs to, 0: none; a plain
    int, as Ino is one room up (format.py), which raises these errors.
    """

    errno = _errno.EUCLEAN

    def __init__(self, what: str, offset: int, found: str, *, ino: int = 0) -> None:
        super().__init__(f"{what} at region offset {offset:#x} is damaged: {found}", hint="run fsck.pkernfs")
        self.what = what
        self.offset = offset
        self.found = found
        self.ino = ino


class FsError(PkernfsError):
    """The POSIX result of a filesystem call: any errno, named as in the manual pages."""

    def __init__(self, errno: int, what: str = "") -> None:
        text = f"{what}: {os.strerror(errno)}" if what else os.strerror(errno)
        super().__init__(text)
        self.errno = errno


class MappedError(FsError):
    """A process maps a file's memory, which must not be freed then, or be mapped in another way."""

    def __init__(self, ino: int, holder: str, *, directly: bool = True) -> None:
        super().__init__(
            _errno.EBUSY, f"inode {ino}: mapped {'directly' if directly else 'through the mount'} by {holder}"
        )
