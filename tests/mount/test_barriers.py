"""-o barrier and nobarrier: a region on a disk is flushed in order, unless told otherwise; memory needs no flush."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.site import Site, run

FAILURE = 32


@pytest.fixture
def on_disk() -> Iterator[Site]:
    """A region of 16 MiB on a disk, not mounted."""
    for folder in ("/var/tmp", "/tmp"):
        if "tmpfs" not in run("df", "--output=fstype", folder).stdout:
            break
    else:
        pytest.skip("neither /var/tmp nor /tmp is on a disk")
    region = Path(folder) / f"pkernfs-test-{os.getpid()}-region"
    made = Site(region, "16M")
    try:
        yield made
    finally:
        made.close()
        region.unlink(missing_ok=True)


def facts(site: Site) -> dict[str, object]:
    """What `pkernfs info` says of the mount."""
    result: dict[str, object] = json.loads(site.run_ok("pkernfs", "info", "--json", site.mnt))
    return result


@pytest.mark.parametrize(
    ("options", "barriers", "says"),
    [
        ("", True, "barriers are on"),
        ("barrier", True, "barriers are on"),
        ("nobarrier", False, "mounted with nobarrier"),
        ("barrier=0", False, "mounted with nobarrier"),
        ("nobarrier,barrier=1", True, "barriers are on"),
        ("ro,nobarrier", False, "but for mounts with nobarrier"),
    ],
)
def test_on_a_disk(on_disk: Site, options: str, barriers: bool, says: str) -> None:
    on_disk.mount(options)
    found = facts(on_disk)
    assert (found["kind"], found["volatile"], found["barriers"]) == ("file", True, barriers)
    assert says in on_disk.run_ok("pkernfs", "info", on_disk.mnt)
    if "ro" not in options.split(","):
        (on_disk.mnt / "f").write_bytes(b"x" * 10_000)
        with (on_disk.mnt / "f").open("ab") as file:
            file.write(b"y" * 100)
            os.fsync(file)
        on_disk.crash()
        on_disk.mount()
        assert (on_disk.mnt / "f").read_bytes() == b"x" * 10_000 + b"y" * 100


def test_in_memory(site: Site) -> None:
    found = facts(site)
    assert (found["kind"], found["volatile"], found["barriers"]) == ("tmpfs", False, False)
    assert "ends what is in memory" in site.run_ok("pkernfs", "info", site.mnt)


def test_memory_has_nothing_to_flush(unmounted: Site) -> None:
    result = unmounted.try_mount("barrier")
    assert (result.returncode, result.stdout) == (FAILURE, "")
    assert "-o barrier: expected a region on a disk, found tmpfs" in result.line
    assert not unmounted.servers()
    unmounted.mount("nobarrier")


def test_remount_does_not_change_it(on_disk: Site) -> None:
    on_disk.mount("nobarrier")
    result = run("mount.pkernfs", "-o", "remount,barrier", on_disk.region, on_disk.mnt)
    assert (result.returncode, result.stdout) == (FAILURE, "")
    assert "was opened without barriers: umount it" in result.line
    on_disk.run_ok("mount.pkernfs", "-o", "remount,nobarrier,ro", on_disk.region, on_disk.mnt)
    on_disk.run_ok("mount.pkernfs", "-o", "remount,rw", on_disk.region, on_disk.mnt)
