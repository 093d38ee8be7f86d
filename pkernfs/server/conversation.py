"""What the two control sockets share: who may talk, what a line asks for, when it is over.

The worker's socket (control.py) is served by trio beside FUSE, the keeper's (commands.py) by threads, because the
keeper waits for things in ways that trio does not know.  Both read and write bytes; all that these mean is here.
"""

from __future__ import annotations

import errno
from typing import Any, Final

from pkernfs.api import VERBS, Request, Server
from pkernfs.codec import Lines, decode_request
from pkernfs.errors import FsError, PkernfsError
from pkernfs.sockets import CONNECTIONS, Peer, check_owner

CHUNK: Final = 1 << 16  #: bytes that are received at once


class Conversation:
    """One connection.  ``open_now``: how many there are, with this one."""

    def __init__(self, connection: Peer, server: Server, open_now: int) -> None:
        self.server = server
        self.over = False  #: nothing that comes is read any more
        self.uid = -1  #: who asks
        self._lines = Lines()
        self._refusal: PkernfsError | None = None
        try:
            self.uid = check_owner(connection)
            if open_now > CONNECTIONS:
                raise FsError(errno.EAGAIN, f"{CONNECTIONS} connections are open")
        except PkernfsError as error:
            self._refusal = error

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._lines.feed(data)

    def next(self) -> Request[Any] | PkernfsError | None:
        """The next request, or why it is refused; None: more must be received first."""
        if self._refusal is not None:
            self.over = True
            return self._refusal
        try:
            line = self._lines.next()
        except PkernfsError as error:
            self.over = True
            return error
        if line is None:
            return None
        try:
            request = decode_request(line, self.server)
            if self.uid and VERBS[str(request.__struct_config__.tag)].root:
                raise FsError(errno.EPERM, f"{request.__struct_config__.tag}: user {self.uid} is not root")
        except PkernfsError as error:
            return error
        return request
