"""FUSE's side of the reply cache (fs/replies.py): by what a request is known again, and how it is answered then.

The keeper lets the kernel deliver again what the worker before has read and not answered, and relays it (relay.py).
"""

from __future__ import annotations

import os
from typing import Any, Final

from pkernfs.format import Ino, checksum
from pkernfs.fs.filesystem import Filesystem
from pkernfs.server.attributes import Attributes
from pkernfs.server.device import REQUEST, RESENT, SETXATTR, SETXATTR_FLAGS_AT

#: Requests that make an inode.
MAKING: Final = {"mknod", "mkdir", "symlink", "create"}
#: Requests by which the kernel comes to refer to inodes, or that would fail, or do harm, when they are executed a
#: second time; and how many of their arguments tell one from another: not who asks.  setxattr without the value: it is
#: asked for by name only, see hides_xattr.
KEYED: Final = {
    **{"lookup": 2, "readdir": 2, "link": 3, "unlink": 2, "rmdir": 2, "rename": 4, "setxattr": 2, "removexattr": 2},
    **{"mknod": 4, "mkdir": 3, "symlink": 3, "create": 4},
}
#: Those that may be executed a second time, but count references.
COUNTING: Final = {"lookup", "readdir"}


def request_key(name: str, args: tuple[Any, ...]) -> int:
    """The key of a request of KEYED; not 0.  Not to be changed: the next worker may be of the next version."""
    return checksum(f"('{name}', {args[: KEYED[name]]!r})".encode()) | 1 << 32


class Replay:
    """The requests of one worker, as its session loop and its handlers tell of them."""

    def __init__(self, fs: Filesystem, attributes: Attributes) -> None:
        self.fs = fs
        self.attributes = attributes
        self.lookups, self.replies = fs.lookups, fs.volume.replies
        #: all requests so far are answered, but for those that wait for space, which have changed nothing
        self.before_read = self.replies.clear
        self.creates_again = False  #: a setxattr(2) comes again, that must not find the attribute

    def relayed(self, header: bytes) -> None:
        """A request comes from the keeper; ``header``: its first bytes, b"" after the last one."""
        if not header:
            self.creates_again = False
            self.replies.end_replay()
            return
        request = REQUEST.unpack(header)
        self.replies.replayed = replayed = bool(request.unique & RESENT)
        # pyfuse3 looks at the flags of setxattr(2) itself, before it calls the handler.
        setxattr = replayed and request.opcode == SETXATTR
        self.creates_again = setxattr and bool(header[SETXATTR_FLAGS_AT] & os.XATTR_CREATE)

    def begin(self, name: str, args: tuple[Any, ...]) -> bool:
        """A request of KEYED begins; True: the worker before has executed it, and it is to be answered with ``reply``.

        Until ``replies.end`` the transactions are this request's.
        """
        key = request_key(name, args)
        self.lookups.begin(key, replayed=self.replies.replayed)
        return name not in COUNTING and self.replies.begin(key) is not None

    def reply(self, name: str, args: tuple[Any, ...]) -> Any:
        """The answer to a request that was executed by the worker before, made of what is there.

        Raises PkernfsError.
        """
        if name == "link":
            return self.attributes.found(args[0])
        if name not in MAKING:
            return None
        entry = self.attributes.found(self.fs.lookup(args[0], args[1]))
        return (self.attributes.opened(Ino(entry.st_ino), args[3], args[4].uid), entry) if name == "create" else entry

    def hides_xattr(self, ino: Ino, name: bytes) -> bool:
        """Whether an attribute is to be missing: setxattr(XATTR_CREATE) comes again, which has made it.

        pyfuse3 asks for the attribute before it calls the handler, and would give EEXIST.
        """
        return self.creates_again and self.replies.unanswered == request_key("setxattr", (ino, name))
