"""A guest's memory, made in one step: a file of its whole size, in one piece of the region where that is asked for."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from pkernfs.errors import FsError, quoted
from pkernfs.format import BLOCK, MAX_FILE_SIZE, PAGE, PAGES_PER_BLOCK, Ino, PageNo
from pkernfs.fs.charge import check_room
from pkernfs.fs.chunks import allocate
from pkernfs.fs.filemap import FIRST, FileMap, end_of
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import OUT_OF_SPACE


def create_ram(
    fs: Filesystem,
    parent: Ino,
    name: bytes,
    size: int,
    mode: int,
    owner: Caller,
    *,
    fragmented: bool = False,
    executed: Callable[[Transaction, Ino], object] | None = None,
) -> Ino:
    """A new file of ``size`` bytes of zeros, all of them allocated; within one transaction, with ``executed``.

    In one piece of whole blocks, or with ``fragmented`` as it comes.  ``mode``: its permissions; ``owner`` counts in a
    directory with the set-group-ID bit too.  Raises FsError: EINVAL (size, mode), EEXIST, ENOSPC (also when the space
    is there, but not in one piece), EDQUOT, EPERM in iommu/, and what ``Names.create`` raises.
    """
    if size <= 0 or size % PAGE:
        raise FsError(errno.EINVAL, f"expected a size that is a multiple of {PAGE}, found {size}")
    if mode & ~0o7777:
        raise FsError(errno.EINVAL, f"expected permissions, found {mode:#o}")
    if size > MAX_FILE_SIZE:
        raise FsError(errno.EFBIG, f"expected a size of at most {MAX_FILE_SIZE}, found {size}")
    volume = fs.volume
    if fs.guard.flags_of_new(volume.inode(parent), stat.S_IFREG):
        raise FsError(errno.EPERM, f"{quoted(name)}: in iommu/ are page tables")
    if size > volume.region.size:
        raise FsError(errno.ENOSPC, f"{size} bytes in a region of {volume.region.size}")

    def make(*, compact: bool) -> Ino:
        def fill(tx: Transaction, ino: Ino) -> None:
            inode = volume.inode(ino)._replace(uid=owner.uid, gid=owner.gid)
            filemap = FileMap(volume, ino, inode, compact=compact)
            if fragmented:
                allocate(tx, filemap, FIRST, end_of(size))
            else:
                _allocate_piece(tx, filemap, -(-size // BLOCK))
            tx.put_inode(ino, filemap.finish()._replace(size=size))
            if executed:
                executed(tx, ino)

        return fs.create(parent, name, stat.S_IFREG | mode, owner, init_inode=fill)

    try:
        return make(compact=True)
    except FsError as error:
        if error.errno not in OUT_OF_SPACE or not fragmented:
            raise
    return make(compact=False)


def _allocate_piece(tx: Transaction, filemap: FileMap, blocks: int) -> None:
    """Map an empty file to so many blocks in one piece."""
    volume = filemap.volume
    if filemap.inode.project:
        check_room(tx, filemap.ino, filemap.inode, blocks * PAGES_PER_BLOCK)
    # Looked for first: the allocator would take what it finds in pieces, and ask the host for the memory of each.
    if blocks > volume.space.free_blocks or volume.space.table.find(bytes(blocks), volume.space.first_block) < 0:
        found = f"{volume.space.free_blocks} are free, {volume.space.largest_free_run()} of them in one piece"
        raise FsError(errno.ENOSPC, f"{blocks} blocks of 2 MiB wanted in one piece, {found}")
    for block, count in volume.allocator.alloc_blocks(tx, blocks):
        filemap.add(tx, FIRST, PageNo(block * PAGES_PER_BLOCK), count * PAGES_PER_BLOCK)
