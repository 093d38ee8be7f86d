"""The pages of the commands, from their parsers.

argparse-manpage makes the frame and the lists of options.  Descriptions are ours: it takes each for one paragraph, and
fills examples.  It can include sections from a file too, but in the order of that file, and as roff: the texts here are
plain, as the help is, so that one converter (roff.py) makes both and nobody has to know roff.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import NamedTuple

from argparse_manpage.manpage import Manpage, _ManpageFormatter

from pkernfs import __version__
from pkernfs.cli import fsck, mkfs, mount
from pkernfs.cli.main import parser as main_parser
from pkernfs.cli.manual import roff
from pkernfs.cli.parsers import Parser
from pkernfs.options import descriptions

#: The order of sections that man-pages(7) has.
ORDER = ("SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "MOUNT OPTIONS", "EXIT STATUS", "OUTPUT", "ENVIRONMENT",
         "FILES", "NOTES", "CAVEATS", "EXAMPLES", "SEE ALSO")  # fmt: skip


class Page(NamedTuple):
    """A page that is made from a parser."""

    name: str
    section: int
    about: str
    parser: Callable[[], Parser]
    see_also: tuple[str, ...]


def _iommu_parser() -> Parser:
    made = main_parser().verbs["iommu"]
    made.load()
    return made


PAGES = (
    Page("mkfs.pkernfs", 8, "make a region for pkernfs", mkfs.parser,
         ("pkernfs(1)", "pkernfs(5)", "mount.pkernfs(8)", "fsck.pkernfs(8)", "mkfs(8)")),
    Page("mount.pkernfs", 8, "mount a region of pkernfs", mount.parser,
         ("pkernfs(1)", "pkernfs(5)", "mkfs.pkernfs(8)", "fstab(5)", "mount(8)", "fuse(4)")),
    Page("fsck.pkernfs", 8, "check and repair a region of pkernfs", fsck.parser,
         ("pkernfs(1)", "pkernfs(5)", "mkfs.pkernfs(8)", "fsck(8)")),
    Page("pkernfs", 1, "look into regions and mounts of pkernfs", main_parser,
         ("pkernfs-iommu(1)", "pkernfs(5)", "mkfs.pkernfs(8)", "mount.pkernfs(8)", "fsck.pkernfs(8)")),
    Page("pkernfs-iommu", 1, "page tables for DMA that survive a live update", _iommu_parser,
         ("pkernfs(1)", "pkernfs(5)", "mount.pkernfs(8)")),
)  # fmt: skip


def synopsis(parser: Parser) -> Iterator[str]:
    """The usage as man(7) has it, without --help: one line for each form."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split()).replace("[-h] ", "")
    for form in re.split(rf"\s(?={re.escape(parser.prog)} )", usage):
        rest = form.removeprefix(parser.prog)
        tokens = re.split(r"(--?[A-Za-z][a-z-]*|[A-Z][\w./]*)", rest)
        marked = [(roff.bold if token[0] == "-" else roff.italic)(token) for token in tokens[1::2]]
        plain = map(roff.escape, tokens[0::2])
        yield roff.bold(parser.prog) + "".join(part + mark for part, mark in zip(plain, [*marked, ""], strict=True))


class _Formatter(_ManpageFormatter):  # type: ignore[misc]
    """Takes descriptions for the text that they are: argparse-manpage would print them as one paragraph."""

    @staticmethod
    def format_text(text: str) -> str:
        """The help of an argument, or a whole description."""
        return "\n".join(roff.prose(text)).removeprefix(".PP\n")

    def arguments(self, parser: Parser, *, of_a_verb: bool = False) -> list[str]:
        """Positional arguments that need words, then options; --help once a page."""
        made: list[str] = []
        for action in parser.arguments():
            if action.help and not (of_a_verb and "--help" in action.option_strings):
                made += self._format_action(action)
        return made

    def format_parser(self, parser: Parser, extra_description: str = "") -> list[str]:
        """The sections DESCRIPTION, OPTIONS and COMMANDS."""
        made = [".SH DESCRIPTION", *roff.prose(parser.description or ""), extra_description]
        made += [".SH OPTIONS", *self.arguments(parser)]
        listed = parser.verbs
        if listed:
            made.append(".SH COMMANDS")
        for name, verb in listed.items():
            made.append(f".SS {roff.escape(name)}")
            if verb.verbs:
                made += roff.prose(f"See {parser.prog}-{name}(1).")
                continue
            for n, form in enumerate(synopsis(verb)):
                made += [".br"] * bool(n) + [form]
            made += [*roff.prose(verb.description or ""), *self.arguments(verb, of_a_verb=True)]
        return [line for line in made if line]


def _epilog(text: str) -> Iterator[tuple[str, list[str]]]:
    """The sections of a parser's epilog."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        head, _, rest = block.partition("\n")
        if head.startswith("exit status"):
            yield "EXIT STATUS", roff.exit_status(rest)
        elif head.startswith("examples"):
            yield "EXAMPLES", roff.prose(rest)
        elif head.startswith("options"):
            yield "MOUNT OPTIONS", [line for forms, text in descriptions() for line in roff.item(_forms(forms), text)]
        else:
            yield "OUTPUT" if rest else "NOTES", roff.prose(block)


def _forms(forms: str) -> str:
    """How an option is written: log=FILE with FILE to be replaced."""
    made = []
    for form in forms.split(", "):
        name, equals, value = form.partition("=")
        made.append(roff.bold(name + equals) + (roff.italic(value) if value else ""))
    return ", ".join(made)


def written(name: str) -> dict[str, str]:
    """The sections of NAME.SECTION.txt, which begin with a line [HEADING]."""
    text = resources.files("pkernfs.cli.manual").joinpath(f"{name}.txt").read_text(encoding="ascii")
    parts = re.split(r"^\[(.+)\]\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def page(wanted: Page) -> str:
    """One page, complete."""
    parser = wanted.parser()
    for verb in parser.verbs.values():
        verb.load()
    sections: dict[str, list[str]] = {"SYNOPSIS": list(synopsis(parser))}
    for heading, lines in _epilog(parser.epilog or ""):
        sections.setdefault(heading, []).extend(lines)
    for heading, text in written(f"{wanted.name}.{wanted.section}").items():
        sections.setdefault(heading, []).extend(roff.prose(text))
    sections["SEE ALSO"] = [roff.inline(", ".join(wanted.see_also))]
    parser.epilog = None
    facts = {"project_name": "pkernfs", "version": __version__, "manual_title": "pkernfs"}
    made = Manpage(parser, facts | {"manual_section": wanted.section, "description": wanted.about})
    made.prog = wanted.name
    made.mf = _Formatter(wanted.name, made.formatter, format="pretty")
    for heading in sorted(sections, key=ORDER.index):
        made.add_section(heading, "=", "\n".join(sections[heading]))
    return tidy(str(made).replace(roff.escape(made.date), made.date, 1))  # mandoc reads no date with escapes


def tidy(text: str) -> str:
    """Without empty lines, and without .PP where a heading begins a paragraph anyway: mandoc warns of both."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(
        line for before, line in zip(["", *lines], lines, strict=False)
        if not (line == ".PP" and before.startswith((".SH", ".SS")))
    ) + "\n"  # fmt: skip
