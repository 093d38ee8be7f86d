"""While no worker can open the region: requests fail with EIO, so that nobody waits for ever, and umount works.

A region can be unusable for a time, or for good: a file that was cut below the mount, a disk that fails, memory that is
bad, a host that has no memory for metadata.  A worker finds that out when it opens the region, and says so.  One that
says it might have met something that is over when the next one looks; when two have said so, requests are answered
here, until one of those that are started again and again can open it.

What the kernel gives up is counted meanwhile (FORGET needs no answer): the next worker frees what nobody refers to.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from contextlib import suppress
from typing import NamedTuple, Protocol

from pkernfs.format import Ino
from pkernfs.fs.lookups import Lookups
from pkernfs.layout import layout, u64
from pkernfs.server.child import RegionLostError
from pkernfs.server.device import BATCH_FORGET, FORGET, REQUEST, WITHOUT_REPLY, Device
from pkernfs.server.relay import fail_before
from pkernfs.server.resources import REFUSALS, poll

log = logging.getLogger("pkernfs")

#: Not of the region but of the host, and for a moment: everybody waits.
RESOURCES = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
PATIENCE = 2  #: workers that say so, one after the other, before requests fail


class References(NamedTuple):
    """What a BATCH_FORGET has of each inode (of a FORGET ``nodeid`` is in the header)."""

    nodeid: u64
    lookups: u64


REFERENCES = layout(References, size=16)


class Woken(Protocol):
    """What else ends a wait."""

    def fileno(self) -> int:
        """Readable when there is something."""


class Refusing:
    """Of one mount.  ``region``, ``references``: descriptors."""

    def __init__(self, region: int, references: int) -> None:
        self.why = ""  #: why requests fail; "": they do not
        self._region = region
        self._references = references
        self._times = 0  #: workers that could not open the region, one after the other
        self._refused = 0  #: requests so far
        self._resent = False  #: the kernel delivers again what dead workers have left
        self._size = os.fstat(region).st_size
        self._lookups: Lookups | None = None

    def note(self, error: Exception, device: Device) -> None:
        """A worker has failed."""
        if not isinstance(error, RegionLostError) or error.errno in RESOURCES:
            return
        self._times += 1
        if self._times >= PATIENCE and self.why != error.text:
            self.why = error.text
            log.error("requests fail with EIO until the region can be used again: %s", error.text)
        if self.why and not self._resent:
            self._resent = device.resend()

    def end(self) -> None:
        """A worker serves."""
        if self.why:
            log.warning("the region can be used again; %d requests have failed with EIO", self._refused)
        self.why, self._times, self._refused, self._resent = "", 0, 0, False

    def serve(self, device: Device, wakeup: Woken, seconds: float) -> bool:
        """Answer what comes within ``seconds``, until ``wakeup`` has something; at once, where requests do not fail.

        Whether the file has another size now: it may be whole again.  Raises ConnectionAbortedError at the mount's end.
        """
        if self.why:
            poll([wakeup.fileno(), device.fd], seconds)
            with suppress(MemoryError):  # for the request: it waits
                while device.readable():
                    self._answer(device, device.read())
        before, self._size = self._size, os.fstat(self._region).st_size
        return bool(self.why) and self._size != before

    def _answer(self, device: Device, raw: bytes) -> None:
        request = REQUEST.unpack(raw)
        if not self._resent:  # Linux before 6.9: its number tells which ones may be lost
            fail_before(device, request.unique)
            self._resent = True
        if request.opcode not in WITHOUT_REPLY:
            device.fail(request.unique, errno.EIO)
            self._refused += 1
        elif request.opcode == FORGET:
            self._drop(request.nodeid, REFERENCES.unpack(raw, REQUEST.size - 8).lookups)
        elif request.opcode == BATCH_FORGET:
            count = int.from_bytes(raw[REQUEST.size : REQUEST.size + 4], "little")
            for number in range(count):
                self._drop(*REFERENCES.unpack(raw, REQUEST.size + 8 + REFERENCES.size * number))

    def _drop(self, nodeid: int, count: int) -> None:
        with suppress(*REFUSALS):  # what is not counted is freed at the end of the mount
            self._lookups = self._lookups or Lookups(0, mmap.mmap(self._references, 0))
            self._lookups.drop(Ino(nodeid), count)
