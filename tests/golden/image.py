"""Regions as text: the pages that are not zero, compressed.

A golden image is 32 MiB with some hundred pages in use, most of them almost empty: some KiB of text.
"""

from __future__ import annotations

import base64
import io
import lzma
import textwrap
from pathlib import Path
from typing import BinaryIO

PAGE = 4096
HERE = Path(__file__).parent


def to_text(region: BinaryIO) -> str:
    """The lines of a region's image: its size, which of its pages are not zero (FIRST+COUNT), and those, by base64."""
    runs: list[list[int]] = []
    pages, count = [], 0
    while page := region.read(PAGE):
        if page.strip(b"\0"):
            pages.append(page)
            if runs and sum(runs[-1]) == count:
                runs[-1][1] += 1
            else:
                runs.append([count, 1])
        count += 1
    packed = lzma.compress(b"".join(pages), preset=9 | lzma.PRESET_EXTREME)
    lines = textwrap.wrap(" ".join(f"{first}+{length}" for first, length in runs), 118)
    return "\n".join([f"{count * PAGE} bytes", *lines, "", *textwrap.wrap(base64.b64encode(packed).decode(), 118), ""])


def to_region(text: str, path: Path) -> None:
    """Make the region of an image as a sparse file, readable and writable for its owner."""
    head, _, body = text.partition("\n\n")
    size, _, runs = head.partition(" bytes\n")
    pages = io.BytesIO(lzma.decompress(base64.b64decode(body)))
    path.touch(0o600)
    with path.open("r+b") as region:
        region.truncate(int(size))
        for run in runs.split():
            first, length = map(int, run.split("+"))
            region.seek(first * PAGE)
            region.write(pages.read(length * PAGE))


def images() -> list[str]:
    """The names of the images: a version of the format, and features that the region has beyond it (1-far-copy)."""
    return sorted(path.stem.partition("-")[2] for path in HERE.glob("format-*.txt"))


def version_of(name: str) -> int:
    """The version of the format of an image."""
    return int(name.partition("-")[0])
