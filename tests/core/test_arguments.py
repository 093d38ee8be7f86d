"""Arguments of commands: sizes, and what only looks like them."""

from __future__ import annotations

import argparse

import pytest

from pkernfs.cli.arguments import size
from pkernfs.cli.iommu.arguments import address

SIZES = [
    ("0", 0),
    ("4096", 4096),
    ("0x1000", 4096),
    ("0X1f", 31),
    ("010", 10),
    ("512M", 512 << 20),
    ("1g", 1 << 30),
    ("1GiB", 1 << 30),
    ("1GB", 1 << 30),
    ("0x10K", 16 << 10),
    ("0x1B", 27),
    ("0xB", 11),
    ("0x1E", 30),
    ("0x1bGB", 27 << 30),
]
NONE = ["", "-1", "1.5G", "12B", "B", "K", "0x", "0xK", "1 G", "1_000", "0b1", "1Z", "1KK", "1\u212a", "\u0661", "1\n"]


@pytest.mark.parametrize(("word", "number"), SIZES)
def test_size(word: str, number: int) -> None:
    assert size(word) == number


@pytest.mark.parametrize("word", NONE)
def test_no_size(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
        size(word)


@pytest.mark.parametrize("word", ["0xffffffffffffffff", "18446744073709551615", "16383P"])
def test_address(word: str) -> None:
    assert address(word) == size(word)


@pytest.mark.parametrize("word", ["0x10000000000000000", "18446744073709551616", "16384P", "0x1ffffffffffffffffT"])
def test_no_address(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="64 bits"):
        address(word)
