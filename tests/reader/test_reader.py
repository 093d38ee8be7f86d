"""The second reader and the filesystem's own code must say the same of what was put into a region."""

import errno
import hashlib
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest

from pkernfs.errors import FsError
from pkernfs.format import ROOT_INO, Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.names import Caller
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.records import Records
from pkernfs.region import MemoryRegion, RecordingRegion
from tests.core.support import attach, detach, map_file
from tests.reader.on_region import PAGE, crc32c
from tests.reader.reader import Entry, Reader
from tests.reader.space import Corrupt

MiB = 1 << 20
SEED = bytes(range(16))
UUID_1 = UUID(int=0x1234)
OWNER = Caller(1000, 100)


@dataclass
class Wanted:
    """What the test put in under one path."""

    ino: Ino
    mode: int
    caller: Caller
    rdev: int = 0
    content: bytes = b""
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


class Twin:
    """A filesystem and, in plain dicts, what was put into it."""

    def __init__(self, size: int) -> None:
        self.region = MemoryRegion(size)
        self.superblock = mkfs(self.region, label="twin", uuid=UUID_1, hash_seed=SEED)
        self.fs = open_filesystem(self.region)
        iommu, tables = self.fs.resolve(b"/iommu"), self.fs.resolve(b"/iommu/root-pgtables")
        self.files = {
            b"/": Wanted(ROOT_INO, stat.S_IFDIR | 0o700, Caller(0, 0)),
            b"/iommu": Wanted(iommu, stat.S_IFDIR | 0o700, Caller(0, 0)),
            b"/iommu/root-pgtables": Wanted(tables, stat.S_IFREG | 0o600, Caller(0, 0)),
        }
        self.orphans: dict[int, Wanted] = {}

    def add(
        self,
        path: bytes,
        mode: int = stat.S_IFREG | 0o644,
        caller: Caller = OWNER,
        *,
        rdev: int = 0,
        content: bytes = b"",
        target: bytes = b"",
    ) -> Ino:
        """Create a file."""
        parent, _, name = path.rpartition(b"/")
        ino = self.fs.create(self.files[parent or b"/"].ino, name, mode, caller, rdev=rdev, target=target)
        self.files[path] = Wanted(ino, mode, caller, rdev, b"", target)
        if content:
            self.write(path, 0, content)
        return ino

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        """Write to a file, in the test's copy too."""
        file = self.files[path]
        assert self.fs.write(file.ino, offset, data) == len(data)
        file.content = file.content[:offset].ljust(offset, b"\0") + data + file.content[offset + len(data) :]

    def link(self, path: bytes, new: bytes) -> None:
        """Another name."""
        parent, _, name = new.rpartition(b"/")
        self.fs.link(self.files[path].ino, self.files[parent or b"/"].ino, name)
        self.files[new] = self.files[path]

    def remove(self, path: bytes, *, is_open: bool = False) -> None:
        """Remove a name; an open file stays as an orphan."""
        file = self.files.pop(path)
        parent, _, name = path.rpartition(b"/")
        if is_open:
            self.fs.lookups.add(file.ino)
            self.orphans[file.ino] = file
        remove = self.fs.rmdir if stat.S_ISDIR(file.mode) else self.fs.unlink
        remove(self.files[parent or b"/"].ino, name)

    def setxattr(self, path: bytes, name: bytes, value: bytes) -> None:
        """Set an extended attribute."""
        self.fs.setxattr(self.files[path].ino, name, value)
        self.files[path].xattrs[name] = value

    def nlink(self, path: bytes) -> int:
        """Names of a file; for a directory "." and those in its parent and children."""
        file = self.files[path]
        if not stat.S_ISDIR(file.mode):
            return [other.ino for other in self.files.values()].count(file.ino)
        prefix = path.rstrip(b"/") + b"/"
        below = [other for other in self.files if other.startswith(prefix) and other != path]
        return 2 + sum(stat.S_ISDIR(self.files[each].mode) and b"/" not in each[len(prefix) :] for each in below)


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes without a pattern, the same in each run."""
    return random.Random(seed).randbytes(size)


def add_sizes(twin: Twin) -> None:
    """Files of the sizes at which something changes."""
    twin.add(b"/sizes", stat.S_IFDIR | 0o750)
    for size in (0, 1, 4095, 4096, 4097, MiB, 2 * MiB - 1, 2 * MiB, 2 * MiB + 1, 5 * MiB):
        twin.add(b"/sizes/%d" % size, content=noise(size, size))
    twin.add(b"/sizes/cut", content=noise(3 * MiB))
    twin.fs.setattr(twin.files[b"/sizes/cut"].ino, SetAttr(size=10_001))
    twin.files[b"/sizes/cut"].content = noise(3 * MiB)[:10_001]
    twin.fs.setattr(twin.files[b"/sizes/cut"].ino, SetAttr(size=123_456))
    twin.files[b"/sizes/cut"].content = noise(3 * MiB)[:10_001].ljust(123_456, b"\0")


def add_sparse(twin: Twin) -> None:
    """Files with holes, and in more pieces than an inode holds."""
    twin.add(b"/sparse")
    twin.write(b"/sparse", 10 * MiB + 5, noise(5000))
    twin.write(b"/sparse", 3 * MiB - 7, noise(14))
    for index in range(1, 7):
        twin.add(b"/pieces-%d" % index)
        for piece in range(index):
            twin.write(b"/pieces-%d" % index, piece * 3 * PAGE, noise(100, piece))
    for path in (b"/many-1", b"/many-2"):
        twin.add(path)
    order = list(range(1200))
    random.Random(5).shuffle(order)
    for page in order[:900]:  # from both ends of the file, so that the tree splits everywhere
        twin.write((b"/many-1", b"/many-2")[page % 2], page * PAGE + 1, noise(9, page))


def add_names(twin: Twin) -> None:
    """A directory of 5,000 names, long ones among them, and names that are not text."""
    twin.add(b"/many", stat.S_IFDIR | 0o1777)
    for index in range(5000):
        twin.add(b"/many/" + (b"%d-" % index).ljust(index % 56 + 200, b"n"), caller=Caller(index, index + 1))
    twin.add(b"/odd", stat.S_IFDIR | 0o700)
    for name in (b"\xff\xfe", b"\x01", b" ", b"...", b"\n", "\u00e4\U0001f4be".encode(), b"\xc3", b"x" * 255, b"a\\b"):
        twin.add(b"/odd/" + name, content=name)
    path = b""
    for _ in range(40):
        path += b"/" + b"d" * 100
        twin.add(path, stat.S_IFDIR | 0o755)


def add_specials(twin: Twin) -> None:
    """Everything that is not a regular file or a directory, and second names."""
    for size in (1, 119, 120, 121, 4095):
        twin.add(b"/symlink-%d" % size, stat.S_IFLNK | 0o777, target=b"/" + b"\xe9" * (size - 1))
    for name, kind, major, minor in (
        (b"/tty", stat.S_IFCHR, 5, 0), (b"/disk", stat.S_IFBLK, 259, 0xABCDE), (b"/last", stat.S_IFCHR, 0xFFF, 0xFFFFF),
    ):  # fmt: skip
        twin.add(name, kind | 0o660, rdev=minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
    twin.add(b"/fifo", stat.S_IFIFO | 0o600)
    twin.add(b"/socket", stat.S_IFSOCK | 0o755)
    twin.add(b"/setuid", stat.S_IFREG | 0o6755, Caller(2**32 - 2, 2**31))
    for index in range(50):
        twin.link(b"/setuid", b"/odd/link-%d" % index)
    twin.link(b"/fifo", b"/odd/fifo")


def add_xattrs(twin: Twin) -> None:
    """Attributes of the sizes at which something changes, and so many that they need a tree."""
    for index, path in enumerate((b"/setuid", b"/many", b"/symlink-120", b"/symlink-121", b"/", b"/disk")):
        twin.setxattr(path, b"user.small", b"%d" % index)
        twin.setxattr(path, b"user.empty", b"")
        for size in (511, 512, 513, 4096, 4097, 65536):
            twin.setxattr(path, b"trusted.%d" % size, noise(size, index))
    for index in range(120):
        twin.setxattr(b"/fifo", (b"user.%d." % index).ljust(255, b"\xfe"), noise(index * 5))
    twin.setxattr(b"/fifo", b"user.replaced", noise(65536))
    twin.setxattr(b"/fifo", b"user.replaced", noise(7))


def add_orphans(twin: Twin) -> None:
    """Files and a directory that lost their names while they were open; and some that are gone."""
    for index in range(30):
        twin.add(b"/orphan", content=noise(index * 1000, index))
        twin.setxattr(b"/orphan", b"user.a", noise(index * 100))
        twin.remove(b"/orphan", is_open=index % 2 == 0)
    twin.add(b"/orphan", stat.S_IFDIR | 0o700)
    twin.remove(b"/orphan", is_open=True)
    twin.add(b"/orphan", stat.S_IFLNK | 0o777, target=b"t" * 3000)
    twin.remove(b"/orphan", is_open=True)


def add_domains(twin: Twin) -> None:
    """Domains with many mappings, also of files that lost their names; and a device."""
    for name in (b"/iommu/empty", b"/iommu/dom-0"):
        twin.add(name)
    domain = twin.files[b"/iommu/dom-0"]
    twin.fs.setattr(domain.ino, SetAttr(size=2 * MiB))
    domain.content = b"\1" + bytes(2 * MiB - 1)
    for index in range(300):
        map_file(twin.fs, domain.ino, index * 5, twin.files[b"/sizes/4097" if index % 2 else b"/pieces-3"].ino)
    twin.add(b"/mapped", content=noise(9000))
    map_file(twin.fs, domain.ino, 5000, twin.files[b"/mapped"].ino, 1, 2)
    twin.orphans[twin.files[b"/mapped"].ino] = twin.files[b"/mapped"]
    twin.remove(b"/mapped")
    attach(twin.fs, 0x10028, domain.ino)


@pytest.fixture(scope="module")
def twin() -> Iterator[Twin]:
    """A filesystem with everything; its tests only read."""
    twin = Twin(96 * MiB)
    for step in (add_sizes, add_sparse, add_names, add_specials, add_xattrs, add_domains, add_orphans):
        step(twin)
        assert Reader(twin.region.view).free_pages() == twin.fs.statfs().free, step.__name__
    yield twin
    twin.fs.close()


@pytest.fixture(scope="module")
def reader(twin: Twin) -> Reader:
    """The reader of a copy of it."""
    return Reader(bytes(twin.region.view))


@pytest.fixture(scope="module")
def tree(reader: Reader) -> dict[bytes, Entry]:
    """What the reader found."""
    return reader.tree()


def test_crc32c() -> None:
    # RFC 3720, B.4, and the check value of the catalogue of CRCs
    assert [crc32c(bytes(32)), crc32c(b"\xff" * 32), crc32c(bytes(range(32)))] == [0x8A9136AA, 0x62A8AB43, 0x46DD794E]
    assert crc32c(b"123456789") == crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def test_superblock(twin: Twin, reader: Reader) -> None:
    made = twin.superblock
    assert (reader.uuid, reader.label, reader.seed, reader.phys_base) == (UUID_1.bytes, "twin", SEED, 0)
    assert (reader.blocks, reader.table_pages, reader.first_block) == (48, 1, made.first_block)
    assert (reader.journal, reader.created) == (made.journal_offset, made.created)
    assert (reader.mounts, reader.replayed) == (0, 0)  # a server counts the mounts, Filesystem does not


def test_same_paths(twin: Twin, tree: dict[bytes, Entry]) -> None:
    assert tree.keys() == twin.files.keys()


def test_attributes_as_put_in(twin: Twin, tree: dict[bytes, Entry]) -> None:
    many = {path for path in tree if path.startswith(b"/many/")}
    for path, entry in tree.items():
        file = twin.files[path]
        assert (entry.ino, entry.mode, entry.rdev, entry.target) == (file.ino, file.mode, file.rdev, file.target), path
        assert (entry.uid, entry.gid) == (file.caller.uid, file.caller.gid), path
        assert entry.xattrs == file.xattrs, path
        assert entry.nlink == (1 if path in many else twin.nlink(path)), path
    assert (os.major(tree[b"/last"].rdev), os.minor(tree[b"/last"].rdev)) == (0xFFF, 0xFFFFF)


def test_content_as_put_in(twin: Twin, tree: dict[bytes, Entry], reader: Reader) -> None:
    for path, entry in tree.items():
        if stat.S_ISREG(entry.mode):
            content = twin.files[path].content
            assert (entry.size, entry.digest) == (len(content), hashlib.sha256(content).hexdigest()), path
            for offset, length in ((0, 10), (4090, 4100), (len(content) - 3, 10), (len(content) + 1, 5)):
                assert reader.read(entry.ino, max(offset, 0), length) == content[max(offset, 0) :][:length], path


def test_attributes_as_the_api_says(twin: Twin, tree: dict[bytes, Entry], reader: Reader) -> None:
    for path, entry in tree.items():
        assert twin.fs.resolve(path) == entry.ino
        said, found = twin.fs.getattr(Ino(entry.ino)), reader.inode(entry.ino)
        for name in set(found._fields) - {"checksum"}:
            assert getattr(found, name) == getattr(said, name), (path, name)
        assert tuple(said[:4]) == (entry.size, entry.atime, entry.mtime, entry.ctime), path
        assert sorted(twin.fs.listxattr(Ino(entry.ino))) == sorted(entry.xattrs), path
        for key, value in entry.xattrs.items():
            assert twin.fs.getxattr(Ino(entry.ino), key) == value, (path, key)


def test_content_as_the_api_says(twin: Twin, tree: dict[bytes, Entry]) -> None:
    for path, entry in tree.items():
        if stat.S_ISREG(entry.mode):
            extents = [
                (start * PAGE, page * PAGE, count * PAGE)
                for start, page, count in twin.fs.content.extents(Ino(entry.ino))
            ]
            assert extents == entry.extents, path
            assert hashlib.sha256(twin.fs.read(Ino(entry.ino), 0, entry.size)).hexdigest() == entry.digest, path
        elif stat.S_ISLNK(entry.mode):
            assert twin.fs.readlink(Ino(entry.ino)) == entry.target, path


def test_readdir_has_the_order_of_the_tree(twin: Twin, tree: dict[bytes, Entry], reader: Reader) -> None:
    for path, entry in tree.items():
        if stat.S_ISDIR(entry.mode):
            said = [(each.name, each.ino, each.mode) for each in twin.fs.readdir(Ino(entry.ino))]
            assert said == reader.directory(entry.ino), path


def test_the_trees_are_deep_enough_to_tell(tree: dict[bytes, Entry], reader: Reader) -> None:
    def level(page: int) -> int:
        return int(struct.unpack_from("<H", reader.bytes_at(page * PAGE, PAGE), 26)[0])

    assert level(reader.inode(tree[b"/many"].ino).root) == 2
    assert level(reader.inode(tree[b"/many-1"].ino).root) == 1
    assert level(reader.inode(tree[b"/fifo"].ino).xattrs) == 1
    roots = [bool(reader.inode(tree[b"/pieces-%d" % count].ino).root) for count in range(1, 7)]
    assert roots == [False] * 5 + [True]
    assert [len(tree[b"/pieces-%d" % count].extents) for count in range(1, 7)] == list(range(1, 7))


def test_held_files() -> None:
    """Why and since when; the feature is that of the region, and the record is none of the file's attributes."""
    twin = Twin(16 * MiB)
    twin.add(b"/ram", content=noise(5000))
    twin.setxattr(b"/ram", b"user.x", b"y")
    before = Reader(twin.region.view)
    assert (before.tree()[b"/ram"].held, before.ro_compat & 4) == (None, 0)
    twin.fs.holds.hold(twin.files[b"/ram"].ino, "g1 is saved")
    reader = Reader(twin.region.view)
    found = reader.tree()
    assert found[b"/ram"].held == (found[b"/ram"].ctime, "g1 is saved")
    assert found[b"/ram"].xattrs == {b"user.x": b"y"}
    assert [path for path, entry in found.items() if entry.held] == [b"/ram"]
    twin.fs.holds.release(twin.files[b"/ram"].ino)
    assert Reader(twin.region.view).tree()[b"/ram"].held is None


