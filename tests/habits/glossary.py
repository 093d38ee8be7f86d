"""The words that the glossary of pkernfs/README.md has replaced, wherever they stand.

The third column of the glossary's table lists, separated by commas, what is not said any more.  A word in backquotes is
forbidden as a name: `above` also as a part of one (above_quota, AboveQuota), in code and in what is quoted as code.  A
word without is forbidden in everything, prose and messages too.  A phrase is found across ends of lines.

    python -m tests.habits.glossary     lists all places
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from tests.habits.commits import ROOT, git

GLOSSARY = ROOT / "pkernfs" / "README.md"
#: Files that tell of old words because that is what they are for.
HISTORY = (".github/CHANGELOG.md", "tests/habits/", "tests/golden/format-")
#: A word, or the part of a name: "take_inherited" and "takeInherited" are "take" and "inherited".
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
QUOTED = re.compile(r"`([^`\n]+)`")


class Old(NamedTuple):
    """A word that is not said any more."""

    text: str
    name: bool  #: only names
    term: str  #: what is said instead


class Place(NamedTuple):
    """Where one stands."""

    file: str
    line: int
    old: Old


def forbidden(glossary: str) -> list[Old]:
    """What the table under "## Glossary" says."""
    section = re.split(r"^## ", glossary.partition("\n## Glossary\n")[2], maxsplit=1, flags=re.M)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    found = []
    for row in rows[2:]:
        assert len(row) == 3, f"expected | term | meaning | instead of |, found {row}"
        for word in filter(None, map(str.strip, row[2].split(","))):
            found.append(Old(word.strip("`"), word.startswith("`"), row[0]))
    return found


def parts(text: str) -> list[tuple[str, int, int]]:
    """The parts of all words of a text, in small letters, and where each begins and ends."""
    return [(match[0].lower(), match.start(), match.end()) for match in PART.finditer(text)]


def find(words: list[str], text: str) -> Iterator[int]:
    """Where these parts follow one another, with nothing between them but what joins a name or a phrase."""
    found = parts(text)
    for at in range(len(found) - len(words) + 1):
        if all(found[at + n][0] == word for n, word in enumerate(words)) and all(
            re.fullmatch(r"[_-]?|\s+(# |#: )?", text[found[at + n][2] : found[at + n + 1][1]])
            for n in range(len(words) - 1)
        ):
            yield found[at][1]


def names_and_text(path: str, content: str) -> Iterator[tuple[int, str, bool]]:
    """The parts of a file: the line where each begins, the text, and whether it is a name."""
    if not path.endswith(".py"):
        for match in QUOTED.finditer(content):
            yield content.count("\n", 0, match.start()) + 1, match[1], True
        yield 1, content, False
        return
    prose: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string, True
        elif token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield token.start[0], token.string, False
        elif token.type == tokenize.COMMENT:
            if prose and token.start[0] != first + len(prose):
                yield first, "\n".join(prose), False
                prose = []
            first = first if prose else token.start[0]
            prose.append(token.string)
    if prose:
        yield first, "\n".join(prose), False


def places(old: list[Old], path: str, content: str) -> Iterator[Place]:
    """Where a file has forbidden words."""
    words = [(one, [part for part, _, _ in parts(one.text)]) for one in old]
    for line, text, name in names_and_text(path, content):
        small = text.lower()
        for one, sequence in words:
            if (one.name and not name) or sequence[0] not in small:
                continue
            for at in find(sequence, text):
                yield Place(path, line + text.count("\n", 0, at), one)


def files() -> list[str]:
    """The text files of the repository, or of what was made from it."""
    listed = git("ls-files").splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("[!.]*")]
    return [
        path
        for path in listed
        if re.search(
            r"\.(py|md|txt|sh|toml|yaml|service|mount|rules)$|^(examples|mount_helpers|tests|[.]ci)/[^.]*$", path
        )
        and not path.startswith(HISTORY)
        and (ROOT / path).is_file()
    ]


def everywhere() -> list[Place]:
    """All places of the repository."""
    text = GLOSSARY.read_text()
    old = forbidden(text)
    found: list[Place] = []
    for path in files():
        content = (ROOT / path).read_text(errors="replace")
        if ROOT / path == GLOSSARY:
            head, title, rest = content.partition("\n## Glossary\n")
            section = re.split(r"^## ", rest, maxsplit=1, flags=re.M)[0]
            content = head + title + "\n" * section.count("\n") + rest[len(section) :]
        found += places(old, path, content)
    return sorted(set(found))


if __name__ == "__main__":
    for file, line, one in everywhere():
        print(f'{file}:{line}: "{one.text}": say {one.term}')
    sys.exit()
