"""Completion for bash and zsh, made from the parsers with shtab."""

from __future__ import annotations

import shtab

from pkernfs.cli.manual.commands import PAGES
from pkernfs.cli.parsers import Parser
from pkernfs.options import DECLARED, KERNEL, Value

_FORMS = " ".join(
    word
    for field, option in DECLARED.items()
    for word in ([f"{field}="] if isinstance(option, Value) else option.values)
)
#: The last of a list of mount options.
OPTIONS = {
    "bash": "_pkernfs_mount_options",
    "zsh": "_pkernfs_mount_options",
    "preamble": {
        "bash": f"""\
_pkernfs_mount_options() {{
  local last=${{1##*,}}
  compgen -P "${{1%"$last"}}" -W "{_FORMS} {" ".join(KERNEL)}" -- "$last"
}}""",
        "zsh": f"""\
_pkernfs_mount_options() {{
  _values -s , option {_FORMS.replace("=", "")} {" ".join(KERNEL)}
}}""",
    },
}
FILES = ("REGION", "MOUNT/FILE", "FILE", "REGION:PATH", "REGION[:PATH]", "REGION|MOUNT", "MOUNT|REGION",
         "REGION|MOUNT|MOUNT/FILE", "MOUNT/iommu/NAME", "DOMAIN", "DEVICE|DOMAIN")  # fmt: skip
#: What completes an argument, by its metavar; nothing completes others.
COMPLETES = (
    {"OPTIONS": OPTIONS}
    | dict.fromkeys(("DIR", "MOUNT", "MOUNT/DIR"), shtab.DIRECTORY)
    | dict.fromkeys(FILES, shtab.FILE)
)


def scripts() -> dict[str, str]:
    """Path below PREFIX/share -> its text."""
    made = {}
    for page in PAGES:
        parser = page.parser()
        if page.name == parser.prog:
            _complete(parser)
            made[f"bash-completion/completions/{page.name}"] = shtab.complete(parser, "bash")
            made[f"zsh/site-functions/_{page.name}"] = shtab.complete(parser, "zsh")
    return made


def _complete(parser: Parser) -> None:
    """Say what completes each argument, in an attribute of it, where shtab looks."""
    for action in parser.arguments():
        if isinstance(action.metavar, str) and action.metavar in COMPLETES:
            action.complete = COMPLETES[action.metavar]  # type: ignore[attr-defined]
    for verb in parser.verbs.values():
        verb.load()
        _complete(verb)