def test_orphans(twin: Twin, reader: Reader) -> None:
    found = reader.orphans()
    assert found.keys() == twin.orphans.keys() == set(twin.fs.orphans.inos())
    for ino, entry in found.items():
        file = twin.orphans[ino]
        assert (entry.mode, entry.nlink, entry.target, entry.xattrs) == (file.mode, 0, file.target, file.xattrs)
        assert entry.digest == hashlib.sha256(file.content).hexdigest()


def test_pins(twin: Twin, tree: dict[bytes, Entry], reader: Reader) -> None:
    domain = tree[b"/iommu/dom-0"]
    records = Records(twin.fs.volume, Ino(domain.ino)).mappings()
    wanted = [(key * PAGE, m.ino, m.start * PAGE, m.length * PAGE, m.access) for key, m in records]
    assert domain.mappings == wanted
    assert len(wanted) == 301
    pins = reader.pinned()
    assert sorted(pins.values()) == [1, 150, 150]
    assert pins == {ino: twin.fs.getattr(Ino(ino)).iommu for ino in pins}
    assert reader.attachments() == {0x10028: domain.ino}


def test_every_slot_and_page_is_accounted_for(tree: dict[bytes, Entry], reader: Reader) -> None:
    orphans = reader.orphans()
    assert reader.used_inodes() == {entry.ino for entry in tree.values()} | set(orphans) | {2}
    assert reader.unowned_pages() == set()


