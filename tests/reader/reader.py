"""The second reader of the format, to hold the filesystem's own code against.

Written from the documentation in pkernfs/format.py alone: standard library only, nothing from pkernfs, every offset and
constant stated again, so that a mistake would have to be made twice to go unseen.  It reads an image and never writes:
a sealed journal is applied to private copies of pages.  It believes nothing: each checksum, address and count that it
meets is checked, and Corrupt says where it was.  Simple before fast; for images of some hundred MiB.

    python -m tests.reader IMAGE    prints a listing
"""

import hashlib
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from tests.reader.on_region import (
    ATTACHMENT,
    AWAITING,
    BLOCK,
    CONTENT_AWAITS,
    DATA,
    DIRENT,
    DOMAIN,
    EXTENT,
    EXTENT_VALUE,
    F_DOMAIN,
    F_HELD,
    F_ROOT_TABLES,
    FIRST_SLOT,
    HELD_FILES,
    INODE,
    IOMMU,
    MAPPING,
    ORPHANS,
    P_DATA,
    P_INODES,
    P_NODE,
    P_XATTR,
    PAGE,
    PENDING,
    ROOT,
    ROOT_TABLES,
    SLAB,
    XATTR,
    Inode,
    crc32c,
)
from tests.reader.space import Image, Space, expect

F_TABLES = F_ROOT_TABLES | F_DOMAIN


@dataclass(frozen=True)
class Entry:
    """All that the image says about one file.  Two names of one file give equal entries."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int  #: the kernel's new_encode_dev, which is also what os.major and os.minor take
    size: int
    atime: int  #: ns since the epoch, as mtime and ctime
    mtime: int
    ctime: int
    parent: int  #: of a directory, else 0
    target: bytes  #: of a symbolic link, else empty
    xattrs: dict[bytes, bytes]
    held: tuple[int, str] | None  #: since when (ns since the epoch) and why nobody can change it
    extents: list[tuple[int, int, int]]  #: (file offset, region offset, length), in bytes
    pins: int  #: mappings that name the file
    mappings: list[tuple[int, int, int, int, int]]  #: of a domain: (IOVA, inode, file offset, length, access)
    reader: "Reader" = field(repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of a regular file, in hex; read when it is first asked for."""
        digest = hashlib.sha256()
        for offset in range(0, self.size if stat.S_ISREG(self.mode) else 0, BLOCK):
            digest.update(self.reader.read(self.ino, offset, BLOCK))
        return digest.hexdigest()


