"""Held files: what may not change until somebody releases it, as the RAM of a guest that is saved and that nobody maps.

As with chattr(1)'s +i nobody, root neither, writes to the file, truncates it, changes its attributes, removes, renames
or replaces any of its names, or gives it another.  It can be read, and what is around it goes on: a directory above it
can be renamed, a quota set.  Why and since when stands in an attribute (format.Hold) that comes and goes with the flag,
in one transaction.

Not guarded: who stores into the region past the mount, as a guest on the direct map or a device that a domain maps the
file for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError, quoted
from pkernfs.format import (
    FLAG_HELD,
    GUARDED,
    HOLD,
    HOLD_NAME,
    HOLD_REASON_MAX,
    INODE,
    INODE_SIZE,
    INODES_PER_PAGE,
    PAGE_INODES,
    PAGES_PER_BLOCK,
    RO_COMPAT_HELD,
    Hold,
    Ino,
    Inode,
)
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Xattrs

FLAGS_AT = INODE.offsets["flags"]


class Held(NamedTuple):
    """What is known of a held file."""

    since: int  #: ns since the epoch
    reason: str


def check_not_held(ino: Ino, inode: Inode) -> None:
    """Raise FsError(EPERM) when nobody may change the inode or its names."""
    if inode.flags & FLAG_HELD:
        raise FsError(errno.EPERM, f"inode {ino} is held, see pkernfs hold --help")


def may_be_held(inode: Inode) -> bool:
    """Whether it is a regular file that is no page tables."""
    return stat.S_ISREG(inode.mode) and not inode.flags & GUARDED


def encode(held: Held) -> bytes:
    """The value of the attribute.  Raises FsError(EINVAL) for a reason of no or too many bytes."""
    try:
        reason = held.reason.encode()
    except UnicodeEncodeError:
        reason = b""
    if not 0 < len(reason) <= HOLD_REASON_MAX or not held.reason.isprintable():
        rule = f"expected a reason of 1 to {HOLD_REASON_MAX} bytes that can be printed"
        raise FsError(errno.EINVAL, f"{rule}, found {quoted(held.reason[:HOLD_REASON_MAX])}")
    return HOLD.pack(Hold(held.since)) + reason


def decode(value: bytes) -> Held:
    """What the attribute says.  Raises ValueError when it has not its form."""
    if not HOLD.size < len(value) <= HOLD.size + HOLD_REASON_MAX:
        raise ValueError(f"{len(value)} bytes")
    try:
        reason = value[HOLD.size :].decode()
    except UnicodeDecodeError:
        reason = "\0"
    if not reason.isprintable():
        raise ValueError("a reason that cannot be printed")
    return Held(HOLD.unpack(value).since, reason)


class Holds:
    """The held files of one volume."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.coming: set[Ino] = set()  #: about to be held: nobody may open them for writing any more

    def check_open(self, ino: Ino, inode: Inode, flags: int) -> None:
        """Raise FsError(EPERM) when a file that is held, or about to be, is to be opened for more than reading."""
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            check_not_held(ino, inode)
            if ino in self.coming:
                raise FsError(errno.EPERM, f"inode {ino} is about to be held")

    def of(self, ino: Ino, inode: Inode) -> Held | None:
        """Since when and why an inode is held; None: it is not.  Raises CorruptError."""
        if not inode.flags & FLAG_HELD:
            return None
        xattrs = Xattrs(self.volume, ino, inode)
        attribute = xattrs.find(HOLD_NAME)
        if attribute is None:
            raise corrupt_inode(ino, "a held file without a record of why")
        try:
            return decode(xattrs.value(attribute))
        except ValueError as error:
            raise corrupt_inode(ino, f"a record of why it is held of {error}") from None

    def hold(self, ino: Ino, reason: str) -> bool:
        """Hold a file; False: it was held already, for the same reason.

        Raises FsError: EINVAL (no regular file; the reason), ENOENT (no name any more), EEXIST (held for another
        reason), EROFS, ENOSPC, EDQUOT.
        """
        inode = self.volume.inode(ino)
        held = Held(self.volume.clock(), reason)
        value = encode(held)
        if not may_be_held(inode):
            raise FsError(errno.EINVAL, f"inode {ino}: expected a regular file, that is no page tables")
        if not inode.nlink:
            raise FsError(errno.ENOENT, f"inode {ino} has no name any more")
        before = self.of(ino, inode)
        if before is not None:
            if before.reason == reason:
                return False
            raise FsError(errno.EEXIST, f"inode {ino} is held already, for {quoted(before.reason)}")
        self.volume.enable(RO_COMPAT_HELD)
        with self.volume.transaction() as tx:
            put(tx, self.volume, ino, held, value)
        return True

    def release(self, ino: Ino) -> bool:
        """Let a file go; False: it was not held.  Raises FsError: EROFS."""
        if not self.volume.inode(ino).flags & FLAG_HELD:
            return False
        with self.volume.transaction() as tx:
            drop(tx, self.volume, ino)
        return True

    def all(self) -> Iterator[Ino | None]:
        """The inodes that are held, in no order; None now and then: others may be served, and change what there is."""
        volume = self.volume
        if not volume.sb.ro_compat & RO_COMPAT_HELD:
            return
        for block in volume.space.slab_blocks():
            yield None
            try:
                slab = volume.space.slab(block)
            except CorruptError:  # another one by now, or damaged, which is told elsewhere
                continue
            for index in [index for index, kind in enumerate(slab.kinds) if kind == PAGE_INODES]:
                first = (block * PAGES_PER_BLOCK + index) * INODES_PER_PAGE
                for slot in range(INODES_PER_PAGE):
                    at = (first + slot) * INODE_SIZE + FLAGS_AT
                    held = volume.region.view[at] & FLAG_HELD  # little-endian: the low byte stands first
                    if held and volume.space.inode_in_use(Ino(first + slot)):
                        yield Ino(first + slot)


def put(tx: Transaction, volume: Volume, ino: Ino, held: Held, value: bytes) -> None:
    """Hold an inode within a transaction; ``value``: ``held`` encoded."""
    xattrs = Xattrs(volume, ino, volume.inode(ino))
    xattrs.set(tx, HOLD_NAME, value)
    inode = xattrs.finish(held.since)
    tx.put_inode(ino, inode._replace(flags=inode.flags | FLAG_HELD))


def drop(tx: Transaction, volume: Volume, ino: Ino) -> None:
    """Let an inode go within a transaction."""
    xattrs = Xattrs(volume, ino, volume.inode(ino))
    attribute = xattrs.find(HOLD_NAME)
    if attribute is not None:
        xattrs.remove(tx, attribute)
    inode = xattrs.finish(volume.clock())
    tx.put_inode(ino, inode._replace(flags=inode.flags & ~FLAG_HELD))