def test_mount_frees_the_orphans(twin: Twin, tree: dict[bytes, Entry], reader: Reader) -> None:
    region = MemoryRegion(image=reader.image)
    fs = open_filesystem(region)
    reader = Reader(region.view)
    assert reader.tree() == tree
    assert [entry.pins for entry in reader.orphans().values()] == [1]
    assert reader.unowned_pages() == set()
    assert reader.free_pages() == fs.statfs().free > twin.fs.statfs().free
    fs.close()


def test_nothing_is_left_when_all_is_removed(twin: Twin) -> None:
    region = MemoryRegion(image=twin.region.view)
    fs = open_filesystem(region)
    detach(fs, 0x10028)
    for path in sorted(twin.files, reverse=True):
        if path not in (b"/", b"/iommu", b"/iommu/root-pgtables"):
            parent, _, name = path.rpartition(b"/")
            remove = fs.rmdir if stat.S_ISDIR(twin.files[path].mode) else fs.unlink
            remove(fs.resolve(parent or b"/"), name)
    for name in twin.files[b"/"].xattrs:
        fs.removexattr(ROOT_INO, name)
    empty = Twin(96 * MiB)
    reader = Reader(region.view)
    assert reader.tree().keys() == empty.files.keys()
    assert reader.unowned_pages() == set()
    assert reader.free_pages() == fs.statfs().free == empty.fs.statfs().free
    fs.close()