class Reader(Space):
    """The filesystem in ``image``.  Raises Corrupt from any method."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.maps: dict[int, list[tuple[int, int, int]]] = {}  #: inode number: its extents, once they were asked for
        self.owners: dict[int, int] = {}  #: page number: the inode that was seen to own it

    def unowned_pages(self) -> set[int]:
        """Pages in use for content, trees and attributes that none of the files read so far owns."""
        used = {b * 512 + i for b, kind in enumerate(self.kinds) if kind == DATA for i in range(512)}
        for block in (block for block, kind in enumerate(self.kinds) if kind == SLAB):
            used.update(block * 512 + i for i, kind in enumerate(self.slab(block).kinds) if kind >= P_NODE)
        return used - self.owners.keys() - ({self.far_copy // PAGE} if self.far_copy else set())

    def _own(self, ino: int, page: int, count: int, kind: int) -> None:
        """Note that ``count`` pages belong to ``ino``; ``kind``: what their slab must say if they are in one."""
        for each in range(page, page + count):
            block = each // 512
            expect(f"page {each} of inode {ino}: in the region", self.first_block <= block < self.blocks, True)
            if kind != P_DATA or self.kinds[block] != DATA:
                expect(f"page {each} of inode {ino}: kind", self.slab(block).kinds[each % 512], kind)
            expect(f"page {each}: owner", self.owners.setdefault(each, ino), ino)

    def inode(self, ino: int) -> Inode:
        """The inode in slot ``ino``, which must be in use."""
        if ino >= FIRST_SLOT:
            slab, page = self.slab(ino // 8192), ino // 16 % 512
            expect(f"inode {ino}: kind of its page", slab.kinds[page], P_INODES)
            expect(f"inode {ino}: slot in use", slab.slots[page] >> ino % 16 & 1, 1)
        data = self.bytes_at(ino * 256, 256)
        inode = Inode(*INODE.unpack(data))
        expect(f"inode {ino}: checksum", crc32c(bytes(4) + data[36:], ino & 0xFFFFFFFF), inode.checksum)
        expect(f"inode {ino}: mode is 0", inode.mode == 0, False)
        return inode

    def walk(self, ino: int, page: int, level: int | None = None) -> Iterator[tuple[int, bytes]]:
        """The keys and values of the tree below node ``page`` (0: empty) of inode ``ino``, in order."""
        if page == 0:
            return
        self._own(ino, page, 1, P_NODE)
        data, count, found_level = self.page(page, 0x65646F6E, ino)
        expect(f"node {page}: level", found_level, found_level if level is None else level)
        keys = struct.unpack_from(f"<{count}Q", data, 32)
        at = 32 + 8 * count
        if found_level == 0:
            lengths = struct.unpack_from(f"<{count}H", data, at)
            at += 2 * count
            expect(f"node {page}: values fit", at + sum(lengths) <= PAGE, True)
            for key, length in zip(keys, lengths, strict=True):
                yield key, data[at : at + length]
                at += length
            return
        for index, child in enumerate(struct.unpack_from(f"<{count}Q", data, at)):
            low = keys[index] if index else 0
            high = keys[index + 1] if index + 1 < count else 1 << 64
            for key, value in self.walk(ino, child, found_level - 1):
                expect(f"node {page}: key of a child in its range", low <= key < high, True)
                yield key, value

    def _items(self, ino: int, root: int) -> list[tuple[int, bytes]]:
        items = list(self.walk(ino, root))
        expect(f"inode {ino}: keys ascend", [key for key, _ in items], sorted({key for key, _ in items}))
        return items

    def _named(self, ino: int, key: int, name: bytes) -> bytes:
        """``name``, checked to stand under one of its 64 keys."""
        digest = hashlib.blake2b(name, digest_size=8, key=self.seed).digest()
        expect(f"inode {ino}: key of {name!r}", key & ~63, int.from_bytes(digest, "little") & 0x3FFFFFFFFFFFFFC0)
        return name

    def directory(self, ino: int) -> list[tuple[bytes, int, int]]:
        """(name, inode number, S_IFMT bits) of the entries, in the order of their cookies."""
        inode, entries = self.inode(ino), []
        for key, value in self._items(ino, inode.root):
            number, mode, length = DIRENT.unpack_from(value)
            name = self._named(ino, key, value[16:])
            expect(f"directory {ino}: {name!r} is a name", 1 <= len(name) <= 255 and not set(name) & {0, 0x2F}, True)
            expect(f"directory {ino}: {name!r}: length", length, len(name))
            entries.append((name, number, mode))
        expect(f"directory {ino}: size", inode.size, len(entries))
        expect(f"directory {ino}: names differ", len({name for name, _, _ in entries}), len(entries))
        return entries

    def extents(self, ino: int) -> list[tuple[int, int, int]]:
        """(first page of the file, page of the region, pages) of the content, in order."""
        if ino in self.maps:
            return self.maps[ino]
        inode, found, end = self.inode(ino), [], 0
        if not stat.S_ISREG(inode.mode) and (not stat.S_ISLNK(inode.mode) or inode.size <= 120):
            return []
        if inode.root:
            found = [(key, *EXTENT_VALUE.unpack(value)) for key, value in self._items(ino, inode.root)]
        else:
            found = list(EXTENT.iter_unpack(inode.inline))
            while found and found[-1] == (0, 0, 0):
                found.pop()
        for start, page, count in found:
            expect(f"inode {ino}: extent at {start} is in order and not empty", start >= end and count > 0, True)
            self._own(ino, page, count, P_DATA)
            end = start + count
        self.maps[ino] = found
        return found

    def read(self, ino: int, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes of a file's content, fewer at its end; what no extent covers is zero."""
        end = min(offset + length, self.inode(ino).size)
        content = bytearray(max(0, end - offset))
        for start, page, count in self.extents(ino):
            low, high = max(offset, start * PAGE), min(end, (start + count) * PAGE)
            if low < high:
                content[low - offset : high - offset] = self.bytes_at((page - start) * PAGE + low, high - low)
        return bytes(content)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """The extended attributes."""
        found: dict[bytes, bytes] = {}
        for key, data in self._items(ino, self.inode(ino).xattrs):
            length, external, _, size, checksum, _ = XATTR.unpack_from(data)
            name, value = self._named(ino, key, data[16 : 16 + length]), data[16 + length :]
            expect(f"inode {ino}: attribute {name!r}: external", external, int(size > 512))
            if external:
                runs = list(EXTENT_VALUE.iter_unpack(value))
                for page, count in runs:
                    self._own(ino, page, count, P_XATTR)
                expect(f"inode {ino}: attribute {name!r}: pages", sum(count for _, count in runs), -(-size // PAGE))
                value = b"".join(self.bytes_at(page * PAGE, count * PAGE) for page, count in runs)[:size]
            expect(f"inode {ino}: attribute {name!r}: size", len(value), size)
            expect(f"inode {ino}: attribute {name!r}: checksum", checksum, crc32c(value) if external else 0)
            expect(f"inode {ino}: attribute {name!r}: seen before", name in found, False)
            found[name] = value
        return found

    def mappings(self, ino: int) -> list[tuple[int, int, int, int, int]]:
        """(IOVA, inode, file offset, length, access) of a domain, in bytes; of all others nothing."""
        inode, found, end = self.inode(ino), [], 0
        if not inode.flags & F_DOMAIN:
            return []
        for key, value in self._items(ino, inode.iommu):
            if key == 15 << 60:
                tables, levels, leaf, _, number, root, _ = DOMAIN.unpack(value)
                sound = tables < 2 and 3 <= levels <= 5 and 1 <= leaf <= 3 and 0 < number < 0xFFFF
                expect(f"domain {ino}: record", sound and root * PAGE <= inode.size, True)
                continue
            expect(f"domain {ino}: key {key:#x} behind the mapping before", end <= key < 1 << 45, True)
            file, start, count, access, reserved = MAPPING.unpack(value)
            expect(f"domain {ino}: mapping at {key:#x}", count > 0 and 0 < access < 4 and not reserved, True)
            end = key + count
            found.append((key * PAGE, file, start * PAGE, count * PAGE, access))
        return found

    def attachments(self) -> dict[int, int]:
        """The domain that each device is attached to, by segment << 16 | bus << 8 | device << 3 | function."""
        found = {}
        for key, value in self._items(ROOT_TABLES, self.inode(ROOT_TABLES).iommu):
            if key >> 60 == 2:
                domain, number, _ = ATTACHMENT.unpack(value)
                expect(f"device {key & 0xFFFFFFFF:#x}: its domain", self.inode(domain).flags & F_DOMAIN, F_DOMAIN)
                expect(f"device {key & 0xFFFFFFFF:#x}: id of the domain", 0 < number < 0xFFFF, True)
                found[key - (2 << 60)] = domain
        return found

    def awaiting(self) -> list[tuple[int, int, int, int]]:
        """(inode, domain id, file offset, length) of content that awaits an invalidation, which must be pending."""
        found, pending = [], set()
        for key, value in self._items(ROOT_TABLES, self.inode(ROOT_TABLES).iommu):
            if 3 << 60 <= key < 6 << 60:
                pending.add(PENDING.unpack(value)[1])
            elif 8 << 60 <= key < 9 << 60:
                ino, number = divmod(key - (8 << 60), 1 << 16)
                start, count = AWAITING.unpack(value)
                expect(f"inode {ino}: what awaits", count > 0 and (start + count) * PAGE <= 1 << 48, True)
                found.append((ino, number, start * PAGE, count * PAGE))
        expect("ids of what is pending", {number for _, number, _, _ in found} <= pending, True)
        expect("feature of content that awaits", bool(found) and not self.ro_compat & CONTENT_AWAITS, False)
        return found

    def pinned(self) -> dict[int, int]:
        """How many mappings name each file, and what awaits an invalidation; compared with what the file counts.

        Mappings are also compared with its memory.
        """
        files = {entry.ino: entry for entry in self.tree().values()} | self.orphans()
        pins: Counter[int] = Counter()
        for domain in files.values():
            for iova, ino, offset, length, _ in domain.mappings:
                what = f"domain {domain.ino}: IOVA {iova:#x}"
                expect(f"{what}: a regular file", ino in files and stat.S_ISREG(files[ino].mode), True)
                pins[ino] += 1
                there = sum(
                    max(0, min(start + count, offset + length) - max(start, offset))
                    for start, _, count in files[ino].extents
                )
                expect(f"{what}: memory of inode {ino}", there, length)
                expect(f"{what}: within inode {ino}", offset + length <= -(-files[ino].size // PAGE) * PAGE, True)
        for ino, *_ in self.awaiting():
            expect(f"inode {ino} awaits: a regular file", ino in files and stat.S_ISREG(files[ino].mode), True)
            pins[ino] += 1
        for ino, entry in files.items():
            expect(f"inode {ino}: pins", entry.pins, pins[ino])
        return dict(pins)

    def _held(self, ino: int, inode: Inode, record: bytes | None) -> tuple[int, str] | None:
        """Since when and why a file is held; flag, record and the region's feature go together."""
        expect(f"inode {ino}: a record of a hold", record is not None, bool(inode.flags & F_HELD))
        if record is None:
            return None
        expect(f"inode {ino}: held, a regular file", stat.S_ISREG(inode.mode) and not inode.flags & F_TABLES, True)
        expect(f"inode {ino}: bytes of the reason", 1 <= len(record) - 8 <= 255, True)
        expect("the feature of held files", self.ro_compat & HELD_FILES, HELD_FILES)
        return int.from_bytes(record[:8], "little", signed=True), record[8:].decode()

    def entry(self, ino: int) -> Entry:
        """The file ``ino``."""
        inode = self.inode(ino)
        target = b""
        if ino == ROOT_TABLES:
            self.attachments()
        if stat.S_ISLNK(inode.mode):
            target = inode.inline[: inode.size] if inode.size <= 120 else self.read(ino, 0, inode.size)
        xattrs = self.xattrs(ino)
        held = self._held(ino, inode, xattrs.pop(b"pkernfs.hold", None))
        return Entry(
            ino, *inode[5:7], *inode[8:11], *inode[:4], inode.parent, target, xattrs, held,
            [(start * PAGE, page * PAGE, count * PAGE) for start, page, count in self.extents(ino)],
            0 if inode.flags & F_TABLES else inode.iommu, self.mappings(ino), self,
        )  # fmt: skip

    def tree(self) -> dict[bytes, Entry]:
        """All files by path: b"/", b"/a", b"/a/b".  Compares names with inodes, and pages with their owners."""
        files = {b"/": self.entry(ROOT)}
        names: Counter[int] = Counter()
        waiting = [(b"/", ROOT)]
        while waiting:
            path, directory = waiting.pop()
            for name, ino, mode in self.directory(directory):
                below = path + name
                entry = files[below] = self.entry(ino)
                names[ino] += 1
                expect(f"type of {below!r} in its directory", mode, stat.S_IFMT(entry.mode))
                flags = F_ROOT_TABLES if ino == ROOT_TABLES else F_DOMAIN if directory == IOMMU else 0
                expect(f"{below!r} holds page tables", self.inode(ino).flags & F_TABLES, flags)
                if stat.S_ISDIR(mode):
                    expect(f"parent of {below!r}", (entry.parent, names[ino], ino == ROOT), (directory, 1, False))
                    waiting.append((below + b"/", ino))
        for path, entry in files.items():
            if not stat.S_ISDIR(entry.mode):
                expect(f"nlink of {path!r}", entry.nlink, names[entry.ino])
        self._count_pages({entry.ino for entry in files.values()})
        return files

    def orphans(self) -> dict[int, Entry]:
        """The files without a name that were still open, by inode number; and those to be cut, which have names."""
        found: dict[int, Entry] = {}
        before, ino = ORPHANS, self.inode(ORPHANS).orphan_next
        while ino != ORPHANS:
            expect(f"orphan {ino}: listed twice", ino in found, False)
            expect(f"orphan {ino}: the one before it", self.inode(ino).orphan_prev, before)
            found[ino] = self.entry(ino)
            before, ino = ino, self.inode(ino).orphan_next
        expect("the end of the list of orphans", self.inode(ORPHANS).orphan_prev, before)
        self._count_pages({ORPHANS, *found})
        return found

    def _count_pages(self, inodes: set[int]) -> None:
        owned = Counter(self.owners.values())
        for ino in inodes:
            expect(f"inode {ino}: pages", self.inode(ino).pages, owned[ino])
