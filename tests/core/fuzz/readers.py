"""All that pkernfs can do with a region, on one that is hostile."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import itertools
import random
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from pkernfs import format as f
from pkernfs.cli import explain as cli_explain
from pkernfs.cli import info, ls
from pkernfs.cli.ls import _collect
from pkernfs.errors import CorruptError, FsError, PkernfsError
from pkernfs.format import Ino, PageNo
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.directory import Entry
from pkernfs.fs.facts import file_facts, region_facts
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.rename import RENAME_EXCHANGE
from pkernfs.fsck.explain import explain
from pkernfs.fsck.findings import MAX_FINDINGS
from pkernfs.fsck.scrub import scrub_step
from pkernfs.iommu import reclaim
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.records import Records
from pkernfs.server.operations import Operations
from tests.core.fuzz.oracle import Before, Violation, WatchedRegion, is_feature, judged
from tests.core.support import ME, ROOT, SEED, UUID, check_region, repair_region, set_clock

MOST = 60  #: objects that are looked at


class Place(NamedTuple):
    """A name that was found."""

    parent: Ino
    name: bytes
    ino: Ino
    mode: int


class Use:
    """One use of a region, from mount to unmount.  ``damaged``: a call said so."""

    def __init__(self, region: WatchedRegion, rng: random.Random) -> None:
        self.region = region
        self.rng = rng
        self.damaged = False
        self.refused: PkernfsError | None = None
        opened = judged(open_filesystem, region)
        self._judge_opening()
        if isinstance(opened, PkernfsError):
            self.refused = opened
            return
        self.fs = opened
        self.damaged = bool(self.fs.volume.damage.found)
        set_clock(self.fs)
        self.server = Operations(self.fs, dict)
        self.fs.reclaimer.in_background = False
        region.log.clear()

    def _judge_opening(self) -> None:
        """Replay and the end of orphans store nothing in superblocks, beyond the end or in an unused place."""
        sb = f.SUPERBLOCK.unpack(self.region.view)
        end = min(sb.blocks * f.BLOCK, self.region.size)
        for offset, length in self.region.log:
            superblock = offset < f.SUPERBLOCK.size or offset == sb.journal_offset or end - f.PAGE <= offset < end
            if (superblock and not is_feature(sb, offset, length)) or offset + length > end:
                raise Violation(f"opening stored {length} bytes at {offset:#x}")

    def note(self, error: Any) -> None:
        """What the server does with an error."""
        if isinstance(error, CorruptError):
            self.damaged = True
            self.fs.volume.damage.note(error)

    # -- reading --------------------------------------------------------------------------------------------------

    def look(self, call: Callable[..., Any], *args: Any, ino: int = 0) -> Any:
        """A call that only reads: stores nothing but access times.  None: it failed."""
        frozen = ino in self.fs.volume.damage.inodes
        result = judged(call, *args, inos={ino})
        for offset, length in self.region.log:
            if (offset, length) != (ino * f.INODE_SIZE + f.INODE_ATIME_AT, 8) or frozen:
                raise Violation(f"reading inode {ino} stored {length} bytes at {offset:#x}")
        self.region.log.clear()
        self.note(result)
        return None if isinstance(result, PkernfsError) else result

    def walk(self) -> list[Place]:
        """Read all that can be reached; the names."""
        fs = self.fs
        places = []
        todo = [Place(ROOT, b"", ROOT, stat.S_IFDIR)]
        seen: set[int] = set()
        while todo and len(seen) < MOST:
            place = todo.pop(self.rng.randrange(len(todo)))
            ino = place.ino
            if place.name:
                places.append(place)
            if ino in seen:
                continue
            seen.add(ino)
            inode = self.look(fs.getattr, ino, ino=ino)
            if inode is None:
                continue
            if stat.S_ISDIR(inode.mode) and inode.parent != place.parent:
                raise Violation(f"directory {ino} was reached from {place.parent}, its parent is {inode.parent}")
            judged(self.server.attributes.of, ino, inode)
            for name in self.look(fs.listxattr, ino) or ():
                self.look(fs.getxattr, ino, name)
            self.content(ino, inode)
            if stat.S_ISDIR(inode.mode):
                for entry in self.look(self.entries, ino, ino=ino) or ():
                    found = self.look(fs.lookup, ino, entry.name)
                    if found is not None:
                        todo.append(Place(ino, entry.name, found, entry.mode))
        self.look(fs.statfs)
        self.look(region_facts, fs)
        self.look(fs.orphans.inos)
        return places

    def entries(self, ino: Ino) -> list[Entry]:
        """All of a directory, in the order of its cookies, each once."""
        found = list(self.fs.readdir(ino))
        if any(a.key >= b.key or b.key >> 63 for a, b in itertools.pairwise(found)):
            raise Violation(f"cookies of directory {ino} that do not ascend")
        return found

    def content(self, ino: Ino, inode: f.Inode) -> None:
        """The bytes of files and links."""
        fs = self.fs
        if stat.S_ISLNK(inode.mode):
            self.look(fs.readlink, ino, ino=ino)
        elif stat.S_ISREG(inode.mode):
            far = [self.rng.choice([0, 5000, 1 << 21, inode.size - 1, (1 << 63) - 4096])]
            for offset in (0, *far):
                data = self.look(fs.read, ino, max(offset, 0), 131_072, ino=ino)
                if data is not None and len(data) > 131_072:
                    raise Violation(f"read {len(data)} bytes instead of 131072")
            self.look(file_facts, fs, ino)

    # -- changing -------------------------------------------------------------------------------------------------

    def alter(self, what: str, inos: set[Ino], call: Callable[[], Any]) -> Any:
        """A call that changes ``inos``; what it stores is judged.  None: it failed."""
        frozen = inos & self.fs.volume.damage.inodes
        before = Before(self.fs, inos)
        before.note_nodes()
        result = judged(call, inos=inos)
        if self.fs.volume.cache.in_transaction:
            raise Violation(f"{what}: a transaction was left open")
        if isinstance(result, FsError) and result.errno == errno.EROFS and frozen:
            before.inos, before.owned = set(), set()  # a frozen inode: what is free may have been stored, nothing else
        before.judge(self.region.log, what)
        # A name of a frozen inode may be one of several that a call is about: what is certain is one alone.
        if frozen == inos and not isinstance(result, PkernfsError) and what in ALWAYS_CHANGES:
            raise Violation(f"{what}: an inode that was found damaged was changed")
        self.region.log.clear()
        self.note(result)
        return None if isinstance(result, PkernfsError) else result

    def change(self, places: list[Place], most: int) -> None:
        """Some changes of everything that was found, and then its end."""
        self.rng.shuffle(places)
        fs, rng = self.fs, self.rng
        directories = [ROOT, *(place.ino for place in places if stat.S_ISDIR(place.mode))]
        for place in places[:most]:
            ino = place.ino
            makers = {**ANY, **(OF_FILES if stat.S_ISREG(place.mode) else {})}
            if stat.S_ISDIR(place.mode):
                makers |= OF_DIRECTORIES
            for what in rng.sample(sorted(makers), 2):
                self.alter(what, {ino} | self.pinned(ino), functools.partial(makers[what], fs, ino))
        for place in places[:most]:
            other = rng.choice(places)
            target = (rng.choice(directories), b"moved") if rng.random() < 0.5 else (other.parent, other.name)
            flags = rng.choice([0, 0, RENAME_EXCHANGE])
            inos = {place.parent, target[0], self.named(place.parent, place.name), self.named(*target)} - {0}
            inos |= self.mapped(inos)
            self.alter("rename", inos, functools.partial(fs.rename, place.parent, place.name, *target, flags))
        for place in places[:most]:
            remove = fs.rmdir if stat.S_ISDIR(place.mode) else fs.unlink
            inos = {place.parent, self.named(place.parent, place.name)} - {0}
            inos |= self.mapped(inos)
            self.alter("remove", inos, functools.partial(remove, place.parent, place.name))

    def named(self, parent: Ino, name: bytes) -> Ino:
        """What a name stands for now; 0: for nothing that can be had."""
        return self.look(self.fs.lookup, parent, name, ino=parent) or Ino(0)

    def pinned(self, ino: Ino) -> set[Ino]:
        """The inode that holds what awaits an invalidation, when that may change with a file."""
        inode = self.look(self.fs.getattr, ino, ino=ino)
        return {f.ROOT_PGTABLES_INO} if inode is not None and inode.iommu else set()

    def mapped(self, inos: set[Ino]) -> set[Ino]:
        """The files that are mapped by the domains among inodes, which drop their pins when they go."""
        found = set()
        with suppress(PkernfsError):
            for ino in inos:
                found |= self.pinned(ino)
                if self.fs.getattr(ino).flags & f.FLAG_IOMMU_DOMAIN_PGTABLES:
                    for _, mapping in Records(self.fs.volume, ino).mappings():
                        found.add(mapping.ino)
        return found

    def end(self) -> None:
        """Hardware has invalidated all that it may have cached; unmount."""
        self.note(judged(reclaim.acknowledge, self.fs))
        self.fs.reclaimer.ended = True
        judged(self.fs.close)


ANY: dict[str, Callable[[Filesystem, Ino], Any]] = {
    "chmod": lambda fs, ino: fs.setattr(ino, SetAttr(mode=0o4711, uid=3, mtime=5)),
    "setxattr": lambda fs, ino: fs.setxattr(ino, b"user.new", b"v" * 300),
    "large-setxattr": lambda fs, ino: fs.setxattr(ino, b"user.value3", b"v" * 9000),
    "removexattr": lambda fs, ino: fs.removexattr(ino, b"user.value4"),
}
OF_FILES: dict[str, Callable[[Filesystem, Ino], Any]] = {
    "overwrite": lambda fs, ino: fs.write(ino, 0, b"written"),
    "append": lambda fs, ino: fs.write(ino, fs.getattr(ino).size, b"w" * 5000),
    "write-far": lambda fs, ino: fs.write(ino, 3_000_000, b"w" * 100),
    "grow": lambda fs, ino: fs.setattr(ino, SetAttr(size=fs.getattr(ino).size + 70_000)),
    "cut": lambda fs, ino: fs.setattr(ino, SetAttr(size=fs.getattr(ino).size // 2)),
    "empty": lambda fs, ino: fs.setattr(ino, SetAttr(size=0)),
    "direct": lambda fs, ino: fs.attributes.set_region_mapped(ino, True),
    "link": lambda fs, ino: fs.link(ino, ino, b"not a directory"),
}
OF_DIRECTORIES: dict[str, Callable[[Filesystem, Ino], Any]] = {
    "create": lambda fs, ino: fs.create(ino, b"new", stat.S_IFREG | 0o644, ME),
    "mkdir": lambda fs, ino: fs.create(ino, b"newdir", stat.S_IFDIR | 0o755, ME),
    "symlink": lambda fs, ino: fs.create(ino, b"newlink", stat.S_IFLNK | 0o777, ME, target=b"t" * 400),
}
ALWAYS_CHANGES = {"chmod", "setxattr", "overwrite", "append", "write-far", "grow", "create", "mkdir", "symlink"}


def tools(region: WatchedRegion, rng: random.Random) -> None:
    """What reads a region without a mount.  Nothing is stored."""
    opened = judged(open_filesystem, region)
    region.log.clear()
    if not isinstance(opened, PkernfsError):
        fs = opened
        judged(shown, fs, steps="check")
        page = PageNo(0)
        while page < fs.volume.total_pages:
            step = judged(scrub_step, fs, page, steps="check")
            if isinstance(step, PkernfsError):
                raise Violation(f"scrub failed: {step}")
            page = step.next
        for _ in range(2):
            judged(explained, fs, rng.randrange(region.size), steps="check")
    check(region)
    if region.log:
        raise Violation(f"tools that only read stored at {region.log[0][0]:#x}")


def shown(fs: Filesystem) -> None:
    """What `pkernfs info` and `pkernfs ls -lR` print."""
    rows, _ = _collect(fs, "", True)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print("\n".join(info.region_lines(region_facts(fs))))
        for row in rows:
            print(ls._line(row, LONG))
    text.getvalue().encode()


def explained(fs: Filesystem, offset: int) -> None:
    """What `pkernfs explain` prints."""
    "\n".join(cli_explain._lines(explain(fs, offset))).encode()


LONG = argparse.Namespace(long=True, numeric=True, inode=True)


def check(region: WatchedRegion) -> bool:
    """Check; whether it is sound."""
    found = judged(check_region, region, steps="check")
    if isinstance(found, PkernfsError):
        return False
    for problem in found[0]:
        if "\n" in problem.text or len(found[0]) > MAX_FINDINGS:
            raise Violation(f"problems that are not lines, or too many: {problem}")
    return not found[0]


def repair(region: WatchedRegion) -> None:
    """Repair: then it is sound, and can be used."""
    done = judged(repair_region, region, steps="repair")
    if isinstance(done, PkernfsError):
        return
    if [problem for problem in done.left if problem.code != "inode-lost"]:
        raise Violation(f"a repair left {done.left[:3]}")
    again = open_filesystem(region)
    if not done.left and not check(region):
        raise Violation("a check after a repair found something")
    judged(again.create, ROOT, b"after the repair", stat.S_IFREG, ME)
    if not done.left and not check(region):
        raise Violation("a file made after a repair damaged something")


def make_anew(region: WatchedRegion) -> None:
    """mkfs does not care about what it finds."""
    done = judged(functools.partial(mkfs, uuid=UUID, hash_seed=SEED), region, steps="check")
    if isinstance(done, PkernfsError) or not check(region):
        raise Violation(f"mkfs: {done}")
