"""A volume: the open region with its decoded objects, and the transactions that change them."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, INODE_SIZE, SUPERBLOCK, Superblock
from pkernfs.fs.allocator import Allocator
from pkernfs.fs.cache import Cache
from pkernfs.fs.charge import charge
from pkernfs.fs.journal import Journal
from pkernfs.fs.memory import secure
from pkernfs.fs.pages import encode_inode
from pkernfs.fs.replies import LastReply
from pkernfs.fs.transaction import Transaction
from pkernfs.region import Region, enable_features, read_superblock, recover_superblock

T = TypeVar("T")

#: errnos that say that a change would take too much, of the region or of a quota
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Volume:
    """An open region: superblock, journal, allocator, inodes.

    Opening makes sure of memory, and replays the journal.  ``sb``: the superblock that mkfs is about to store.

    Raises FormatError, CorruptError; FsError when metadata have no memory: ENOSPC, EIO.
    """

    def __init__(self, region: Region, sb: Superblock | None = None) -> None:
        self.region = region
        self.sb = sb or read_superblock(region, readonly=region.readonly)
        region.secure(0, self.sb.first_block * BLOCK)
        self.journal = Journal(region, self.sb)
        recover_superblock(region, self.sb)
        self.recovered = self.journal.recover()
        self.cache = cache = Cache(region, self.sb)
        secure(region, cache.space)
        self.inode = cache.inode  #: bound here and not a method: one call less in each request
        self.inode_named_by = cache.inode_named_by
        self.inodes, self.nodes, self.pieces = cache.inodes, cache.nodes, cache.pieces
        self.damage, self.space, self.total_pages = cache.damage, cache.space, cache.total_pages
        self.allocator = Allocator(self.space)
        self.replies = LastReply(region)
        self.charges = True  #: False: a repair is at work, which counts anew what the quotas charge
        self.clock: Callable[[], int] = time.time_ns

    # -- transactions ---------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, *, preparing: bool = False) -> Iterator[Transaction]:
        """Everything that is changed inside happens at once at the end, or not at all when an exception leaves.

        ``preparing``: the request at work is not executed by that yet (replies.py).
        """
        if self.cache.in_transaction:
            raise AssertionError("a transaction inside a transaction")
        if self.region.readonly:
            raise FsError(errno.EROFS, "the region is open for reading only")
        self.cache.in_transaction = True
        tx = Transaction(self.cache, preparing=preparing, charges=self.charges)
        try:
            yield tx
            self._commit(tx)
        except BaseException:
            tx.abort()
            raise
        finally:
            self.cache.in_transaction = False

    def compacting(self, change: Callable[[Transaction, bool], T]) -> T:
        """Run ``change(tx, compact)`` in a transaction; when the space runs out with compaction, again without.

        Without, no more is taken than is asked for.  Raises FsError: ENOSPC, EDQUOT.
        """
        try:
            with self.transaction() as tx:
                return change(tx, True)
        except FsError as error:
            if error.errno not in OUT_OF_SPACE:
                raise
        with self.transaction() as tx:
            return change(tx, False)

    def _commit(self, tx: Transaction) -> None:
        if tx.charges:
            charge(tx)
        discards = self.allocator.apply_frees(tx)
        if tx.freed_blocks or tx.freed_pages:
            self.pieces.clear()
        stores = []
        for offset, page in tx.pages.items():
            if page.fresh:
                self.region.store(offset, page.encode())
            else:
                stores.append((offset, page.encode()))
        stores += [(ino * INODE_SIZE, encode_inode(ino, inode)) for ino, inode in tx.inodes.items()]
        if stores and self.replies.key and not tx.preparing:
            self.replies.record(tx, self.replies.key)
            stores += tx.stores
        if stores or tx.words:
            self.journal.commit(stores, discards, tx.words)
        for page in tx.pages.values():
            page.fresh = False

    def enable(self, ro_compat: int) -> None:
        """Switch a feature of the format on, before the first transaction that uses it.  Raises FsError(EROFS)."""
        if self.sb.ro_compat & ro_compat == ro_compat:
            return
        if self.cache.in_transaction:
            raise AssertionError("a feature is switched on within a transaction")
        if self.region.readonly:
            raise FsError(errno.EROFS, "the region is open for reading only")
        self.sb = enable_features(self.region, self.sb, ro_compat)

    # -- facts ----------------------------------------------------------------------------------------------------

    def blocks_without_memory(self) -> int:
        """Free blocks for which the host has no memory now, also for what was lost in use; others may take more."""
        host, space = self.region.host_free(), self.space
        if host is None:
            return 0
        # Free blocks can have memory, where it could not be given back.
        missing = space.blocks * BLOCK - self.region.memory()
        return min(max(-(-(missing - host) // BLOCK), 0), space.free_blocks)

    def physical(self, offset: int) -> int:
        """The physical address of a region offset, bytes."""
        return self.sb.phys_base + offset

    # -- the end --------------------------------------------------------------------------------------------------

    def superblock_word(self, name: str) -> int:
        """The current value of one of the words at the end of the superblock."""
        return self.region.word(SUPERBLOCK.offsets[name])

    def _set_superblock_word(self, name: str, value: int) -> None:
        self.region.store_word(SUPERBLOCK.offsets[name], value)

    def mark_mounted(self) -> None:
        """Count a read-write mount in the superblock's words."""
        self._set_superblock_word("mounts", (self.superblock_word("mounts") + 1) & 0xFFFFFFFFFFFFFFFF)
        self._set_superblock_word("mounted", self.clock())

    def mark_unmounted(self) -> None:
        """Note an orderly end in the superblock's words, and flush."""
        self._set_superblock_word("unmounted", self.clock())
        self.region.flush()
