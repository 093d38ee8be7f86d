"""Names of PCI functions."""

from __future__ import annotations

import pytest

from pkernfs.errors import UsageError
from pkernfs.format import Requester
from pkernfs.iommu.pci import parse, text


@pytest.mark.parametrize(
    ("word", "requester"),
    [
        ("00:05.0", 0x28),
        ("0:5.0", 0x28),
        ("0000:00:00.0", 0),
        ("ff:1f.7", 0xFFFF),
        ("FF:1F.7", 0xFFFF),
        ("0001:00:1f.3", 1 << 16 | 0xFB),
        ("ffff:ff:1f.7", 0xFFFFFFFF),
        ("be:ef.0", None),
        ("00:20.0", None),
        ("00:05.8", None),
        ("00:05.f", None),
        ("00:05", None),
        ("05.0", None),
        ("", None),
        ("00:05.0 ", None),
        ("00:05.0\n", None),
        ("-1:05.0", None),
        ("0x0:05.0", None),
        ("10000:00:05.0", None),
        ("100:05.0.0", None),
        ("000:05.0", None),
        ("00:g5.0", None),
        ("\u0660\u0660:05.0", None),
    ],
)
def test_parse(word: str, requester: int | None) -> None:
    if requester is not None:
        assert parse(word) == requester
        assert parse(text(Requester(requester))) == requester
        return
    with pytest.raises(UsageError, match=r"\[SSSS:\]BB:DD\.F"):
        parse(word)


def test_text() -> None:
    assert text(Requester(0x28)) == "0000:00:05.0"
    assert text(Requester(0xFFFFFFFF)) == "ffff:ff:1f.7"
