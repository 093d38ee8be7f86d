"""What is stored in the fields of an image instead of what is there."""

from __future__ import annotations

import random
import stat

from pkernfs import format as f
from pkernfs.fs.pages import encode_inode
from pkernfs.region import Region
from pkernfs.region.superblock import superblock_checksum
from tests.core.fuzz.catalogue import Catalogue, Field

NAMES = [b"/", b"\0", b".", b"..", b"../x", b"\xff\xfe", b"\x1b[2J"]
MODES = [
    stat.S_IFREG | 0o644,
    stat.S_IFDIR | 0o755,
    stat.S_IFLNK | 0o777,
    stat.S_IFIFO | 0o600,
    stat.S_IFCHR | 0o600,
    0o170644,
    0o644,
]
CORRECTED = 0.85  #: how often the checksum is made right again


def number(rng: random.Random, field: Field, old: int, catalogue: Catalogue) -> int:
    """Another value for a field: at the extremes, near the old one, or one that means something elsewhere."""
    bits = 8 * field.size
    top = 1 << bits
    extremes = [0, 1, 2, 3, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1]
    near = [old + 1, old - 1, old ^ 1 << rng.randrange(bits), old * 2, -old]
    meaning = [rng.choice(catalogue.pages), rng.choice(catalogue.pages) * f.PAGE, rng.choice(catalogue.inos)]
    meaning += [field.at // f.PAGE, field.at // f.INODE_SIZE, field.offset // f.PAGE, rng.choice(MODES)]
    meaning += [f.PAGE, f.BLOCK, f.MAX_FILE_SIZE, f.MAX_FILE_SIZE + 1, rng.randrange(700), 60_000]
    group = rng.choice([extremes, near, meaning, meaning])
    if field.name == "mode":
        group = [*MODES, *near]
    return rng.choice(group) % top


def correct_checksum(region: Region, field: Field) -> None:
    """Make the checksum that covers a field right again."""
    at = field.at
    if field.covered == "page":
        raw = region.read(at, f.PAGE)
        _put(region, at + 4, f.checksum(raw[:4] + bytes(4) + raw[8:]), 4)
    elif field.covered == "inode":
        raw = encode_inode(f.Ino(at // f.INODE_SIZE), f.INODE.unpack(region.view, at))
        region.view[at : at + f.INODE_SIZE] = raw
    elif field.covered == "superblock":
        _put(region, at + f.SUPERBLOCK.offsets["checksum"], superblock_checksum(region.read(at, f.SUPERBLOCK.size)), 4)
    elif field.covered == "journal":
        header = f.JOURNAL_HEADER.unpack(region.view, at)
        body = region.read(at + f.PAGE, min(header.length, f.BLOCK))
        crc = f.checksum(body, f.checksum(region.read(at + f.JOURNAL_CHECKED_AT, 24)))
        _put(region, at + f.JOURNAL_HEADER.offsets["checksum"], crc, 4)


def _put(region: Region, offset: int, value: int, size: int) -> None:
    region.view[offset : offset + size] = value.to_bytes(size, "little")


def pick(rng: random.Random, catalogue: Catalogue, only: str = "") -> Field:
    """Any field (of structure ``only``); each structure, and each name in it, as often as any other."""
    names = catalogue.fields[only or rng.choice(sorted(catalogue.fields))]
    return rng.choice(names[rng.choice(sorted(names))])


def change(rng: random.Random, region: Region, field: Field, catalogue: Catalogue) -> str:
    """Store something else in one field; what was done."""
    old = region.read(field.offset, field.size)
    new = old
    for _ in range(5):
        if new == old:
            new = other(rng, region, field, old, catalogue)
    region.view[field.offset : field.offset + field.size] = new
    what = f"{field.structure}.{field.name} at {field.offset:#x}: {old[:16].hex()} -> {new[:16].hex()}"
    if field.covered and field.name != "checksum" and rng.random() < CORRECTED:
        correct_checksum(region, field)
        return what + ", sealed"
    return what


def other(rng: random.Random, region: Region, field: Field, old: bytes, catalogue: Catalogue) -> bytes:
    """What to store in a field."""
    if field.size > 8 or field.name == "text":
        new = rng.choice(NAMES) if rng.random() < 0.7 else rng.randbytes(field.size)
        return (new + old[len(new) :])[: field.size]
    if rng.random() < 0.25:
        # What another structure has there: shared pages, double names, loops.
        same = catalogue.fields[field.structure][field.name]
        return region.read(rng.choice(same).offset, field.size)
    value = number(rng, field, int.from_bytes(old, "little"), catalogue)
    return value.to_bytes(field.size, "little")


def copy_whole(rng: random.Random, region: Region, catalogue: Catalogue) -> tuple[str, str]:
    """Put one page or inode in the place of another of its kind; it says that it belongs there."""
    one, two = pick(rng, catalogue), pick(rng, catalogue)
    if one.covered != two.covered or one.covered not in ("page", "inode"):
        return one.structure, ""
    size = f.PAGE if one.covered == "page" else f.INODE_SIZE
    raw = region.read(two.at, size)
    owner = region.read(one.at + 16, 8) if one.covered == "page" else b""
    region.view[one.at : one.at + size] = raw
    if one.covered == "page":
        _put(region, one.at + 8, one.at, 8)
        if rng.random() < 0.7:
            region.view[one.at + 16 : one.at + 24] = owner
    correct_checksum(region, one)
    return one.structure, f"{two.covered} {two.at:#x} ({two.structure}) copied to {one.at:#x}"


def scribble(rng: random.Random, region: Region, catalogue: Catalogue) -> tuple[str, str]:
    """Bytes at random, near a field."""
    field = pick(rng, catalogue)
    count = rng.choice([1, 8, 64])
    at = min(field.offset // 8 * 8 + rng.randrange(64), region.size - count)
    region.view[at : at + count] = rng.randbytes(count)
    return field.structure, f"{count} bytes at {at:#x}"


def mutate(rng: random.Random, region: Region, catalogue: Catalogue, only: str = "") -> tuple[str, str]:
    """Mutate a view of an image (fields of structure ``only``); the first structure, and what was done."""
    kind = 1.0 if only else rng.random()
    if kind < 0.08:
        return scribble(rng, region, catalogue)
    if kind < 0.18:
        return copy_whole(rng, region, catalogue)
    done = []
    structure = ""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        field = pick(rng, catalogue, only)
        structure = structure or field.structure
        done.append(change(rng, region, field, catalogue))
    return structure, "; ".join(done)
