"""Nobody says what the glossary has replaced."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest

from tests.habits.glossary import Old, everywhere, forbidden, places

TABLE = """# Rooms

## Glossary

| term | meaning | instead of |
|---|---|---|
| reply | what is recorded | asked, `take_inherited` |
| parent | the directory above | `above` |
| keeping the previous version | an upgrade failed | the version of before goes on |
| page | 4 KiB |  |

## Journeys
| a | b | c |
"""
OLD = [
    Old("asked", False, "reply"),
    Old("take_inherited", True, "reply"),
    Old("above", True, "parent"),
    Old("the version of before goes on", False, "keeping the previous version"),
]

FOUND = {
    "name": ("asked = 1", ["asked"]),
    "part-of-a-name": ("was_asked = AboveAll()", ["asked", "above"]),
    "several-parts": ("takeInherited(x.take_inherited_now)", ["take_inherited", "take_inherited"]),
    "string": ('"what was asked"', ["asked"]),
    "comment": ("# asked", ["asked"]),
    "phrase-in-a-comment": ("# the version of\n# before goes on", ["the version of before goes on"]),
    "phrase-in-a-docstring": ('"""The version\n    of before goes on."""', ["the version of before goes on"]),
    "prose": ("# what is above, take inherited things", []),
    "longer-words": ("basked = take_it.inherited", []),
}

FORGET = (
    "pkernfs/fs/reclaim.py",
    "pkernfs/fs/replies.py",
    "pkernfs/server/*.py",
    "pkernfs/cli/manual/mount.pkernfs.8.txt",
    "tests/core/*.py",
    "tests/iommu/test_awaiting.py",
    "tests/iommu/test_rules.py",
)
ALIAS = (
    "pkernfs/api.py",
    "pkernfs/cli/iommu/*.py",
    "pkernfs/vfio.py",
    "tests/mount/test_control.py",
    "tests/mount/test_iommu_cli.py",
)
#: Where an old word is right: pattern of files, the word, the reason.  One that allows nothing fails.
ALLOWED: list[tuple[str, str, str]] = [
    ("pkernfs/cli/manual/commands.py", "also", "SEE ALSO is a section of every man page"),
    ("tests/core/fuzz/oracle.py", "frame", "a frame of Python's stack"),
    *((files, "forget", "FUSE_FORGET") for files in FORGET),
    ("pkernfs/server/space.py", "forgets", "FUSE_FORGET"),
    *((files, "iotlb-needed", "the alias, until 0.3") for files in ALIAS),
]


def test_what_the_table_forbids() -> None:
    assert forbidden(TABLE) == OLD


@pytest.mark.parametrize(("code", "found"), FOUND.values(), ids=FOUND)
def test_what_is_found(code: str, found: list[str]) -> None:
    assert [place.old.text for place in places(OLD, "x.py", code + "\n")] == found


def test_what_is_quoted_in_prose_is_code() -> None:
    assert [place.line for place in places(OLD, "x.md", "above\n\n`above_all` and\nasked\n")] == [3, 4]


def test_nobody_says_what_is_replaced() -> None:
    found = everywhere()
    allowed = [any(fnmatch(one.file, files) and one.old.text == word for one in found) for files, word, _ in ALLOWED]
    assert all(allowed), f"nothing to allow: {[one for one, used in zip(ALLOWED, allowed, strict=True) if not used]}"
    wrong = [
        f'{one.file}:{one.line}: "{one.old.text}": say {one.old.term}'
        for one in found
        if not any(fnmatch(one.file, files) and one.old.text == word for files, word, _ in ALLOWED)
    ]
    assert wrong == []
