"""Regions that earlier releases made are opened; the format does not change under its version."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pkernfs import format as format_module
from pkernfs.errors import FormatError
from pkernfs.format import INODE_ATIME_AT, INODE_SIZE, VERSION
from pkernfs.iommu.guard import open_filesystem
from pkernfs.layout import Layout
from pkernfs.region import open_region
from tests.core.support import assert_sound
from tests.golden.image import HERE, images, to_region, to_text, version_of
from tests.reader.on_region import DISCARD, JOURNAL_HEADER, PAGE, RECORD, SUPERBLOCK, crc32c

EVERY = pytest.mark.parametrize("name", images())


@pytest.fixture
def image(name: str, tmp_path: Path) -> Path:
    """The region of a version of the format, and of features."""
    path = tmp_path / "region"
    to_region((HERE / f"format-{name}.txt").read_text(), path)
    return path


def test_there_is_an_image_of_each_version() -> None:
    assert {version_of(name) for name in images()} == set(range(1, VERSION + 1)), "see tests/golden/make.py"


@EVERY
def test_an_image_is_what_it_was(image: Path, name: str) -> None:
    """As text and back: what the other tests open is the region that was written."""
    with image.open("rb") as file:
        assert to_text(file) == (HERE / f"format-{name}.txt").read_text()


@EVERY
def test_it_is_sound(image: Path) -> None:
    """As the end of the server left it, and when the next one has freed the file that was open without a name."""
    with open_region(str(image), readonly=True) as region:
        fs = open_filesystem(region)
        assert_sound(fs)
        free = fs.statfs().free
    with open_region(str(image)) as region:
        fs = open_filesystem(region)
        assert_sound(fs)
        assert fs.statfs().free > free


@EVERY
def test_its_last_transaction_is_applied(image: Path) -> None:
    """The journal as that release wrote it, when the server ended between committing and applying."""
    image_before = image.read_bytes()
    raw = bytearray(image_before)
    assert unapply(raw), "expected a transaction that changes something"
    image.write_bytes(raw)
    with open_region(str(image), readonly=True) as region:
        assert_sound(open_filesystem(region))
        after = region.read(0, region.size)
    commit = journal_offset(raw) + PAGE
    assert after[commit] != raw[commit], "expected it to be applied"
    changed = different(after, image_before, range(0, len(after), PAGE), PAGE)
    changed = [at for page in changed for at in different(after, image_before, range(page, page + PAGE, 8), 8)]
    # A time of access is stored in place: it can be newer than the transaction.
    assert [at for at in changed if at != commit and at % INODE_SIZE != INODE_ATIME_AT] == []


def different(one: bytes, other: bytes, offsets: range, length: int) -> list[int]:
    """At which of these offsets the two have not the same ``length`` bytes."""
    return [at for at in offsets if one[at : at + length] != other[at : at + length]]


def journal_offset(image: bytes | bytearray) -> int:
    """Where the copy of the superblock is, and the journal's header behind it."""
    offset: int = SUPERBLOCK.unpack_from(image)[15]
    return offset


def unapply(image: bytearray) -> int:
    """Take the last transaction away where it was applied, and commit it again; how many bytes that were."""
    at = journal_offset(image) + PAGE
    commit, _, checksum, sequence, length, records = JOURNAL_HEADER.unpack_from(image, at)
    body = bytes(image[at + PAGE : at + PAGE + length])
    assert commit == 2 * sequence, "expected no committed transaction"
    assert checksum == crc32c(body, crc32c(bytes(image[at + 16 : at + 40])))
    position = changed = 0
    for _ in range(records):
        offset, size, kind = RECORD.unpack_from(body, position)
        position += RECORD.size
        if kind != DISCARD:
            image[offset : offset + size] = bytes(byte ^ 0xFF for byte in image[offset : offset + size])
            position += size
            changed += size
    image[at : at + 8] = struct.pack("<Q", 2 * sequence + 1)
    return changed


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_a_version_that_is_not_known_is_refused_by_name(version: int, tmp_path: Path) -> None:
    path = tmp_path / "region"
    to_region((HERE / f"format-{VERSION}.txt").read_text(), path)
    with path.open("r+b") as file:
        raw = bytearray(file.read(SUPERBLOCK.size))
        raw[8:16] = struct.pack("<II", version, 0)
        raw[12:16] = struct.pack("<I", crc32c(raw))
        file.seek(0)
        file.write(raw)
    for readonly in (True, False):
        with (
            open_region(str(path), readonly=readonly) as region,
            pytest.raises(FormatError, match=f"expected format version {VERSION}, found {version}"),
        ):
            open_filesystem(region)


def declarations() -> str:
    """What format.py declares, in its order: the constants' values, and the records with their fields' places.

    Names are there for the reader of a difference; they are no part of the format.
    """
    lines = []
    for name, value in vars(format_module).items():
        if isinstance(value, Layout):
            lines.append(f"{value.size} bytes  # {value.record.__name__}")
            codes = {
                field: get_args(hint)[1] for field, hint in get_type_hints(value.record, include_extras=True).items()
            }
            lines += [f"    {value.offsets[field]} {code}  # {field}" for field, code in codes.items()]
        elif name.isupper() and isinstance(value, int):
            lines.append(f"{value:#x}  # {name}")
    return "".join(f"{line}\n" for line in lines)


def without_names(text: str) -> list[str]:
    """The lines of ``declarations`` without what is after the #."""
    return [line.partition("  # ")[0] for line in text.splitlines()]


def test_the_format_does_not_change_under_its_version() -> None:
    """A change of a record or a constant is a change of the format.

    It takes a new VERSION or a feature bit, a reader for regions of before (or a refusal that names them), and an image
    made by tests/golden/make.py.

    tests/golden/format-N.declared has what version N declares.  Only what changes nothing in a region, such as a mask
    of flags that have a name now, is written into it: `python -m tests.golden.test_golden`.
    """
    wanted = (HERE / f"format-{VERSION}.declared").read_text()
    assert without_names(declarations()) == without_names(wanted), "format.py changed, and VERSION did not"


if __name__ == "__main__":
    (HERE / f"format-{VERSION}.declared").write_text(declarations())
