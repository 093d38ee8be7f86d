"""Pictures of address spaces, from what `list` tells."""

from __future__ import annotations

import random
from typing import Any
from xml.etree import ElementTree as xml

import pytest

from pkernfs import api
from pkernfs.cli.iommu.picture.merge import OTHERS
from pkernfs.cli.iommu.picture.space import FILES, Space, short, space
from pkernfs.cli.iommu.picture.svg import svg
from pkernfs.cli.iommu.picture.text import ASCII, COLOURS, UNICODE, picture
from pkernfs.format import GiB, Ino, KiB, MiB, TiB

TITLE = "{http://www.w3.org/2000/svg}title"
NAMES = {20: "vms/guest-ram", 21: "<svg onload=\"x\"> & 'y' \u202e\x1b[31m", 22: None, 23: "vms/rom"}
MAPPINGS = [
    (0, 640 * KiB, 20, 0, "rw"),
    (768 * KiB, 128 * KiB, 23, 0, "ro"),
    (MiB, 3 * GiB - MiB, 20, MiB, "rw"),
    (0xFE000000, 64 * KiB, 21, 0, "rw"),
    (0xFE010000, 4 * KiB, 22, 0, "wo"),
    (4 * GiB, 5 * GiB, 20, 3 * GiB, "rw"),
]
EXTENTS = {20: [(0, 1 << 40, GiB), (GiB, 2 << 40, 7 * GiB)], 21: [(0, 3 << 40, 2 * MiB)], 23: [(0, 4 << 40, 2 * MiB)]}


def domain(mappings: list[tuple[int, int, int, int, str]], names: dict[int, Any]) -> api.Domain:
    """One, as `list` tells it."""
    device = api.Device(device="0000:00:05.0", domain="dom-0", id=1, persistent=True, state="attached")
    return api.Domain(
        name="dom-<0>",
        ino=16,
        format="vtd",
        levels=4,
        aperture=256 * TiB,
        reserved=[(0xFEE00000, 0xFEEFFFFF)],
        id=1,
        leaf=GiB,
        root=None,
        size=2 * MiB,
        tables=1,
        awaiting=0,
        mappings=[
            api.DomainMapping(iova=iova, length=length, ino=ino, file=names[ino], offset=offset, access=access)
            for iova, length, ino, offset, access in mappings
        ],
        devices=[device],
    )


def extents(ino: int) -> list[api.Extent]:
    """As the control verb "file" tells them."""
    return [
        api.Extent(file_offset=at, region_offset=0, physical=to, length=length)
        for at, to, length in EXTENTS.get(ino, [])
    ]


@pytest.fixture
def some() -> Space:
    """A guest's address space."""
    return space(domain(MAPPINGS, NAMES), extents, 36)


def many(count: int, files: int = 40) -> Space:
    """One with mappings of all kinds, and a very large one."""
    rng = random.Random(1)
    mappings = []
    iova = 0
    for n in range(count):
        length = 4 * KiB * rng.choice([1, 1, 2, 16, 512])
        iova += rng.choice([0, 0, 0, 4 * KiB, 20 * MiB])
        mappings.append((iova, length, 30 + rng.randrange(files), n * 4 * MiB, rng.choice(["rw", "rw", "ro", "wo"])))
        iova += length
    mappings.append((1 << 40, 64 * GiB, 20, 0, "rw"))
    return space(domain(mappings, NAMES | {30 + n: f"f{n}" for n in range(files)}), extents, 36)


def parsed(drawn: Space) -> xml.Element:
    """The SVG; raises ParseError when it is none."""
    return xml.fromstring(svg(drawn))


def plain(drawn: Space) -> list[str]:
    """The picture as text."""
    return ["".join(piece.text for piece in line) for line in picture(drawn, UNICODE)]


def test_svg_has_every_mapping(some: Space) -> None:
    root = parsed(some)
    titles = [element.text or "" for element in root.iter(TITLE)]
    for iova, length, ino, offset, _ in MAPPINGS:
        name = {20: "vms/guest-ram", 22: "inode 22", 23: "vms/rom"}.get(ino, "<svg onload=")
        first = f"{iova:#x} to {iova + length - 1:#x} "
        assert [t for t in titles if t.startswith(first) and name in t and t.endswith(f"offset {offset:#x}")]
    assert any("physical 0x20000000000 to" in title for title in titles)
    assert not [title for title in titles if "leaves" in title]
    some.blocks[0].leaves = (0, 4 * KiB)
    assert any((e.text or "").endswith("offset 0x0\nleaves missing, 4 KiB") for e in parsed(some).iter(TITLE))
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"


def test_svg_escapes_names(some: Space) -> None:
    text = svg(some)
    assert "<svg onload" not in text
    assert "&lt;svg onload" in text
    assert not any(char in text for char in "\x1b\u202e")
    assert "dom-&lt;0&gt;" in text
    assert {element.tag.rpartition("}")[2] for element in parsed(some).iter()} == {
        *("svg", "title", "desc", "style", "defs", "pattern", "path", "rect", "text", "g", "polyline", "line"),
    }


def test_svg_stays_on_its_page(some: Space) -> None:
    for drawn in (some, many(10_000), space(domain([], {}), extents, 36)):
        root = parsed(drawn)
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        for element in root.iter():
            assert 0 <= float(element.get("x", 0)) + float(element.get("width", 0)) <= width or element.tag == "pattern"
            assert 0 <= float(element.get("y", 0)) + float(element.get("height", 0)) <= height


