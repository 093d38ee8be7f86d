"""Hostile regions, mounted: refused with one line, or only what is damaged fails; the log and `pkernfs info` say so."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu.guard import open_filesystem
from pkernfs.region import open_region
from tests.core.faults import flip
from tests.core.handmade import CASES, Case
from tests.core.images import cast
from tests.core.support import mkfile
from tests.mount.site import Site, errno_of, run

FAILURE = 32  #: mount(8): the mount failed
PATHS = ["", "d", "d/f", "g", "empty", "d/e", "d/e/inner", "big", "sparse", "link", "iommu"]
REFUSED = [
    ("root-is-damaged", "rw"),
    ("root-has-a-parent", "ro"),
    ("block-of-an-unknown-kind", "rw"),
    ("superblock-of-2-63-blocks", "rw"),
    ("journal-stores-outside", "rw"),
    ("journal-stores-outside", "ro"),
    ("journal-of-too-many-records", "rw"),
]
DAMAGED = [
    "directory-names-the-one-above",
    "directory-is-its-own-parent",
    "name-with-slash",
    "name-of-a-free-slot",
    "file-of-0x7fffffffffffffff",
    "extent-over-inodes",
    "child-is-its-parent",
    "attribute-value-outside",
    "orphans-in-a-loop",
]


def plant(site: Site, change: Callable[[Filesystem], object]) -> None:
    """Make some files, and then something hostile, in a region that is not mounted."""
    with open_region(str(site.region)) as region:
        fs = open_filesystem(region)
        cast(fs)
        change(fs)


def mend(site: Site) -> None:
    """Unmount and repair: the site's end finds a sound region."""
    if site.is_mounted():
        site.umount()
    assert run("fsck.pkernfs", "-y", site.region).returncode == 1


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_a_mount_is_refused_with_one_line(unmounted: Site, name: str, options: str) -> None:
    plant(unmounted, CASES[name].plant)
    before = unmounted.digest()
    result = unmounted.try_mount(options)
    assert result.returncode == FAILURE, result
    assert result.line.startswith("mount.pkernfs: ")
    assert CASES[name].refused in result.line
    assert not unmounted.is_mounted()
    assert not unmounted.servers()
    assert unmounted.digest() == before
    mend(unmounted)


def reads(path: Path) -> Iterator[int]:
    """The errnos of calls that read what is there."""
    yield errno_of(os.lstat, path)
    if os.path.islink(path):
        yield errno_of(os.readlink, path)
        return
    yield errno_of(os.listxattr, path)
    yield errno_of(os.getxattr, path, "user.large") if path.name == "d" else 0
    if os.path.isdir(path):
        yield errno_of(os.listdir, path)
    else:
        yield errno_of(path.read_bytes)


def changes(path: Path) -> Iterator[int]:
    """The errnos of calls that change it, and leave it much as it was."""
    if os.path.islink(path):
        yield errno_of(os.chown, path, 0, 0, follow_symlinks=False)
        return
    yield errno_of(os.chmod, path, 0o755)
    yield errno_of(os.setxattr, path, "user.hostile", b"v")
    if path.name == "iommu":
        yield errno_of(os.mknod, path / "made")
        yield errno_of(os.unlink, path / "made")
    elif os.path.isdir(path):
        yield errno_of(os.mkdir, path / "made")
        yield errno_of(os.rmdir, path / "made")
    else:
        yield errno_of(os.truncate, path, 4096)


@pytest.mark.parametrize("name", DAMAGED)
def test_only_what_is_damaged_fails(unmounted: Site, name: str) -> None:
    site, case = unmounted, CASES[name]
    plant(site, case.plant)
    site.expected = re.compile("is damaged: ")
    site.mount()
    found, changed = use(site, case, reads), use(site, case, changes)
    again = use(site, case, changes)
    damaged = {os.fsdecode(path) for path in case.damaged}
    assert {path for path in {**found, **changed} if found[path] | changed[path]} == damaged
    assert {path for path, errnos in again.items() if errnos} <= damaged
    for errnos in again.values():
        assert errnos <= {errno.EUCLEAN, errno.EROFS, errno.ENOENT}
    facts = json.loads(site.run_ok("pkernfs", "info", "--json", site.mnt))["damaged"]
    assert facts
    assert f"{len(facts)} structure" in site.run_ok("pkernfs", "info", site.mnt)
    lines = re.findall(r"ERROR: (.* is damaged: .*)", site.server_log.read_text(errors="replace"))
    assert len(lines) == len(set(lines)) == len(facts), "each is logged once"
    for fact in facts:
        assert any(f"{fact['offset']:#x}" in line for line in lines)
    assert not re.search("Traceback|a bug", site.server_log.read_text(errors="replace"))
    mend(site)


def use(site: Site, case: Case, calls: Callable[[Path], Iterator[int]]) -> dict[str, set[int]]:
    """The errnos for each path that does not lie below what is damaged."""
    damaged = {os.fsdecode(path) for path in case.damaged}
    paths = [path for path in PATHS if not any(path.startswith(one + "/") for one in damaged)]
    return {path: set(calls(site.mnt / path)) - {0} for path in sorted({*paths, *damaged})}


def test_a_damaged_slab_is_not_allocated_from(unmounted: Site) -> None:
    """What is in other slabs can be used; df and info work, and new files go elsewhere."""
    site = unmounted

    def damage(fs: Filesystem) -> None:
        first = fs.resolve(b"g") // 16 // 512
        n = 0
        while (slab := fs.content.extents(mkfile(fs, b"f%d" % n, b"x" * 200_000))[0].page // 512) == first:
            n += 1
        flip(fs, slab * 512 * 4096 + 100)

    plant(site, damage)
    site.expected = re.compile("is damaged: ")
    site.mount()
    assert os.statvfs(site.mnt).f_bfree
    (fact,) = json.loads(site.run_ok("pkernfs", "info", "--json", site.mnt))["damaged"]
    assert fact["structure"].startswith("the header of slab")
    assert fact["ino"] is None
    (site.mnt / "new").write_bytes(b"new" * 2000)
    assert (site.mnt / "new").read_bytes() == b"new" * 2000
    assert (site.mnt / "big").read_bytes()
    os.unlink(site.mnt / "new")
    assert len(re.findall("is damaged", site.server_log.read_text())) == 1
    mend(site)


def test_the_tools_end_in_a_loop_of_directories(unmounted: Site) -> None:
    """ls -R lists what is intact, names what is not, and fails."""
    site = unmounted
    plant(site, CASES["directory-names-the-one-above"].plant)
    result = run("pkernfs", "ls", "-R", site.region)
    assert result.returncode == 1
    assert "/d/e:\ninner\n" in result.stdout
    assert "big" in result.stdout
    assert "is damaged" in result.line
    scan = json.loads(run("pkernfs", "ls", "-R", "--json", site.region).stdout)
    assert sum(row["name"] == "inner" for row in scan) == 1
    mend(site)
