"""The format: sizes, known encodings, and an image that must not change."""

import hashlib
import struct
import time
import uuid
from typing import Any, NamedTuple

import pytest

from pkernfs import format as f
from pkernfs.errors import CorruptError
from pkernfs.format import Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.mkfs import mkfs
from pkernfs.fs.pages import check_page, encode_inode, encode_page, read_inode
from pkernfs.iommu.guard import open_filesystem
from pkernfs.layout import Layout, bytes16, i64, layout, u8, u16, u32, u64
from pkernfs.region import MemoryRegion, read_superblock
from pkernfs.region.superblock import encode_superblock
from tests.core.support import ME, ROOT, SECOND, MiB, mkdir, mkfile

# -- layout -----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A record with a field of each type."""

    a: u8
    b: u8
    c: u16
    d: u32
    e: u64
    f: i64
    g: bytes16


def test_a_layout_packs_little_endian_without_gaps() -> None:
    codec = layout(Sample, size=40)
    sample = Sample(1, 2, 3, 4, 5, -6, b"seven")
    raw = codec.pack(sample)
    assert raw == bytes.fromhex("01 02 0300 04000000 0500000000000000 faffffffffffffff") + b"seven".ljust(16, b"\0")
    assert codec.unpack(b"xx" + raw, 2) == sample._replace(g=b"seven".ljust(16, b"\0"))
    assert codec.offsets == {"a": 0, "b": 1, "c": 2, "d": 4, "e": 8, "f": 16, "g": 24}


def test_a_layout_refuses_what_does_not_add_up() -> None:
    class Crooked(NamedTuple):
        a: u8
        b: u32

    with pytest.raises(TypeError, match=r"Crooked\.b stands at 1, not at a multiple of 4"):
        layout(Crooked, size=5)
    with pytest.raises(TypeError, match="Sample is 40 bytes, declared 41"):
        layout(Sample, size=41)
    with pytest.raises(struct.error):
        layout(Sample, size=40).pack(Sample(256, 0, 0, 0, 0, 0, b""))
    with pytest.raises(struct.error):
        layout(Sample, size=40).unpack(bytes(39))


# -- records ----------------------------------------------------------------------------------------------------------

OFFSETS = {
    "superblock": (f.SUPERBLOCK, 256, {"checksum": 12, "uuid": 40, "hash_seed": 120, "blocks": 136, "mounts": 192}),
    "page-header": (f.PAGE_HEADER_LAYOUT, 32, {"magic": 0, "checksum": 4, "offset": 8, "owner": 16, "level": 26}),
    "inode": (f.INODE, 256, {"size": 0, "ctime": 24, "checksum": 32, "mode": 36, "root": 88, "inline": 136}),
    "extent": (f.EXTENT, 24, {"start": 0, "page": 8, "length": 16}),
    "extent-value": (f.EXTENT_VALUE, 16, {"page": 0, "length": 8}),
    "dirent": (f.DIRENT, 16, {"ino": 0, "mode": 8, "length": 12}),
    "xattr-head": (f.XATTR_HEAD, 16, {"name_length": 0, "external": 1, "size": 4, "checksum": 8}),
    "journal-header": (f.JOURNAL_HEADER, 40, {"commit": 0, "magic": 8, "checksum": 12, "sequence": 16, "records": 32}),
    "journal-record": (f.JOURNAL_RECORD, 16, {"offset": 0, "length": 8, "kind": 12}),
}


@pytest.mark.parametrize(("codec", "size", "offsets"), OFFSETS.values(), ids=OFFSETS)
def test_where_fields_stand(codec: Layout[Any], size: int, offsets: dict[str, int]) -> None:
    assert codec.size == size
    assert {name: codec.offsets[name] for name in offsets} == offsets


def test_known_checksums() -> None:
    """RFC 3720, B.4."""
    assert f.checksum(b"123456789") == 0xE3069283
    assert f.checksum(bytes(32)) == 0x8A9136AA
    assert f.checksum(bytes(range(32))) == 0x46DD794E
    assert f.checksum(b"56789", f.checksum(b"1234")) == f.checksum(b"123456789")


def test_name_keys() -> None:
    """BLAKE2b of 8 bytes, keyed; room for 64 names with one hash; never negative as a readdir cookie."""
    digest = hashlib.blake2b(b"name", digest_size=8, key=b"k" * 16).digest()
    key = f.name_key(b"k" * 16, b"name")
    assert key == int.from_bytes(digest, "little") & ((1 << 62) - 1) & ~63
    assert f.name_key(b"j" * 16, b"name") != key
    for n in range(1000):
        key = f.name_key(b"seed", b"%d" % n)
        assert key % f.KEY_SLOTS == 0
        assert 0 <= key < 1 << 62