def test_blocks_translate_to_their_memory(some: Space) -> None:
    assert [len(block.mappings) for block in some.blocks] == [1] * len(MAPPINGS)
    places = {band.block.start: some.where(band) for band in some.bands}
    assert [(run.physical, run.length) for run in places[MiB]] == [
        ((1 << 40) + MiB, GiB - MiB),
        (2 << 40, 2 * GiB),
    ]
    assert [run.physical for run in places[4 * GiB]] == [(2 << 40) + 2 * GiB]
    assert places[0xFE010000] == []  # nothing is known of a file that is gone


def test_memory_mapped_twice_is_one() -> None:
    mappings = [(0, GiB, 20, 0, "rw"), (GiB, GiB, 20, 0, "ro"), (2 * GiB, GiB, 20, GiB // 2, "rw")]
    drawn = space(domain(mappings, NAMES), extents, 36)
    assert [(part.start, part.end, part.length) for part in drawn.memory] == [(0, GiB * 3 // 2, GiB * 3 // 2)]
    assert [band.right for band in drawn.bands] == [(0, 2 / 3), (0, 2 / 3), (1 / 3, 1)]


@pytest.mark.parametrize("count", [0, 1, 34, 35, 36, 500, 10_000])
def test_many(count: int) -> None:
    """Nothing is lost, nothing overlaps, the large one stays alone, and the picture says what was merged."""
    drawn = many(count)
    assert len(drawn.blocks) == min(count + 1, 36)
    mappings = [mapping for block in drawn.blocks for mapping in block.mappings]
    assert len(mappings) == count + 1
    assert mappings == sorted(mappings)
    for block, after in zip(drawn.blocks, drawn.blocks[1:], strict=False):
        assert block.start < block.end <= after.start
    assert [mapping.length for mapping in drawn.blocks[-1].mappings] == [64 * GiB]
    assert sum(block.length for block in drawn.blocks) == sum(part.length for part in drawn.memory)
    assert len({part.ino for part in drawn.memory}) <= FILES
    merged = sum(len(block.mappings) for block in drawn.blocks if len(block.mappings) > 1)
    assert f"{merged:,} of {count + 1:,} mappings are too small" in " ".join(drawn.notes()) or not merged
    assert bool(merged) == (count + 1 > 36)
    for band in drawn.bands:
        assert 0 <= band.left[0] < band.left[1] <= 1 + 1e-9
        assert 0 <= band.right[0] < band.right[1] <= 1
    assert len(svg(drawn)) < 1_000_000
    assert len(picture(drawn, ASCII)) < 250


def test_small_files_share_a_place() -> None:
    drawn = many(500)
    assert drawn.names[OTHERS] == "30 other files"
    assert [part.runs for part in drawn.memory if part.ino == OTHERS] == [()]


def test_text(some: Space) -> None:
    for block in some.blocks:
        block.leaves = (4 * KiB, 2 * MiB)
    lines = plain(some)
    assert lines[0] == "dom-<0>: VT-d, 4 levels, 256 TiB of addresses, id 1; 6 mappings, 8.0 GiB mapped"
    assert lines[1] == "devices: 0000:00:05.0 persistent"
    text = "\n".join(lines)
    assert "128 KiB ro  vms/rom  offset 0x0\n" in text
    assert "leaves 4 KiB, 2 MiB  physical 0x10000100000 in 2 pieces\n" in text
    assert "4 KiB wo  inode 22" in text
    assert "30.9 MiB free, 1 MiB reserved" in text
    edges = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0].startswith("0x")]
    assert edges == sorted(edges, key=lambda edge: int(edge, 16))
    assert (edges[0], edges[-1]) == ("0x0", "0x1000000000000")
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_text_without_unicode(some: Space) -> None:
    lines = ["".join(piece.text for piece in line) for line in picture(some, ASCII)]
    assert "\n".join(lines).isascii()
    fills = {line.split("|")[1][0] for line in lines if line.count("|") == 2}
    assert len(fills) == len(NAMES)


def test_text_for_a_terminal(some: Space) -> None:
    """Colours tell files apart: each has one, and the fill is the same for all."""
    pieces = [piece for line in picture(some, COLOURS) for piece in line if piece.ino is not None]
    colours = some.colours()
    assert {piece.ino for piece in pieces} == set(NAMES)
    assert len({colours[Ino(ino)] for ino in NAMES}) == len(NAMES)
    assert {char for piece in pieces for char in piece.text} == {"█"}


def test_nothing_mapped() -> None:
    drawn = space(domain([], {}), extents, 36)
    assert "256.0 TiB free, 1 MiB reserved" in "\n".join(plain(drawn))
    assert "0 mappings, 0 B mapped" in svg(drawn)


def test_a_full_address_space() -> None:
    full = domain([(0, 256 * TiB, 20, 0, "rw")], NAMES)
    assert "free" not in "\n".join(plain(space(full, extents, 36)))
    assert " free" not in svg(space(full, extents, 36))


def test_gaps_and_short_names() -> None:
    empty = space(domain([], {}), extents, 36)
    assert empty.gap(0xFED00000, 0xFEE00000) == "1 MiB free"
    assert empty.gap(0xFEE00000, 0xFEF00000) == "0 B free, 1 MiB reserved"
    assert empty.gap(0xFED00000, 0xFEE01000) == "1 MiB free, 4 KiB reserved"
    assert short("a/b/c", 5) == "a/b/c"
    assert short("a/bb/c", 5) == "…bb/c"