def fill(fs: Filesystem, ino: Ino) -> int:
    """Write to a file until a write raises ENOSPC; how many bytes it took."""
    offset = 0
    with pytest.raises(FsError, check=lambda error: error.errno == errno.ENOSPC):  # noqa: PT012  # any of them may
        while True:
            offset += fs.write(ino, offset, bytes(100_000))
    return offset


def test_free_pages_of_a_full_region() -> None:
    twin = Twin(16 * MiB)
    ino = twin.add(b"/all")
    offset = fill(twin.fs, ino)
    reader = Reader(twin.region.view)
    assert reader.tree()[b"/all"].size == offset
    assert reader.unowned_pages() == set()
    assert reader.free_pages() == twin.fs.statfs().free < 40  # what is left is kept back for trees
    twin.fs.setattr(ino, SetAttr(size=5 * MiB))
    reader = Reader(twin.region.view)
    assert reader.free_pages() == twin.fs.statfs().free > 5 * MiB // PAGE
    assert sum(count for _, _, count in reader.extents(ino)) == 6 * MiB // PAGE  # a block belongs to one file, whole


def unlink_open(fs: Filesystem, directory: Ino, file: Ino) -> None:
    """Make an orphan."""
    fs.lookups.add(file)
    fs.unlink(directory, b"file")


