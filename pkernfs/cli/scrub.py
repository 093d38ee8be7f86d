"""pkernfs scrub: verify every checksum of a mounted region."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DESCRIPTION = """\
Verify every checksum of a region while it is mounted and in use.  Single structures are looked at; whether they agree
with each other is what fsck.pkernfs finds out, without a mount.

  pkernfs scrub /mnt/pkernfs

exit status:  0  all is well     1  it failed     4  damage was found
"""
DAMAGED = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MOUNT."""
    parser.add_argument("mount", metavar="MOUNT")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Ask the server for one block after the other.  Raises PkernfsError."""
    from pkernfs.client import control

    blocks = control(arguments.mount, "info")["blocks"]
    problems: list[str] = []
    structures = at = 0
    with _progress(blocks, quiet=arguments.json) as advance:
        while at < blocks:
            step = control(arguments.mount, "scrub", block=at)
            at = step["next"]
            structures += step["structures"]
            problems += step["problems"]
            advance(at)
    if arguments.json:
        print(json.dumps({"structures": structures, "clean": not problems, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print(problem)
        print(f"{arguments.mount}: {structures} structures verified, {len(problems)} damaged")
    return DAMAGED if problems else 0


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; the function takes how far it is."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=total)
        yield lambda done: bar.update(task, completed=done)
