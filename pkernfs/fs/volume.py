"""A volume: the open region with its decoded objects, and the transactions that change them."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, INODE_SIZE, PAGE, SUPERBLOCK, Inode, Superblock
from pkernfs.fs.allocator import Allocator
from pkernfs.fs.charge import charge
from pkernfs.fs.damage import Damage, corrupt_inode
from pkernfs.fs.journal import ASKED, Journal
from pkernfs.fs.pages import Page, check_inode, read_inode, seal_inode
from pkernfs.region import Region, read_superblock

CACHED_INODES = 65536  #: decoded inodes kept
CACHED_NODES = 8192  #: decoded tree nodes kept


class Transaction:
    """What one transaction has changed so far."""

    def __init__(self, preparing: bool = False) -> None:
        self.preparing = preparing
        self.pages: dict[int, Page] = {}  #: by offset
        self.inodes: dict[int, Inode] = {}
        self.before: dict[int, Inode] = {}  #: what those were; a free slot has mode 0
        self.freed_blocks: list[tuple[int, int]] = []  #: (block, count)
        self.freed_pages: list[tuple[int, int]] = []  #: (page, count)
        self.freed_inodes: list[int] = []
        self.words: list[tuple[int, bytes]] = []  #: (offset, data): stored last, word by word, in order
        self.undo: list[Callable[[], None]] = []


class Volume:
    """An open region: superblock, journal, allocator, inodes.

    Opening replays the journal.  ``sb``: the superblock that mkfs is about to store.  Raises FormatError, CorruptError.
    """

    def __init__(self, region: Region, sb: Superblock | None = None) -> None:
        self.region = region
        self.sb = sb or read_superblock(region, readonly=region.readonly)
        self.journal = Journal(region, self.sb)
        self.recovered = self.journal.recover()
        self.inodes: dict[int, Inode] = {}
        self.nodes: dict[int, Page] = {}
        #: by file: the piece of it that was found last: from byte, to byte, and the distance from the file's bytes to
        #: the region's.  Nothing that a transaction has changed or freed is in here.
        self.pieces: dict[int, tuple[int, int, int]] = {}
        self.tx: Transaction | None = None
        self.total_pages = self.sb.blocks * BLOCK // PAGE
        self.damage = Damage()
        self.allocator = Allocator(self)
        self.tables_checked: set[int] = set()  #: domains whose tables were found in pages that are marked as used
        self.asked = 0  #: names the request at work, if it must not be executed twice
        self.unanswered = False
        self.inherited = self.superblock_word("asked")  #: of the server before: names its last request
        self.charges = True  #: False: a repair is at work, which counts anew what the quotas charge
        self.clock: Callable[[], int] = time.time_ns

    # -- transactions ---------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, *, preparing: bool = False) -> Iterator[Transaction]:
        """Everything that is changed inside happens at once at the end, or not at all when an exception leaves.

        ``preparing``: the request at work is not done with that yet (``asked``).
        """
        if self.tx is not None:
            raise AssertionError("a transaction inside a transaction")
        if self.region.readonly:
            raise FsError(errno.EROFS, "the region is open for reading only")
        tx = self.tx = Transaction(preparing)
        try:
            yield tx
            self._commit(tx)
        except BaseException:
            self._abort(tx)
            raise
        finally:
            self.tx = None

    def _commit(self, tx: Transaction) -> None:
        if self.charges:
            charge(self, tx)
        discards = self.allocator.apply_frees(tx)
        if tx.freed_blocks or tx.freed_pages:
            self.pieces.clear()
        stores = []
        for offset, page in tx.pages.items():
            if page.fresh:
                self.region.store(offset, page.encode())
            else:
                stores.append((offset, page.encode()))
        stores += [(ino * INODE_SIZE, seal_inode(ino, inode)) for ino, inode in tx.inodes.items()]
        if stores and self.asked and not tx.preparing:
            stores.append((ASKED.offset, self.asked.to_bytes(8, "little")))
            self.unanswered = True
        if stores or tx.words:
            self.journal.commit(stores, discards, tx.words)
        for page in tx.pages.values():
            page.fresh = False

    def trim(self) -> None:
        """Keep no more decoded objects than there is room for; while a transaction is open it may need them all."""
        if self.tx is None:
            if len(self.inodes) > CACHED_INODES:
                self.inodes.clear()
                self.pieces.clear()
            if len(self.nodes) > CACHED_NODES:
                self.nodes.clear()

    def _abort(self, tx: Transaction) -> None:
        """Forget what was decoded and changed: the region still holds the state before."""
        self.pieces.clear()
        for offset in tx.pages:
            self.nodes.pop(offset, None)
        for ino in tx.inodes:
            self.inodes.pop(ino, None)
        self.allocator.forget(tx)
        for undo in reversed(tx.undo):
            undo()

    def change(self, page: Page) -> None:
        """Note that the open transaction changes ``page``: to be called before it is changed."""
        assert self.tx is not None
        self.tx.pages[page.offset] = page

    # -- inodes ---------------------------------------------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """The inode, which must be in use.  Raises FsError(ESTALE) when it is not, CorruptError when it is damaged."""
        inode = self.inodes.get(ino)
        if inode is None:
            self.trim()
            if not self.allocator.inode_in_use(ino):
                raise FsError(errno.ESTALE, f"inode {ino}")
            inode = read_inode(self.region, ino)
            if not inode.mode:
                raise FsError(errno.ESTALE, f"inode {ino}")
            check_inode(ino, inode, self.total_pages)
            self.inodes[ino] = inode
        return inode

    def inode_named_by(self, owner: int, ino: int) -> Inode:
        """The inode that something of inode ``owner`` names.  Raises CorruptError, of the owner when it is free."""
        try:
            return self.inode(ino)
        except FsError:
            found = f"it names inode {ino:#x}, which is free"
            raise corrupt_inode(owner, found) from None

    def put_inode(self, ino: int, inode: Inode) -> None:
        """Change an inode within the open transaction.  Raises FsError(EROFS) when it was found damaged."""
        assert self.tx is not None
        self.damage.check_changeable(ino)
        self._keep_before(self.tx, ino)
        self.pieces.pop(ino, None)
        self.inodes[ino] = inode
        self.tx.inodes[ino] = inode

    def _keep_before(self, tx: Transaction, ino: int) -> None:
        if self.charges and ino not in tx.before:
            tx.before[ino] = self.inodes.get(ino) or read_inode(self.region, ino)

    def free_inode(self, ino: int, inode: Inode) -> None:
        """Empty the slot and free it when the open transaction commits."""
        assert self.tx is not None
        self._keep_before(self.tx, ino)
        self.pieces.pop(ino, None)
        self.inodes.pop(ino, None)
        self.tx.inodes[ino] = inode._replace(mode=0, nlink=0, size=0, pages=0, root=0, xattrs=0, inline=b"")
        self.allocator.free_inode_later(ino)

    def put_word(self, ino: int, inode: Inode, at: int, value: int) -> None:
        """Store one of the words at the start of a slot in place; ``inode`` is the record that has it already.

        Inside a transaction that changes the inode too, the transaction carries it.
        """
        self.inodes[ino] = inode
        if self.tx is not None and ino in self.tx.inodes:
            self.tx.inodes[ino] = inode
        else:
            self.region.store_word(ino * INODE_SIZE + at, value & 0xFFFFFFFFFFFFFFFF)

    # -- the end --------------------------------------------------------------------------------------------------

    def superblock_word(self, name: str) -> int:
        """The current value of one of the words at the end of the superblock."""
        return self.region.word(SUPERBLOCK.offsets[name])

    def _set_superblock_word(self, name: str, value: int) -> None:
        self.region.store_word(SUPERBLOCK.offsets[name], value)

    def answered(self) -> None:
        """The last request that was executed is answered."""
        if self.unanswered:
            self.unanswered = False
            self._set_superblock_word("asked", 0)

    def take_inherited(self) -> None:
        """What the server before had executed is about to be answered."""
        self.inherited = 0
        self.unanswered = True

    def forget_inherited(self) -> None:
        """The server before had answered all that it had executed."""
        if self.inherited and not self.region.readonly:
            self.take_inherited()
            self.answered()

    def mark_mounted(self) -> None:
        """Count a read-write mount in the superblock's words."""
        self._set_superblock_word("mounts", (self.superblock_word("mounts") + 1) & 0xFFFFFFFFFFFFFFFF)
        self._set_superblock_word("mounted", self.clock())

    def mark_unmounted(self) -> None:
        """Note an orderly end in the superblock's words, and flush."""
        self._set_superblock_word("unmounted", self.clock())
        self.region.flush()