# Operations of one transaction each, on a directory and its file of six pieces, and a file of a whole block.
TRANSACTIONS: dict[str, Callable[[Filesystem, Ino, Ino], object]] = {
    "create": lambda fs, d, f: fs.create(d, b"new", stat.S_IFREG | 0o600, OWNER),
    "mkdir": lambda fs, d, f: fs.create(d, b"new", stat.S_IFDIR | 0o700, OWNER),
    "symlink": lambda fs, d, f: fs.create(d, b"new", stat.S_IFLNK | 0o777, OWNER, target=b"t" * 3000),
    "link": lambda fs, d, f: fs.link(f, d, b"new"),
    "unlink": lambda fs, d, f: fs.unlink(d, b"file"),
    "unlink-open": unlink_open,
    "rmdir": lambda fs, d, f: fs.rmdir(d, b"empty"),
    "rename": lambda fs, d, f: fs.rename(d, b"file", ROOT_INO, b"moved"),
    "rename-over": lambda fs, d, f: fs.rename(ROOT_INO, b"other", d, b"file"),
    "rename-over-block": lambda fs, d, f: fs.rename(d, b"file", ROOT_INO, b"other"),
    "rename-directory": lambda fs, d, f: fs.rename(ROOT_INO, b"dir", ROOT_INO, b"moved"),
    "chown": lambda fs, d, f: fs.setattr(f, SetAttr(uid=7, gid=8)),
    "truncate": lambda fs, d, f: fs.setattr(f, SetAttr(size=1)),
    "grow": lambda fs, d, f: fs.setattr(f, SetAttr(size=3 * MiB)),
    "setxattr": lambda fs, d, f: fs.setxattr(f, b"user.new", noise(65536)),
    "replace-xattr": lambda fs, d, f: fs.setxattr(f, b"user.old", noise(5000, 2)),
    "removexattr": lambda fs, d, f: fs.removexattr(f, b"user.old"),
    "truncate-block": lambda fs, d, f: fs.setattr(fs.resolve(b"/other"), SetAttr(size=5)),
    "unlink-block": lambda fs, d, f: fs.unlink(ROOT_INO, b"other"),
    "append": lambda fs, d, f: fs.write(f, 100_000, noise(5000)),
    "append-block": lambda fs, d, f: fs.write(f, 2 * MiB, noise(2 * MiB)),
}

