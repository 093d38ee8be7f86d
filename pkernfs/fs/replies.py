"""Exactly once: the reply cache.  NFSD's term is duplicate request cache (fs/nfsd/nfscache.c).

Whoever has sent a request and got no reply, because the worker was killed, sends it again: the kernel its FUSE requests
(FUSE_NOTIFY_RESEND, since Linux 6.9), a client of the control socket its verb.  Most requests can simply be executed
again: a read, a write at an offset, a setattr.  A second mkdir fails with EEXIST, a second unmap with ENOENT, and a
second rename or unlink may hit what another has put there meanwhile.  So what such a request changes is committed
together with its key, in one transaction: when the key is there the request was executed, else nothing of it was.

**Key.**  A number that is not 0.  A client of the control socket draws one for each call, and sends it again with it.
Of a FUSE request it is a checksum of its name and the arguments that tell it from another one (server/replay.py), with
bit 32 set.  FUSE's own number of a request, ``unique``, would be the natural key, as it stays the same (but for bit 63)
when the request comes again: but pyfuse3 3.5 does not hand it to handlers, and the keeper, which reads it, sees only
what comes again, never what the worker has read from the device.  A pyfuse3 that shows it would change this.
The checksum is enough, as it is compared only when the kernel says that a request comes again (bit 63), and only with
the one that was executed last: what could be taken for another one is a request that asks for the same, sent at the
same time by somebody else, and either of the two might have been the first.

**Reply.**  As little as cannot be seen in the region: of a FUSE request nothing (the reply to a mkdir is the directory
that is there), of a control verb one number, as how many bytes were unmapped.

**Where it stands, and what dies when.**

    what ends         FUSE: LastReply                             control verbs: RecordedReplies
                      a word of the superblock, one slot          records beside other records, 64 slots
    a worker          the next one finds the key, and executes    the next one finds the record when the
                      all that comes again but that one           client sends its verb again
    the keeper        nothing: the worker goes on                 nothing
    the mount         no request comes again, the kernel has      no client waits for longer than 5 s: the
                      failed them: the first worker clears it     first worker drops all records
    the kernel        as with the mount                           as with the mount

One slot is enough for FUSE because handlers do not await (server/requests.py): of all that a worker has read at most
the last request is executed and not answered, and before it reads another one the word is cleared (``clear``): one
store of 8 bytes, so that the same request, sent anew, is executed.  Nobody can say when the reply to a verb has arrived
(the client may be killed too), so its record stays until another key needs the slot.  Slots stand where the verbs'
other changes do, so that the transaction is the same; the superblock has no room for 64.

How often the kernel refers to an inode is counted outside the region and without a transaction.  The reply that tells
it of an inode may be lost too: so what a request at work has counted is noted, and taken back when it comes again
(fs/lookups.py).

**Not guaranteed.**

- A request that waits for space and comes again before the one that was executed overwrites its key: when that worker
  is killed too, before the second has come, the second is executed twice.  Three deaths within a millisecond or so.
- Before Linux 6.9 nothing comes again: the kernel fails a request with EIO that may have been executed.
- A verb whose slot was needed by another one before it is sent again (keys are drawn at random: 1 in 64 for each verb
  between them), or that is sent again to the next mount of the region within its 5 s, is executed again.
- A FORGET that a killed worker had read is lost, as it has no reply: what it would have freed is freed when the mount
  ends.
- A power cut on a medium that loses unflushed stores: but then nobody is left who could send anything again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

from pkernfs.format import REQUEST, Request
from pkernfs.fs.journal import REPLY_KEY
from pkernfs.fs.transaction import Transaction
from pkernfs.layout import Layout
from pkernfs.region.base import Region

R = TypeVar("R", bound=NamedTuple)


class ReplyCache(ABC):
    """Which requests were executed, and what their results are."""

    @abstractmethod
    def begin(self, key: int) -> int | None:
        """The result of a request that comes again and was executed; None: it is to be executed."""

    @abstractmethod
    def record(self, tx: Transaction, key: int, result: int = 0) -> None:
        """The transaction executes the request: both happen, or none."""


class LastReply(ReplyCache):
    """One slot, a word of the superblock: for requests that come one after the other, each when the last is answered.

    Between ``begin`` and ``end`` every transaction that is not ``preparing`` records the request.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.replayed = False  #: the request that begins next was delivered to the worker before, which did not answer
        self.unanswered = region.word(REPLY_KEY.offset)  #: what that worker has executed; 0: nothing, or it was found
        self.key = 0  #: of the request at work
        self._stands = False  #: the word names a request that this worker executes, or answers

    def begin(self, key: int) -> int | None:
        """The result, always 0, of a request that comes again and was executed; None: it is to be executed."""
        if self.replayed and key == self.unanswered:
            self.unanswered = 0
            self._stands = True
            return 0
        self.key = key
        return None

    def end(self) -> None:
        """The request at work is executed, or has failed: it is answered next."""
        self.key = 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The request at work has changed nothing, and waits: others come in between."""
        key, self.key = self.key, 0
        yield
        self.key = key

    def record(self, tx: Transaction, key: int, result: int = 0) -> None:  # noqa: ARG002  # other caches keep it
        """The transaction executes the request: both happen, or none."""
        tx.stores.append((REPLY_KEY.offset, key.to_bytes(8, "little")))
        self._stands = True

    def clear(self) -> None:
        """All requests that have ended are answered."""
        if self._stands:
            self._stands = False
            self.region.store_word(REPLY_KEY.offset, 0)

    def end_replay(self) -> None:
        """Nothing comes again any more: what the worker before had executed it had answered too."""
        self.replayed = False
        if self.unanswered and not self.region.readonly:
            self.unanswered = 0
            self.region.store_word(REPLY_KEY.offset, 0)


class Records(Protocol):
    """A tree of records in the region."""

    def record(self, layout: Layout[R], key: int) -> R | None:
        """The record of a key, if there is one."""

    def put(self, tx: Transaction, key: int, value: bytes) -> None:
        """Insert or replace."""

    def delete(self, tx: Transaction, key: int) -> None:
        """Remove one that is there."""

    def scan(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(key, value) from ``first`` to ``last``."""


class RecordedReplies(ReplyCache):
    """``slots`` slots, the records from ``first`` on: for requests of clients that know nothing of one another.

    A request stands in the slot of its key modulo ``slots``.  Key 0: nobody sends the request again.
    """

    def __init__(self, records: Records, first: int, slots: int) -> None:
        self.records = records
        self.first = first
        self.slots = slots

    def begin(self, key: int) -> int | None:
        """The result of a request that comes again and was executed; None: it is to be executed."""
        last = self.records.record(REQUEST, self.first + key % self.slots) if key else None
        return last.result if last and last.key == key else None

    def record(self, tx: Transaction, key: int, result: int = 0) -> None:
        """The transaction, which finishes the records, executes the request: both happen, or none."""
        if key:
            self.records.put(tx, self.first + key % self.slots, REQUEST.pack(Request(key, result)))

    def any(self) -> bool:
        """Whether there are replies."""
        return any(True for _ in self.records.scan(self.first, self.first + self.slots - 1))

    def drop(self, tx: Transaction) -> None:
        """Nobody sends any of them again."""
        for key, _ in list(self.records.scan(self.first, self.first + self.slots - 1)):
            self.records.delete(tx, key)
