"""What the core tests share: small filesystems in memory, the whole tree as plain data, and planting faults."""

import errno
import hashlib
import itertools
import stat
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest

from pkernfs.errors import FsError
from pkernfs.format import (
    ATTACHMENT,
    ATTACHMENT_KEY,
    FIRST_FREE_SLOT,
    INODE_SIZE,
    IOMMU_INO,
    MAPPING,
    READ,
    ROOT_INO,
    ROOT_PGTABLES_INO,
    WRITE,
    Attachment,
    FilePage,
    Ino,
    Inode,
    Mapping,
)
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.names import Caller
from pkernfs.fs.pages import Page, encode_inode, read_inode
from pkernfs.fs.volume import Volume
from pkernfs.fsck import check as fsck_check
from pkernfs.fsck import repair as fsck_repair
from pkernfs.fsck.check import FILESYSTEM, Check
from pkernfs.fsck.findings import Finding
from pkernfs.fsck.repair import Outcome
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.records import Records
from pkernfs.region import MemoryRegion, Region

MiB = 1 << 20
ROOT = ROOT_INO
ME = Caller(1000, 100)
SEED = bytes(range(16))
UUID = uuid.UUID(int=0x1234)
SECOND = 10**9


def check(volume: Volume) -> list[Finding]:
    """What fsck finds, but for page tables: the records that these tests make have none."""
    return fsck_check.check(volume, FILESYSTEM)


def check_region(region: Region) -> tuple[list[Finding], Check | None]:
    """The same, of a region that is to be opened first."""
    return fsck_check.check_region(region, passes=FILESYSTEM)


def repair_region(region: Region) -> Outcome:
    """What fsck -y does, but for page tables."""
    return fsck_repair.repair_region(region, passes=FILESYSTEM)


def new_fs(mib: int = 64, kind: Callable[[int], Region] = MemoryRegion) -> Filesystem:
    """A fresh filesystem whose clock goes on by a second with every look at it."""
    region = kind(mib * MiB)
    mkfs(region, uuid=UUID, hash_seed=SEED)
    return open_fs(region)


def open_fs(region: Region) -> Filesystem:
    """Open, with the same kind of clock."""
    fs = open_filesystem(region)
    set_clock(fs)
    return fs


def set_clock(fs: Filesystem, start: int = 2_000_000_000) -> None:
    """A clock that goes on by a second with every look at it."""
    ticks = itertools.count(start)
    fs.volume.clock = lambda: next(ticks) * SECOND


def fails(number: int) -> AbstractContextManager[object]:
    """The block raises FsError with this errno."""
    return pytest.raises(FsError, check=lambda error: error.errno == number)


def mkfile(fs: Filesystem, name: bytes, data: bytes = b"", parent: Ino = ROOT, mode: int = 0o644) -> Ino:
    """A regular file with content."""
    ino = fs.create(parent, name, stat.S_IFREG | mode, ME)
    if data:
        assert fs.write(ino, 0, data) == len(data)
    return ino


def mkdomain(fs: Filesystem, name: bytes = b"dom-0", size: int = 2 * MiB) -> Ino:
    """A domain, with its first block."""
    ino = mkfile(fs, name, parent=IOMMU_INO)
    if size:
        fs.setattr(ino, SetAttr(size=size))
    return ino


def map_file(fs: Filesystem, domain: Ino, iova: int, ino: Ino, start: int = 0, length: int = 1) -> None:
    """A mapping, in pages, as the API of the IOMMU records it: without tables."""
    with fs.volume.transaction() as tx:
        records = Records(fs.volume, domain)
        records.put(tx, iova, MAPPING.pack(Mapping(ino, FilePage(start), length, READ | WRITE)))
        records.finish(tx)
        tx.pin(ino, 1)


def unmap(fs: Filesystem, domain: Ino, iova: int) -> None:
    """Take a mapping away, which begins at page ``iova``, as the API of the IOMMU does."""
    with fs.volume.transaction() as tx:
        records = Records(fs.volume, domain)
        (value,) = [value for key, value in records.scan(iova, iova)]
        records.delete(tx, iova)
        records.finish(tx)
        ino = MAPPING.unpack(value).ino
        tx.pin(ino, -1)
    fs.reclaimer.reap(ino)


def attach(fs: Filesystem, requester: int, domain: Ino, number: int = 1) -> None:
    """Attach a device, without tables."""
    with fs.volume.transaction() as tx:
        records = Records(fs.volume, ROOT_PGTABLES_INO)
        records.put(tx, ATTACHMENT_KEY + requester, ATTACHMENT.pack(Attachment(domain, number, 0)))
        records.finish(tx)


def detach(fs: Filesystem, requester: int) -> None:
    """Detach a device."""
    with fs.volume.transaction() as tx:
        records = Records(fs.volume, ROOT_PGTABLES_INO)
        records.delete(tx, ATTACHMENT_KEY + requester)
        records.finish(tx)