State = tuple[dict[bytes, tuple[Entry, str]], dict[int, Entry], int]


def state(image: bytearray | memoryview) -> State:
    """Everything that the reader says about an image."""
    reader = Reader(image)
    tree, orphans = reader.tree(), reader.orphans()
    assert reader.used_inodes() == {entry.ino for entry in tree.values()} | set(orphans) | {2}
    assert reader.unowned_pages() == set()
    return {path: (entry, entry.digest) for path, entry in tree.items()}, orphans, reader.free_pages()


@pytest.mark.parametrize("name", TRANSACTIONS)
def test_the_commit_record_is_the_moment(name: str) -> None:
    region = RecordingRegion(16 * MiB)
    mkfs(region, hash_seed=SEED)
    fs = open_filesystem(region)
    directory = fs.create(ROOT_INO, b"dir", stat.S_IFDIR | 0o755, OWNER)
    file = fs.create(directory, b"file", stat.S_IFREG | 0o644, OWNER)
    for piece in range(6):
        fs.write(file, piece * 3 * PAGE, noise(5, piece))
    fs.setxattr(file, b"user.old", noise(5000))
    fs.create(directory, b"empty", stat.S_IFDIR | 0o755, OWNER)
    fs.write(fs.create(ROOT_INO, b"other", stat.S_IFREG | 0o644, OWNER), 0, noise(2 * MiB))
    image, before = bytearray(region.view), state(region.view)
    region.log.clear()
    TRANSACTIONS[name](fs, directory, file)
    after = state(region.view)
    assert before != after

    commit = Reader(image).journal + PAGE
    commits = [i for i, store in enumerate(region.log) if store.offset == commit and store.data[0] % 2]
    assert len(commits) == 1
    for index, store in enumerate(region.log):
        assert not (store.offset == commit and not store.word)
        image[store.offset : store.offset + len(store.data)] = store.data
        if index < commits[0]:
            assert state(image) == before, f"after {index + 1} stores"
        else:
            assert state(image) == after, f"after {index + 1} stores"
            checkpointed = any(store.offset == commit for store in region.log[commits[0] + 1 : index + 1])
            assert bool(Reader(image).replayed) != checkpointed
        if index == commits[0]:
            recovered = MemoryRegion(image=image)
            open_filesystem(recovered)
            assert (state(recovered.view)[0], Reader(recovered.view).replayed) == (after[0], 0)


