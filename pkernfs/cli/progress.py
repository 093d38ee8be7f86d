"""A bar on a terminal, and nothing in a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Takes what is done now, how much of it is done, and how much there is; 0: not known.
Advance = Callable[[str, int, int], None]


@contextmanager
def bar(*, quiet: bool = False) -> Iterator[Advance | None]:
    """The function that moves the bar on standard error; None where nobody sees it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total or None)

        yield advance
