"""What fsck.pkernfs prints: lines for people, or one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pkernfs.cli.text import human
from pkernfs.errors import printable
from pkernfs.format import BLOCK
from pkernfs.fsck.problems import PROBLEMS

if TYPE_CHECKING:
    from pkernfs.format import Ino
    from pkernfs.fsck.check import Check
    from pkernfs.fsck.findings import Finding
    from pkernfs.fsck.repair import Repair
    from pkernfs.fsck.run import Result


def report(arguments: argparse.Namespace, result: Result, code: int, *, shown: bool) -> None:
    """Print what was found and done.  ``code``: the exit status; ``shown``: the problems were printed already."""
    if arguments.json:
        print(json.dumps(_object(arguments.region, result, code), indent=2))
        return
    name, problems, left = printable(arguments.region), result.problems, result.left
    for warning in result.warnings:
        print(f"fsck.pkernfs: warning: {printable(warning)}", file=sys.stderr)
    if result.records:
        where = "replayed" if result.stored else "replayed in memory only, the next mount (or -y) does it for good"
        print(f"{name}: the journal held an unfinished transaction of {result.records} records: {where}")
    if not shown:
        for line in lines(name, problems, result.paths):
            print(line)
    for repair in result.repairs:
        print(f"{name}: repaired: {repair.text}{_path(repair.ino, result.paths)}")
    if result.stored and left and left != problems:
        for line in lines(f"{name}: left", left, result.paths):
            print(line)
    if problems:
        found = count(problems, "problem")
        if result.stored:
            print(f"{name}: {found} found, {count(result.repairs, 'repair')} made, {count(left, 'problem')} left")
        else:
            print(f"{name}: {found} found; -y repairs what can be repaired")
    elif result.check:
        check = result.check
        print(f"{name}: clean, {check.reached.files} files, {check.reached.directories} directories{_space(check)}")
    if arguments.verbose and result.check:
        for line in _figures(result.check):
            print(f"{name}: {line}")


def lines(name: str, problems: Sequence[Finding], paths: dict[Ino, str]) -> Iterator[str]:
    """One for each problem: which invariant, what was expected and found, and the path where there is one."""
    for problem in problems:
        yield f"{name}: {problem.code}: {problem.text}{_path(problem.ino, paths)}"


def count(items: Sequence[object], noun: str) -> str:
    """How many there are: `2 problems`."""
    return f"{len(items)} {noun}" + "s" * (len(items) != 1)


def _path(ino: Ino, paths: dict[Ino, str]) -> str:
    return f" ({printable(paths[ino])})" if ino in paths else ""


def _space(check: Check) -> str:
    volume = check.volume
    blocks, first = volume.space.blocks, volume.space.first_block
    return f", {blocks - first - volume.space.free_blocks} of {blocks - first} blocks in use"


def _figures(check: Check) -> Iterator[str]:
    slabs = check.memory.slabs.values()
    volume = check.volume
    yield f"{volume.sb.blocks} blocks ({human(volume.sb.blocks * BLOCK)}), {volume.sb.first_block} of them metadata"
    yield f"{volume.space.free_blocks} blocks free ({human(volume.space.free_blocks * BLOCK)})"
    yield f"{len(slabs)} slabs, {sum(slab.free for slab in slabs)} of their pages free"
    yield f"{sum(slab.inodes for slab in slabs)} inodes in use, {len(check.reached.listed)} of them orphans"


def _object(region: str, result: Result, code: int) -> dict[str, object]:
    check, left = result.check, set(result.left)
    state = "repaired" if result.stored else "found"
    return {
        "region": os.path.realpath(region),
        "exit": code,
        "clean": not left,
        "replayed": result.records if result.stored else 0,
        "files": check.reached.files if check else None,
        "directories": check.reached.directories if check else None,
        "warnings": result.warnings,
        "problems": [
            {**_problem(problem, result.paths), "state": "left" if result.stored and problem in left else state}
            for problem in result.problems
        ],
        "repaired": [{"code": repair.code, **_place(repair, result.paths)} for repair in result.repairs],
        "left": [_problem(problem, result.paths) for problem in result.left],
    }


def _problem(problem: Finding, paths: dict[Ino, str]) -> dict[str, object]:
    return {"checker": problem.code, "invariant": PROBLEMS[problem.code].statement, **_place(problem, paths)}


def _place(what: Finding | Repair, paths: dict[Ino, str]) -> dict[str, object]:
    return {
        "text": what.text,
        "ino": what.ino or None,
        "path": paths.get(what.ino),
        "offset": what.offset or None,
        "block": what.offset // BLOCK if what.offset else None,
    }
