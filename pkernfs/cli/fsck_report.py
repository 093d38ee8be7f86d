"""What fsck.pkernfs prints: lines for people, or one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pkernfs.cli.text import human, printable
from pkernfs.format import BLOCK
from pkernfs.fsck.check import INVARIANTS
from pkernfs.fsck.tables import INVARIANTS as TABLES

if TYPE_CHECKING:
    from pkernfs.cli.fsck import Outcome
    from pkernfs.fsck.check import Checker, Problem
    from pkernfs.fsck.repair import Repair


def report(arguments: argparse.Namespace, outcome: Outcome) -> None:
    """Print what was found and done."""
    if arguments.json:
        print(json.dumps(_object(arguments.region, outcome), indent=2))
        return
    name, problems, left = arguments.region, outcome.problems, outcome.left
    for warning in outcome.warnings:
        print(f"fsck.pkernfs: warning: {warning}", file=sys.stderr)
    if outcome.records:
        where = "replayed" if outcome.stored else "replayed in memory only, the next mount (or -y) does it for good"
        print(f"{name}: the journal held an unfinished transaction of {outcome.records} records: {where}")
    if not outcome.shown:
        for line in lines(name, problems, outcome.paths):
            print(line)
    for repair in outcome.repairs:
        print(f"{name}: repaired: {repair.text}{_path(repair.ino, outcome.paths)}")
    if outcome.stored and left and left != problems:
        for line in lines(f"{name}: left", left, outcome.paths):
            print(line)
    if problems:
        found = count(problems, "problem")
        if outcome.stored:
            print(f"{name}: {found} found, {count(outcome.repairs, 'repair')} made, {count(left, 'problem')} left")
        else:
            print(f"{name}: {found} found; -y repairs what can be repaired")
    elif outcome.checker:
        checker = outcome.checker
        print(f"{name}: clean, {checker.files} files, {checker.directories} directories{_space(checker)}")
    if arguments.verbose and outcome.checker:
        for line in _figures(outcome.checker):
            print(f"{name}: {line}")


def lines(name: str, problems: Sequence[Problem], paths: dict[int, str]) -> Iterator[str]:
    """One for each problem: which invariant, what was expected and found, and the path where there is one."""
    for problem in problems:
        yield f"{name}: {problem.code}: {problem.text}{_path(problem.ino, paths)}"


def count(items: Sequence[object], noun: str) -> str:
    """ "2 problems"."""
    return f"{len(items)} {noun}" + "s" * (len(items) != 1)


def _path(ino: int, paths: dict[int, str]) -> str:
    return f" ({printable(paths[ino])})" if ino in paths else ""


def _space(checker: Checker) -> str:
    volume = checker.volume
    blocks, first = volume.space.blocks, volume.space.first_block
    return f", {blocks - first - volume.space.free_blocks} of {blocks - first} blocks in use"


def _figures(checker: Checker) -> Iterator[str]:
    slabs = checker.ledger.slabs.values()
    volume = checker.volume
    yield f"{volume.sb.blocks} blocks ({human(volume.sb.blocks * BLOCK)}), {volume.sb.first_block} of them metadata"
    yield f"{volume.space.free_blocks} blocks free ({human(volume.space.free_blocks * BLOCK)})"
    yield f"{len(slabs)} slabs, {sum(slab.free for slab in slabs)} of their pages free"
    yield f"{sum(slab.inodes for slab in slabs)} inodes in use, {len(checker.listed)} of them orphans"


def _object(region: str, outcome: Outcome) -> dict[str, Any]:
    checker, left = outcome.checker, set(outcome.left)
    state = "repaired" if outcome.stored else "found"
    return {
        "region": os.path.realpath(region),
        "exit": outcome.code,
        "clean": not left,
        "replayed": outcome.records if outcome.stored else 0,
        "files": checker.files if checker else None,
        "directories": checker.directories if checker else None,
        "warnings": outcome.warnings,
        "problems": [
            {**_problem(problem, outcome.paths), "state": "left" if outcome.stored and problem in left else state}
            for problem in outcome.problems
        ],
        "repaired": [{"code": repair.code, **_place(repair, outcome.paths)} for repair in outcome.repairs],
        "left": [_problem(problem, outcome.paths) for problem in outcome.left],
    }


def _problem(problem: Problem, paths: dict[int, str]) -> dict[str, Any]:
    return {"checker": problem.code, "invariant": (INVARIANTS | TABLES)[problem.code], **_place(problem, paths)}


def _place(what: Problem | Repair, paths: dict[int, str]) -> dict[str, Any]:
    return {
        "text": what.text,
        "ino": what.ino or None,
        "path": paths.get(what.ino),
        "offset": what.offset or None,
        "block": what.offset // BLOCK if what.offset else None,
    }
