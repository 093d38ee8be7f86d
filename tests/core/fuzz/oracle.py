"""What an operation on a hostile region may cost, raise and store."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pkernfs import format as f
from pkernfs.errors import CorruptError, FsError, PkernfsError
from pkernfs.format import Ino
from pkernfs.fs.btree import Tree
from pkernfs.fs.cache import Cache
from pkernfs.fs.filemap import FileMap
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.space import Space
from pkernfs.fs.xattrs import Xattrs
from tests.core.images import CowRegion

T = TypeVar("T")

#: errnos of POSIX results; damage itself is EUCLEAN.
SANE = {
    getattr(errno, name)
    for name in (
        *("ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENOTEMPTY", "EINVAL", "ENOSPC", "ENODATA", "EROFS", "EPERM"),
        *("EXDEV", "EDQUOT"),
        *("EFBIG", "EMLINK", "ENAMETOOLONG", "EBUSY", "EUCLEAN"),
    )
}
#: What one call may cost, in reads of the region and looks at decoded structures: several times what the same calls
#: take on the sound images.
STEPS = {"call": 30_000, "check": 200_000, "repair": 4_000_000}
MEMORY = 1 << 30  #: bytes of address space beyond what is in use at the beginning


class Violation(AssertionError):
    """Something that no image may bring about."""


class TooManySteps(BaseException):
    """A call does not come to its end.  Not an Exception, so that nothing that it passes takes it for its own."""


class Steps:
    """Counts the steps of the call at work."""

    left = 1 << 60

    @classmethod
    def take(cls) -> None:
        """One step."""
        cls.left -= 1
        if cls.left < 0:
            raise TooManySteps

    @classmethod
    @contextmanager
    def counted(cls) -> Iterator[None]:
        """Let looks at nodes, inodes and slabs count, whether they read the region or not."""
        originals: list[tuple[type, str, Any]] = []
        places: list[tuple[type, str]] = [(Tree, "_node"), (Cache, "inode"), (Space, "slab")]
        for owner, name in places:
            original = getattr(owner, name)
            originals.append((owner, name, original))
            setattr(owner, name, _counting(original))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


def _counting(original: Callable[..., T]) -> Callable[..., T]:
    def call(*args: Any) -> T:
        Steps.take()
        return original(*args)

    return call


@contextmanager
def little_memory() -> Iterator[None]:
    """Let allocations fail that are out of all proportion."""
    with open("/proc/self/statm", encoding="ascii") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class WatchedRegion(CowRegion):
    """A private view of an image that counts reads and notes stores as (offset, length)."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.log: list[tuple[int, int]] = []

    def close(self) -> None:
        """Unmap: the objects that hold a region are in cycles, and go when they go."""
        with contextlib.suppress(BufferError):
            self.words.release()
            self.view.release()
            self.map.close()

    def read(self, offset: int, length: int) -> bytes:
        Steps.take()
        return super().read(offset, length)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.log.append((offset, len(data)))
        if offset + len(data) > self.size:
            raise Violation(f"a store of {len(data)} bytes at {offset:#x}, beyond the end of the region")
        super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        self.log.append((offset, 8))
        super().store_word(offset, value)


def judged(call: Callable[..., T], *args: Any, steps: str = "call", inos: Iterable[int] = ()) -> T | PkernfsError:
    """The result of a call, or the error that a user gets.  Anything else that comes out is a Violation.

    ``inos``: inodes that are named in the call, and may be gone (ESTALE).
    """
    Steps.left = STEPS[steps]
    try:
        return call(*args)
    except PkernfsError as error:
        if "\n" in str(error):
            raise Violation(f"an error of several lines: {error}") from error
        gone = {f"inode {ino} is not in use any more: Stale file handle" for ino in inos}
        stale = error.errno == errno.ESTALE and str(error) in gone
        if isinstance(error, FsError | CorruptError) and error.errno not in SANE and not stale:
            raise Violation(f"errno {errno.errorcode.get(error.errno)}: {error}") from error
        return error
    except TooManySteps as error:
        raise Violation(f"more than {STEPS[steps]} steps, {where(error)}") from None
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {error}, {where(error)}") from error
    finally:
        Steps.left = 1 << 60