def mkdir(fs: Filesystem, name: bytes, parent: Ino = ROOT) -> Ino:
    """A directory."""
    return fs.create(parent, name, stat.S_IFDIR | 0o755, ME)


def content(fs: Filesystem, ino: Ino) -> bytes:
    """All bytes of a file."""
    return bytes(fs.read(ino, 0, fs.getattr(ino).size))


class Shape(NamedTuple):
    """What a user can see of one inode, but for its times."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    pages: int
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]


def shape(fs: Filesystem, ino: Ino) -> Shape:
    """One inode as plain data."""
    inode = fs.getattr(ino)
    data = b""
    if stat.S_ISREG(inode.mode):
        data = content(fs, ino)
    elif stat.S_ISLNK(inode.mode):
        data = fs.readlink(ino)
    xattrs = tuple(sorted((name, fs.getxattr(ino, name)) for name in fs.listxattr(ino)))
    return Shape(inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, inode.size, inode.pages, data, xattrs)


def tree(fs: Filesystem) -> dict[bytes, Shape]:
    """Every path with what stands there, the root as b"", and the number of orphans as the size of b"//orphans"."""
    fs.times.policy = "noatime"
    found = {}
    todo = [(b"", ROOT)]
    while todo:
        path, ino = todo.pop()
        found[path] = shape(fs, ino)
        if stat.S_ISDIR(found[path].mode):
            todo += [(path + b"/" + entry.name, entry.ino) for entry in fs.readdir(ino)]
    return found


def assert_sound(fs: Filesystem) -> None:
    """fsck finds nothing, and what the volume holds decoded is what the region holds."""
    assert check(fs.volume) == []
    volume = fs.volume
    space = volume.space
    assert not volume.cache.in_transaction
    assert space.free_blocks == space.table.count(0, space.first_block)
    for ino, inode in volume.inodes.items():
        assert read_inode(volume.region, ino)[:4] == inode[:4], f"words of cached inode {ino}"
        assert encode_inode(ino, inode) == volume.region.read(ino * INODE_SIZE, INODE_SIZE), f"cached inode {ino}"
    pages: list[Page] = [*volume.nodes.values(), *space.slabs.values()]
    for page in pages:
        assert page.encode() == volume.region.read(page.offset, 4096), f"cached page at {page.offset:#x}"
    for block, slab in space.slabs.items():
        assert slab.free == slab.kinds.count(0), f"free pages of slab {block}"
        assert not slab.free or block in space.with_pages, f"slab {block} has free pages, and is not listed"


def unchanged(fs: Filesystem, number: int, operation: Callable[[], object]) -> None:
    """The operation fails with errno ``number`` and changes nothing that can be seen."""
    before, space = tree(fs), fs.statfs()
    with fails(number):
        operation()
    assert tree(fs) == before
    assert fs.statfs() == space
    assert_sound(fs)


def full(fs: Filesystem, leave: int = 0) -> list[Ino]:
    """Fill the region with files to the last page, but for ``leave`` pages; the inodes of the files."""
    small = [mkfile(fs, b"fill-small%d" % n, b"\xaa" * 4096) for n in range(leave + 8)]
    made = []
    for n in itertools.count():
        try:
            ino = mkfile(fs, b"fill%d" % n)
            made.append(ino)
            while True:
                fs.write(ino, fs.getattr(ino).size, b"\xaa" * (3 * MiB))
                if fs.getattr(ino).size > 30 * MiB:
                    break
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            break
    assert fs.statfs().free == 0
    for n in range(leave):
        fs.unlink(ROOT, b"fill-small%d" % n)
    assert fs.statfs().free == leave
    return [*made, *small[leave:]]


def remove_all(fs: Filesystem, ino: Ino) -> None:
    """Remove all that is in a directory and can be."""
    for entry in list(fs.readdir(ino)):
        if stat.S_ISDIR(entry.mode):
            remove_all(fs, entry.ino)
        if entry.ino < FIRST_FREE_SLOT:
            continue
        if stat.S_ISDIR(entry.mode):
            fs.rmdir(ino, entry.name)
        else:
            fs.holds.release(entry.ino)
            fs.unlink(ino, entry.name)


def digest(path: str) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def patch_inode(fs: Filesystem, ino: Ino, **fields: Any) -> Inode:
    """Store an inode with other fields, and a right checksum."""
    inode = read_inode(fs.region, ino)._replace(**fields)
    fs.region.store(ino * INODE_SIZE, encode_inode(ino, inode))
    fs.volume.inodes.clear()
    return inode


def sparse_file(path: str, size: int) -> None:
    """A file of ``size`` bytes, all of them a hole; one that is there gets this size."""
    with open(path, "ab") as file:
        file.truncate(size)
