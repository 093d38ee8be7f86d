"""Fixtures of the tests of page tables: machines, where there is a QEMU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pkernfs.qemu.cmdline import find_qemu
from pkernfs.qemu.errors import QemuError
from tests.iommu.machine import Machine


@pytest.fixture(scope="session")
def qemu() -> None:
    """Skips where there is no QEMU; needs no guest."""
    try:
        find_qemu()
    except QemuError as error:
        pytest.skip(str(error))


@pytest.fixture
def machine(qemu: None) -> Iterator[Callable[..., Machine]]:  # noqa: ARG001  # it skips
    """Starts a machine, as the class does; the test ends it."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Machine(*args, **kwargs))
