"""Everything that a user can see of a region after a crash, and whether the filesystem still works."""

import errno
import stat
from typing import NamedTuple

from pkernfs.errors import FsError
from pkernfs.format import BLOCK, GUARDED, PAGE, PAGE_HEADER, PAGE_INODES, PAGE_NODE, ROOT_PGTABLES_INO, Ino, Mapping
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem, Statfs
from pkernfs.iommu.reclaim import acknowledge
from pkernfs.iommu.records import Records, drop_records
from pkernfs.region import Region
from tests.core.support import ME, ROOT, check, mkdir, open_fs, remove_all

ZEROS = bytes(1 << 20)


class Facts(NamedTuple):
    """One inode, but for its content."""

    ino: Ino
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    pages: int
    flags: int
    target: bytes  #: of a symbolic link
    xattrs: tuple[tuple[bytes, bytes], ...]
    pins: int | tuple[tuple[int, Mapping], ...]  #: of a file; of a domain its mappings


class State(NamedTuple):
    """A whole region, by path."""

    facts: dict[bytes, Facts]
    times: dict[bytes, tuple[int, int, int]]
    content: dict[bytes, dict[int, bytes]]  #: the pages of each file that are not all zeros, up to its end
    space: Statfs


def look(fs: Filesystem) -> State:
    """All that can be seen."""
    fs.times.policy = "noatime"
    state = State({}, {}, {}, fs.statfs())
    todo = [(b"", ROOT)]
    while todo:
        path, ino = todo.pop()
        inode = fs.getattr(ino)
        xattrs = tuple(sorted((name, fs.getxattr(ino, name)) for name in fs.listxattr(ino)))
        target = fs.readlink(ino) if stat.S_ISLNK(inode.mode) else b""
        owner = inode.uid, inode.gid, inode.rdev
        state.facts[path] = Facts(
            ino, inode.mode, inode.nlink, *owner, inode.size, inode.pages, inode.flags, target, xattrs, _pins(fs, ino)
        )
        state.times[path] = inode.atime, inode.mtime, inode.ctime
        if stat.S_ISDIR(inode.mode):
            todo += [(path + b"/" + entry.name, entry.ino) for entry in fs.readdir(ino)]
        elif stat.S_ISREG(inode.mode):
            state.content[path] = pages(fs, ino)
    return state


def _pins(fs: Filesystem, ino: Ino) -> int | tuple[tuple[int, Mapping], ...]:
    inode = fs.getattr(ino)
    return tuple(Records(fs.volume, ino).mappings()) if inode.flags & GUARDED else inode.iommu


def pages(fs: Filesystem, ino: Ino) -> dict[int, bytes]:
    """The pages of a file that are not all zeros, by their number; read as a user would, where memory is mapped."""
    found = {}
    for extent in fs.content.extents(ino):
        raw = bytes(fs.read(ino, extent.start * PAGE, extent.length * PAGE))
        for at in range(0, len(raw), PAGE):
            page = raw[at : at + PAGE]
            if page != ZEROS[: len(page)]:
                found[extent.start + at // PAGE] = page
    return found


def metadata_key(fs: Filesystem) -> int:
    """A hash of all metadata: the block table, reserved inodes, slab headers, inodes, nodes."""
    space = fs.volume.space
    view = fs.region.view
    found = hash(bytes(view[: PAGE * (1 + fs.volume.sb.table_pages)]))
    for block in space.slab_blocks():
        for index, kind in enumerate(space.slab(block).kinds):
            if kind in (PAGE_HEADER, PAGE_INODES, PAGE_NODE):
                at = block * BLOCK + index * PAGE
                found = hash((found, at, bytes(view[at : at + PAGE])))
    return found


def mixed(found: dict[int, bytes], old: dict[int, bytes], new: dict[int, bytes]) -> bool:
    """Every byte of ``found`` is that of ``old``, of ``new`` (beyond their ends: zero)."""
    for number in {*found, *old, *new}:
        parts = [side.get(number, b"").ljust(PAGE, b"\0") for side in (found, old, new)]
        if parts[0] not in parts[1:] and any(one not in (x, y) for one, x, y in zip(*parts, strict=True)):
            return False
    return True


def assert_works(region: Region, empty: Statfs) -> None:
    """Everything can be made and removed; free memory reads as zero once it is a file's; in the end all is free."""
    fs = open_fs(region)
    _make(fs)
    _take_all(fs)
    remove_all(fs, ROOT)
    if fs.getattr(ROOT_PGTABLES_INO).iommu:
        acknowledge(fs)
        with fs.volume.transaction() as tx:
            drop_records(tx, fs.volume, ROOT_PGTABLES_INO)
    fs.reclaimer.settle()
    assert check(fs.volume) == []
    assert fs.statfs() == empty, "what an empty region has free"


def _make(fs: Filesystem) -> None:
    try:
        directory = mkdir(fs, b"~works")
        ino = fs.create(directory, b"file", stat.S_IFREG | 0o644, ME)
        fs.write(ino, 1000, b"content")
        assert fs.read(ino, 0, 2000) == bytes(1000) + b"content"
        fs.setxattr(ino, b"user.name", b"value" * 1000)
        fs.link(ino, ROOT, b"~link")
        fs.rename(directory, b"file", ROOT, b"~moved")
        assert fs.getxattr(fs.lookup(ROOT, b"~link"), b"user.name") == b"value" * 1000
    except FsError as error:
        if error.errno != errno.ENOSPC:
            raise


def _take_all(fs: Filesystem) -> None:
    """A file of all the memory that one can have is zero."""
    try:
        ino = fs.create(ROOT, b"~all", stat.S_IFREG | 0o644, ME)
    except FsError as error:
        if error.errno != errno.ENOSPC:
            raise
        return
    blocks = fs.volume.space.free_blocks
    for size in (blocks * BLOCK, (blocks - 1) * BLOCK, 200 * PAGE, PAGE):
        try:
            fs.setattr(ino, SetAttr(size=max(size, 0)))
            break
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
    for at in range(0, fs.getattr(ino).size, len(ZEROS)):
        found = bytes(fs.read(ino, at, len(ZEROS)))
        assert found == ZEROS[: len(found)], "old bytes in new memory"
