"""Names of extended attributes: which namespaces there are, and user.pkernfs.*, facts that nobody can change."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from typing import Final

from pkernfs.errors import FsError, quoted
from pkernfs.format import Ino
from pkernfs.fs.filesystem import Filesystem

FACTS: Final = b"user.pkernfs."
#: Those of xattr(7) that are for users.  Not system: POSIX ACLs would need the kernel to leave the umask to us
#: (FUSE_DONT_MASK), which pyfuse3 cannot ask for.
NAMESPACES: Final = (b"user", b"trusted", b"security")
ROOT_ONLY: Final = b"trusted."  #: only root gets to see that there are such names; the kernel checks the rest


def _called(name: bytes) -> str:
    return f"extended attribute {quoted(name)}"


def check_namespace(name: bytes) -> None:
    """Raise FsError(EOPNOTSUPP) for a name in another namespace, EINVAL for one that is a namespace only."""
    namespace, _, rest = name.partition(b".")
    if namespace not in NAMESPACES:
        raise FsError(errno.EOPNOTSUPP, f"{_called(name)} is in no namespace that is served")
    if not rest:
        raise FsError(errno.EINVAL, f"{_called(name)} has no name behind its namespace")


def check_changeable(name: bytes) -> None:
    """As check_namespace, and raise FsError(EPERM) for a fact."""
    if name.startswith(FACTS):
        raise FsError(errno.EPERM, f"{_called(name)} is a fact of the file, and cannot be set")
    check_namespace(name)


def visible(names: list[bytes], uid: int) -> list[bytes]:
    """Those that listxattr(2) shows to a user.

    Facts are never listed: a copy of the file would take them along.  Nor are our own (HOLD_NAME), in no namespace.
    """
    return [
        name for name in names if name.partition(b".")[0] in NAMESPACES and (uid == 0 or not name.startswith(ROOT_ONLY))
    ]


class Facts:
    """The attributes user.pkernfs.*: of the mount (the same at each inode), and of a file's memory.

    ``of_mount``: those of the mount, when they are asked for.
    """

    def __init__(self, fs: Filesystem, of_mount: Callable[[], dict[str, object]]) -> None:
        self.fs = fs
        self.of_mount = of_mount

    def value(self, ino: Ino, name: bytes, uid: int) -> bytes:
        """For the owner of the mount and root only, as the control socket is.  Raises FsError: EPERM, ENODATA."""
        if uid not in (0, os.getuid()):
            raise FsError(errno.EPERM, f"{_called(name)} is for root and the owner of the mount")
        fact = name.removeprefix(FACTS).decode("ascii", "replace")
        facts = self.of_mount()
        if fact in facts:
            return str(facts[fact]).encode(errors="surrogateescape")
        of_file = self._of_file(ino) if stat.S_ISREG(self.fs.getattr(ino).mode) else {}
        if fact not in of_file:
            raise FsError(errno.ENODATA, f"{_called(name)} is no fact of inode {ino}")
        return json.dumps(of_file[fact]).encode()

    def _of_file(self, ino: Ino) -> dict[str, object]:
        from pkernfs.api import to_builtins  # late, as the control protocol is (worker.py)
        from pkernfs.fs.facts import file_facts

        found: dict[str, object] = to_builtins(file_facts(self.fs, ino))
        del found["mapped_by"]  # found out by asking, in a thread (mappers.py)
        return found