def where(error: BaseException) -> str:
    """Where in pkernfs an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/tests/" not in frame.filename]
    return " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(ours[-4:]))


def is_feature(sb: f.Superblock, offset: int, length: int) -> bool:
    """Whether a store is of a word with features, or with the checksum, of a superblock: one is being switched on."""
    return length == 8 and offset in {at + word for at in (0, sb.journal_offset) for word in (8, 16)}


class Before:
    """Who had what before an operation, read from the region without the code under test where that is possible."""

    def __init__(self, fs: Filesystem, inos: set[Ino]) -> None:
        """``inos``: the inodes that the operation is about."""
        region = self.region = fs.region
        sb = self.sb = fs.volume.sb
        self.table = region.view[f.PAGE + 32 : f.PAGE + 32 + sb.blocks].tobytes()
        self.headers = {
            block: region.view[block * f.BLOCK : block * f.BLOCK + f.PAGE].tobytes()
            for block, kind in enumerate(self.table)
            if kind == f.BLOCK_SLAB
        }
        self.nodes: dict[int, int] = {}
        head = self._raw(f.ORPHANS_INO)
        self.inos = {*inos, int(f.ORPHANS_INO), head.orphan_next, head.orphan_prev}
        for ino in inos:
            if 0 < ino < fs.volume.total_pages * f.INODES_PER_PAGE:
                self.inos |= {self._raw(ino).orphan_next, self._raw(ino).orphan_prev}
        for ino in inos:
            self.inos |= self._projects(ino)
        self.owned: set[int] = set()
        for ino in inos:
            self.owned |= _content(fs, ino)

    def _raw(self, ino: Ino) -> f.Inode:
        return f.INODE.unpack(self.region.view, ino * f.INODE_SIZE)

    def _projects(self, ino: Ino) -> set[int]:
        """The directories with a quota that an inode counts against."""
        found: set[int] = set()
        while 0 < ino < len(self.region.view) // f.INODE_SIZE and self._raw(ino).project not in found:
            project = self._raw(ino).project
            found.add(project)
            ino = self._raw(project).parent if 0 < project < len(self.region.view) // f.INODE_SIZE else f.Ino(0)
        return found

    def note_nodes(self) -> None:
        """Remember the owners of all tree nodes: stores are judged when they have been made."""
        for block, header in self.headers.items():
            at = header.find(f.PAGE_NODE, f.SLAB_KINDS_AT, f.SLAB_KINDS_AT + f.PAGES_PER_BLOCK)
            while at >= 0:
                page = block * f.PAGES_PER_BLOCK + at - f.SLAB_KINDS_AT
                self.nodes[page] = f.PAGE_HEADER_LAYOUT.unpack(self.region.view, page * f.PAGE).owner
                at = header.find(f.PAGE_NODE, at + 1, f.SLAB_KINDS_AT + f.PAGES_PER_BLOCK)

    def judge(self, log: list[tuple[int, int]], what: str) -> None:
        """Raise Violation for a store into what is somebody else's."""
        for offset, length in log:
            first = offset
            while first < offset + length:
                end = min(first - first % f.PAGE + f.PAGE, offset + length)
                why = self._why_not(first, end)
                if why:
                    raise Violation(f"{what}: stored {length} bytes at {offset:#x}: {why}")
                first = end

    def _why_not(self, first: int, end: int) -> str:
        """Why bytes [first, end), all of one page, must not be stored; "" when they may."""
        sb = self.sb
        page = first // f.PAGE
        block, index = divmod(page, f.PAGES_PER_BLOCK)
        if first < sb.first_block * f.BLOCK:
            table = 0 < page <= sb.table_pages
            journal = page > sb.journal_offset // f.PAGE
            if page == 0 and first >= f.SUPERBLOCK.size:
                return self._slots(first, end, 0xFFFF)
            allowed = table or journal or is_feature(sb, first, end - first)
            return "" if allowed else "a superblock, or no structure"
        if block >= sb.blocks:
            return "beyond the filesystem"
        if self.table[block] == f.BLOCK_FREE or page in self.owned:
            return ""
        if self.table[block] != f.BLOCK_SLAB:
            return f"a block of kind {self.table[block]} that is another's"
        header = self.headers[block]
        kind = header[f.SLAB_KINDS_AT + index]
        if kind == f.PAGE_FREE or index == 0:
            return ""
        if kind == f.PAGE_INODES:
            at = f.SLAB_SLOTS_AT + 2 * index
            return self._slots(first, end, int.from_bytes(header[at : at + 2], "little"))
        if kind == f.PAGE_NODE and self.nodes.get(page) in self.inos:
            return ""
        return f"a page of kind {kind} that is another's"

    def _slots(self, first: int, end: int, used: int) -> str:
        for ino in range(first // f.INODE_SIZE, -(-end // f.INODE_SIZE)):
            if used >> ino % f.INODES_PER_PAGE & 1 and ino not in self.inos:
                return f"inode {ino}"
        return ""


def _content(fs: Filesystem, ino: Ino) -> set[int]:
    """The pages of an inode's content and of its attributes' values, as far as they can be read."""
    pages: set[int] = set()
    try:
        inode = fs.volume.inode(ino)
        if stat.S_ISREG(inode.mode) or stat.S_ISLNK(inode.mode):
            for extent in FileMap(fs.volume, ino, inode).extents():
                pages.update(range(extent.page, extent.page + extent.length))
    except PkernfsError:
        pass
    try:
        xattrs = Xattrs(fs.volume, ino, fs.volume.inode(ino))
        for attribute in xattrs.all():
            for run in xattrs.runs(attribute):
                pages.update(range(run.page, run.page + run.length))
    except PkernfsError:
        pass
    return pages
