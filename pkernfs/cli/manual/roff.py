"""Plain text as help has it -> man(7).

a paragraph                             filled; `code` and name(8) in bold

  an indented block                     as it is, as an example

a term
    what it means, indented by four     an item of a list
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

#: What roff would take for something else: an escape, hyphens, and accents that are meant as ASCII.
SPECIAL = str.maketrans({"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga"})
WIDTH = 78


def escape(text: str) -> str:
    """Text as it is, in a place where no line begins."""
    return text.translate(SPECIAL)


def bold(text: str) -> str:
    """A word to be typed as it is."""
    return rf"\fB{escape(text)}\fR"


def italic(text: str) -> str:
    """A word to be replaced."""
    return rf"\fI{escape(text)}\fR"


def inline(text: str) -> str:
    """A line of prose: `code` and name(8) in bold."""
    parts = re.split(r"``?([^`]+)``?|([\w.-]+)(\(\d\))", text)
    made = [escape(parts[0])]
    for code, page, section, plain in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=True):
        made.append(bold(code) if code else bold(page) + section)
        made.append(escape(plain))
    return "".join(made)


def _lines(text: str) -> Iterator[str]:
    """Prose in lines of which none begins with what roff takes for a request."""
    for line in textwrap.wrap(inline(text), WIDTH, break_long_words=False, break_on_hyphens=False):
        yield rf"\&{line}" if line[0] in ".'" else line


def example(lines: Sequence[str]) -> list[str]:
    """Lines that stay as they are; a wide table of two columns becomes a list, which fits a narrow terminal."""
    if max(map(len, lines)) > WIDTH and (rows := _two_columns(lines)):
        return [line for term, meaning in rows for line in item(inline(term), meaning)]
    shown = [escape(line).replace("'", r"\(aq") for line in lines]
    return [".PP", ".in +4n", ".EX", *(rf"\&{line}" if line[:1] == "." else line for line in shown), ".EE", ".in"]


def _two_columns(lines: Sequence[str]) -> list[tuple[str, str]]:
    """The rows of a table whose second column begins at one place in every line; none: it is no such table."""
    first = re.match(r"\S+( \S+)* {2,}(?=\S)", lines[0])
    at = first.end() if first else 0
    rows: list[tuple[str, str]] = []
    for line in lines:
        term, meaning = line[:at].strip(), line[at:]
        if not at or line[at - 2 : at].strip() or meaning[:1].isspace() or not meaning or not (term or rows):
            return []
        rows.append((term, meaning) if term else (rows[-1][0], f"{rows.pop()[1]} {meaning}"))
    return rows


def exit_status(text: str) -> list[str]:
    """A table of exit codes, of which several can stand in a line."""
    pairs = re.findall(r"(?<!\S)(\d+) {2}(\S.*?)(?= {3,}\d+ {2}|$)", text, re.MULTILINE)
    return [line for code, meaning in pairs for line in item(bold(code), meaning)]


def item(term: str, meaning: str) -> list[str]:
    """An item of a list; ``term`` is roff."""
    return [".TP", term, *_lines(meaning)]


def prose(text: str) -> list[str]:
    """Paragraphs, examples and lists."""
    made: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if len(lines) > 1 and not lines[0].startswith(" ") and re.match(r" {4}\S", lines[1]):
            made += item(inline(lines[0]), " ".join(line.strip() for line in lines[1:]))
            continue
        if lines[0].startswith("exit status:"):
            made += [".PP", "Exit status:", *exit_status("\n".join(lines[1:]))]
            continue
        while lines:
            indented = lines[0].startswith(" ")
            count = next((n for n, line in enumerate(lines) if line.startswith(" ") != indented), len(lines))
            part, lines = lines[:count], lines[count:]
            if indented:
                made += example(textwrap.dedent("\n".join(part)).splitlines())
            else:
                made += [".PP", *_lines(" ".join(part))]
    return made
