"""Fixtures: a site for one test, a pair of directories (mount and tmpfs) for the comparisons."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.site import Site, faulty_worker, run
from tests.mount.twin import Pair, Twin, Users


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs root and /dev/fuse."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("mount")
            if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
                item.add_marker(pytest.mark.skip(reason="needs root and /dev/fuse"))


@pytest.fixture
def site() -> Iterator[Site]:
    """A region of 64 MiB, mounted; checked and taken away at the end."""
    made = Site()
    try:
        made.mount()
        yield made
    finally:
        made.close()


@pytest.fixture
def unmounted() -> Iterator[Site]:
    """A region of 64 MiB that is not mounted."""
    made = Site()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def mounted(unmounted: Site) -> Site:
    """A mount whose workers fail as ``strike`` says."""
    unmounted.expected = re.compile("takes over|takeover failed")
    unmounted.mount_with(faulty_worker(unmounted))
    return unmounted


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """A region of 512 MiB, mounted for all tests of a module; each keeps to a directory of its own."""
    made = Site(size="512M")
    try:
        made.mount()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def users() -> Iterator[Users]:
    """Processes of several users."""
    made = Users()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tmpfs(shared: Site) -> Iterator[Path]:
    """A tmpfs of its own to compare with, as large as the shared region."""
    path = shared.tmp / "tmpfs"
    path.mkdir()
    result = run("mount", "-t", "tmpfs", "-o", "size=512M,mode=755", "tmpfs", path)
    assert result.returncode == 0, result
    yield path
    run("umount", "-l", path)


@pytest.fixture
def twin(shared: Site, tmpfs: Path, users: Users, request: pytest.FixtureRequest) -> Iterator[Twin]:
    """A directory of this test's own on the mount and one on the tmpfs, that everybody may write.

    What is left in them at the end must be the same; then the log must be clean and the region sound.
    """
    name = re.sub(r"\W+", "-", request.node.name)[:100]
    roots = Pair(str(shared.mnt / name), str(tmpfs / name))
    for root in roots:
        os.mkdir(root)
        os.chmod(root, 0o777)
    made = Twin(roots, users)
    try:
        yield made
        made.tree()
    finally:
        users.tidy()
    assert shared.complaints() == []
    shared.verify()
