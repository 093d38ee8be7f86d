"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import pytest

from tests.namespace import enter_mount_namespace


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/mount/test_kills.py, and a sample of all tests."""
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one test of N, the same ones each time (1)")
    group = parser.getgroup("kills", "kills of the server")
    group.addoption("--kills", type=int, default=30, metavar="N", help="rounds of the long form (30)")
    group.addoption("--kill-seed", type=int, default=1000, metavar="SEED", help="seed of the first of them (1000)")


def pytest_configure() -> None:
    """Keep the tests' mounts to themselves.  Each process of pytest-xdist comes by here; other users mount nothing."""
    if os.geteuid() == 0:
        with suppress(PermissionError):  # root of a container that may not mount: what needs no mount is tested
            enter_mount_namespace()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the sample: behind the choice by marks, so that it is one of those."""
    kept = items[:: config.getoption("--every")]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % config.getoption("--every")])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a failed test's report hold names that are not UTF-8, on which pytest-xdist would end the whole run."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_sendable(key): _sendable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_sendable, value))
    return value
