"""Write the manual: `python -m pkernfs.cli.manual DIRECTORY`."""

from __future__ import annotations

import sys
from pathlib import Path

from pkernfs.cli.manual import commands, completion, region


def files() -> dict[str, str]:
    """Path below PREFIX/share -> its text."""
    made = {f"man/man{page.section}/{page.name}.{page.section}": commands.page(page) for page in commands.PAGES}
    return made | {"man/man5/pkernfs.5": region.page()} | completion.scripts()


def write(directory: Path) -> None:
    """Write all of it; what a directory has that is not made any more stays."""
    for name, text in files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