@pytest.mark.parametrize("blocks", [4, 8, 512, 4064, 4065, 1 << 19, 1 << 24, f.MAX_BLOCKS])
def test_geometry(blocks: int) -> None:
    geo = f.geometry(blocks)
    assert geo.blocks == blocks
    assert geo.table_pages * f.TABLE_FANOUT >= blocks > (geo.table_pages - 1) * f.TABLE_FANOUT
    assert geo.journal_offset % f.BLOCK == 0
    assert geo.journal_offset >= f.PAGE + geo.table_pages * f.PAGE
    assert geo.first_block * f.BLOCK == geo.journal_offset + 2 * f.PAGE + geo.journal_size
    pages = geo.table_pages + 2 * min(blocks, f.PAGES_PER_BLOCK)
    assert geo.journal_size >= pages * (f.PAGE + f.JOURNAL_RECORD.size) + f.MiB


def test_magics_can_be_read() -> None:
    assert f.MAGIC.to_bytes(7, "big") == b"pkernfs"
    magics = [f.TABLE_MAGIC, f.SLAB_MAGIC, f.NODE_MAGIC, f.JOURNAL_MAGIC]
    assert [magic.to_bytes(4, "little") for magic in magics] == [b"btbl", b"slab", b"node", b"jrnl"]


# -- checksums of structures ------------------------------------------------------------------------------------------


def test_a_misplaced_page_is_found() -> None:
    raw = encode_page(f.NODE_MAGIC, 0x5000, 7, 0, 0, b"body")
    assert check_page(raw, f.NODE_MAGIC, 0x5000, 7, "it").offset == 0x5000
    for magic, offset, owner in ((1, 0x5000, 7), (f.NODE_MAGIC, 0x6000, 7), (f.NODE_MAGIC, 0x5000, 8)):
        with pytest.raises(CorruptError, match="expected magic, offset, owner"):
            check_page(raw, magic, offset, owner, "it")
    for at in (4, 30, 35, 4095):
        with pytest.raises(CorruptError):
            check_page(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], f.NODE_MAGIC, 0x5000, 7, "it")


def test_a_misplaced_inode_is_found(fs: Filesystem) -> None:
    ino = mkfile(fs, b"f", b"x")
    inode = read_inode(fs.region, ino)
    region = MemoryRegion(image=fs.region.view)
    region.store((ino + 1) * f.INODE_SIZE, region.read(ino * f.INODE_SIZE, f.INODE_SIZE))
    with pytest.raises(CorruptError, match="checksum"):
        read_inode(region, Ino(ino + 1))
    # The words in front may change at any time; nothing else may.
    raw = bytearray(encode_inode(ino, inode))
    for at in range(f.INODE_SIZE):
        raw[at] ^= 1
        region.store(ino * f.INODE_SIZE, raw)
        if at < f.INODE_CHECKED_AT:
            read_inode(region, ino)
        else:
            with pytest.raises(CorruptError):
                read_inode(region, ino)
        raw[at] ^= 1


# -- golden image -----------------------------------------------------------------------------------------------------

#: A change of these is a change of the format: give it a new VERSION or a feature bit, and a reader for the old one.
GOLDEN = "5a2fdda13e78e5b8cf94493d2140a03b"


def golden(monkeypatch: pytest.MonkeyPatch) -> Filesystem:
    """A small deterministic image with one of everything."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000 * SECOND)
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setattr("os.getgid", lambda: 0)
    region = MemoryRegion(16 * MiB)
    mkfs(region, label="golden", uuid=uuid.UUID(int=1), phys_base=0x40000000, hash_seed=bytes(16))
    fs = open_filesystem(region)
    ticks = iter(range(10**6))
    fs.volume.clock = lambda: (1_700_000_001 + next(ticks)) * SECOND
    d = mkdir(fs, b"directory")
    mkfile(fs, b"small", b"content", d)
    mkfile(fs, b"large", b"L" * (3 * MiB), d)
    sparse = mkfile(fs, b"sparse", parent=d)
    for n in range(9):
        fs.write(sparse, n * 3 * f.PAGE, b"piece %d" % n)
    fs.create(d, b"link", 0o120777, ME, target=b"target")
    fs.create(d, b"device", 0o020600, ME, rdev=0x103)
    fs.setxattr(d, b"user.small", b"value")
    fs.setxattr(d, b"user.large", b"v" * 5000)
    fs.setattr(sparse, SetAttr(mode=0o600, uid=1, gid=2, mtime=-1))
    for n in range(150):
        mkfile(fs, b"name%d" % n)
    ino = mkfile(fs, b"open")
    fs.lookups.add(ino)
    fs.unlink(ROOT, b"open")
    return fs


def test_the_golden_image(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = golden(monkeypatch)
    assert hashlib.blake2b(fs.region.view, digest_size=16).hexdigest() == GOLDEN


def test_the_golden_superblock(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = golden(monkeypatch)
    sb = read_superblock(fs.region)
    raw = fs.region.read(0, 256)
    assert raw[:8] == b"sfnrekp\0"
    assert struct.unpack_from("<I", raw, 8) == (1,)
    assert (sb.label.rstrip(b"\0"), sb.phys_base, sb.blocks) == (b"golden", 0x40000000, 8)
    assert encode_superblock(sb) == raw
