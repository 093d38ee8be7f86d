"""Requests that come again after a takeover: which, by what they are known, and how they are answered.

The keeper lets the kernel deliver again what the worker before has read and not answered, and relays it.  Most requests
are simply executed again.  Those in KEYED have a key, a checksum of what they ask for, which is stored together with
what they change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pkernfs.format import checksum
from pkernfs.fs.filesystem import Filesystem
from pkernfs.server.attributes import Attributes
from pkernfs.server.device import REQUEST, RESENT, SETXATTR, SETXATTR_FLAGS_AT

#: Requests that make an inode.
MAKING = {"mknod", "mkdir", "symlink", "create"}
#: Requests by which the kernel comes to refer to inodes, or that would fail, or do harm, when they are executed a
#: second time; and how many of their arguments tell one from another.  setxattr without the value: it is asked for by
#: name only, see hides_xattr.
KEYED = {
    **{"lookup": 2, "readdir": 2, "link": 3, "unlink": 2, "rmdir": 2, "rename": 4, "setxattr": 2, "removexattr": 2},
    **{"mknod": 4, "mkdir": 3, "symlink": 3, "create": 4},
}
#: Those that may be executed a second time, but count references.
TWICE = {"lookup", "readdir"}


def request_key(name: str, args: tuple[Any, ...]) -> int:
    """A number, not 0, by which the next worker knows a request again."""
    return checksum(repr((name, args[: KEYED[name]])).encode()) | 1 << 32


class Replay:
    """What a worker knows of the requests that the one before has not answered.  The loop tells it of each request."""

    def __init__(self, fs: Filesystem, attributes: Attributes) -> None:
        self.fs = fs
        self.attributes = attributes
        self.again = False  #: the request that is read next comes again
        self.creates_again = False  #: and it is a setxattr(2) that must not find the attribute

    def before_read(self) -> None:
        """All requests so far are answered, but for those that wait for space, which have changed nothing."""
        self.fs.volume.answered()

    def relayed(self, header: bytes) -> None:
        """A request comes from the keeper; ``header``: its first bytes, b"" after the last one.

        What comes again was not answered by the worker before.
        """
        if not header:
            self.fs.volume.forget_inherited()
        request = REQUEST.unpack(header) if header else None
        self.again = request is not None and bool(request.unique & RESENT)
        # pyfuse3 looks at the flags of setxattr(2) itself, before it calls the handler.
        setxattr = self.again and request is not None and request.opcode == SETXATTR
        self.creates_again = setxattr and bool(header[SETXATTR_FLAGS_AT] & os.XATTR_CREATE)

    def begin(self, name: str, args: tuple[Any, ...]) -> bool:
        """A request of KEYED begins; True: the worker before has executed it, and it is to be answered with ``reply``.

        Until ``end`` the transactions are this request's.
        """
        volume = self.fs.volume
        key = request_key(name, args)
        self.fs.lookups.begin(key, again=self.again)
        if self.again and key == volume.inherited:
            volume.take_inherited()
            return True
        if name not in TWICE:
            volume.asked = key
        return False

    def end(self) -> None:
        """The request is done, and is answered next."""
        self.fs.volume.asked = 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The request waits: others come in between."""
        volume = self.fs.volume
        key, volume.asked = volume.asked, 0
        yield
        volume.asked = key

    def reply(self, name: str, args: tuple[Any, ...]) -> Any:
        """The answer to a request that was executed by the worker before, made of what is there.

        Raises PkernfsError.
        """
        if name == "link":
            return self.attributes.found(args[0])
        if name not in MAKING:
            return None
        entry = self.attributes.found(self.fs.lookup(args[0], args[1]))
        return (self.attributes.opened(entry.st_ino, args[3], args[4].uid), entry) if name == "create" else entry

    def hides_xattr(self, ino: int, name: bytes) -> bool:
        """Whether an attribute is to be missing: setxattr(XATTR_CREATE) comes again, which has made it.

        pyfuse3 asks for the attribute before it calls the handler, and would give EEXIST.
        """
        return self.creates_again and self.fs.volume.inherited == request_key("setxattr", (ino, name))
