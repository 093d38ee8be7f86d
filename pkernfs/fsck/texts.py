"""Names and types of files in the lines that people read."""

from __future__ import annotations

import stat

TYPES = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def quoted(name: bytes) -> str:
    """A name in quotes; what is no printable UTF-8 becomes an escape."""
    text = name.decode(errors="backslashreplace")
    if text.isprintable():  # nearly all: a check makes one of these for every name
        return f'"{text}"'
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'


def type_of(mode: int) -> str:
    """The type of an inode with this mode, in words."""
    return TYPES.get(stat.S_IFMT(mode), f"no type ({stat.S_IFMT(mode):o})")