def small_image() -> tuple[bytearray, Reader]:
    """A small filesystem, with a tree of each kind."""
    twin = Twin(8 * MiB)
    twin.add(b"/d", stat.S_IFDIR | 0o755)
    for index in range(200):
        twin.add(b"/d/%d" % index)
    twin.setxattr(b"/d/0", b"user.big", noise(5000))
    map_file(twin.fs, twin.add(b"/iommu/dom-0"), 3, twin.add(b"/d/mapped", content=b"m"))
    image = bytearray(twin.region.view)
    return image, Reader(image)


PLACES: dict[str, Callable[[Reader, dict[bytes, Entry]], int]] = {
    "superblock": lambda reader, tree: 40,
    "copy-of-superblock": lambda reader, tree: reader.journal + 40,
    "far-copy-of-superblock": lambda reader, tree: reader.far_copy + 40,
    "block-table": lambda reader, tree: PAGE + 4000,
    "slab-header": lambda reader, tree: tree[b"/d"].ino // 8192 * 512 * PAGE + 4000,
    "inode": lambda reader, tree: tree[b"/d/7"].ino * 256 + 130,
    "reserved-inode": lambda reader, tree: 2 * 256 + 130,
    "tree-root": lambda reader, tree: reader.inode(tree[b"/d"].ino).root * PAGE + 4095,
    "attribute-node": lambda reader, tree: reader.inode(tree[b"/d/0"].ino).xattrs * PAGE + 4095,
    "records": lambda reader, tree: reader.inode(tree[b"/iommu/dom-0"].ino).iommu * PAGE + 4095,
    "attribute-value": lambda reader, tree: next(
        page * PAGE + 4999 % PAGE for page in sorted(reader.owners, reverse=True)
        if reader.slab(page // 512).kinds[page % 512] == 5
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_one_wrong_bit_is_found(place: str) -> None:
    image, reader = small_image()
    tree = reader.tree()
    image[PLACES[place](reader, tree)] ^= 0x10
    with pytest.raises(Corrupt):
        state(image)


def test_listing(tmp_path: Path) -> None:
    image, reader = small_image()
    path = tmp_path / "image"
    path.write_bytes(image)
    command = [sys.executable, "-m", "tests.reader", str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"label 'twin', 4 blocks, {reader.free_pages()} pages free, 0 records of the journal applied"
    assert len(lines) == 1 + len(reader.tree())
    assert any(line.endswith(" /d/199") and "-rw-r--r--" in line for line in lines)
