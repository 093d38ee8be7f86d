"""Other people's programs inside the mount: cp, diff, git, sqlite, tar, rsync, fio."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.mount.site import PATIENCE, Site, below

STDLIB = Path(os.__file__).parent
#: Where files for a tree are taken from, in this order.
SOURCES = [STDLIB, Path("/usr/share"), Path("/usr/lib")]
LARGEST = 300_000


def needs(program: str) -> None:
    """Skip where a program is missing."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program}: mount_helpers/setup installs it")


def real_files() -> Iterator[tuple[Path, Path]]:
    """(file, where it goes), again and again under other names when there are not enough."""
    for turn in range(1000):
        for source in SOURCES:
            for folder, directories, names in os.walk(source):
                directories[:] = sorted(set(directories) - {"__pycache__"})
                for name in sorted(names):
                    path = Path(folder) / name
                    found = path.lstat()
                    if stat.S_ISREG(found.st_mode) and found.st_size < LARGEST:
                        yield path, Path(f"{source.name}{turn or ''}") / path.relative_to(source)


def make_tree(top: Path, count: int) -> None:
    """A tree of ``count`` real files, with one of everything else that cp -a and its like are to keep."""
    for index, (path, place) in enumerate(islice(real_files(), count)):
        target = top / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        os.chown(target, index % 5 * 1000, index % 3 * 1001)
        os.chmod(target, (0o644, 0o755, 0o600, 0o4711, 0o2755, 0o400)[index % 6])
        os.utime(target, ns=(10**18 + index, 10**18 + index * 1_000_003))
        if index % 50 == 0:
            os.link(target, target.with_name(f"hard-{index}"))
        if index % 40 == 0:
            os.symlink(f"../{target.name}", target.with_name(f"soft-{index}"))
        if index % 60 == 0:
            os.setxattr(target, "user.index", b"%d" % index)
    os.mkfifo(top / "fifo")
    os.mknod(top / "device", stat.S_IFCHR | 0o640, os.makedev(10, 229))
    os.symlink("x" * 3000, top / "long")
    (top / os.fsdecode(b"\xff\xfe not utf-8")).write_bytes(b"")
    for index, (folder, _, names) in enumerate(os.walk(top, topdown=False)):
        # Times in the past: rsync does not set those of links and devices that are of this second.
        for name in names:
            os.utime(os.path.join(folder, name), ns=(10**18, 10**18 + 3 * index), follow_symlinks=False)
        os.chmod(folder, (0o755, 0o2775, 0o700, 0o1777)[index % 4])
        os.utime(folder, ns=(10**18, 10**18 + index))


def manifest(top: Path, *, xattrs: bool = True) -> dict[str, tuple[Any, ...]]:
    """Owner, mode, modification time and so on of every entry below a directory."""
    rows: dict[str, tuple[Any, ...]] = {}
    for folder, directories, names in os.walk(top):
        for path in (Path(folder, name) for name in sorted([*directories, *names])):
            found = path.lstat()
            name = str(path.relative_to(top))
            row: tuple[Any, ...] = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev)
            if not stat.S_ISDIR(found.st_mode):
                row += (found.st_size, found.st_nlink)
            if path.is_symlink():
                row += (os.readlink(path),)
            elif xattrs:
                row += tuple((attribute, os.getxattr(path, attribute)) for attribute in sorted(os.listxattr(path)))
            rows[name] = row
    return rows


def same(site: Site, one: Path, two: Path) -> None:
    """Every byte and every attribute."""
    # Not what is neither file, directory nor link: diff calls two fifos different.
    words = ["diff", "-r", "--no-dereference", "--exclude=fifo", "--exclude=device"]
    assert site.run_ok(*words, one, two) == ""
    left, right = manifest(one), manifest(two)
    assert left.keys() == right.keys()
    wrong = {name: (left[name], right[name]) for name in left if left[name] != right[name]}
    assert wrong == {}


@pytest.fixture(scope="module")
def source(shared: Site) -> Path:
    """A tree of 1,200 files on tmpfs."""
    top = shared.shm / "tree"
    make_tree(top, 1200)
    return top


@pytest.mark.parametrize("count", [2500, pytest.param(21_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_cp_and_restart(count: int) -> None:
    """cp -a into the mount, umount, mount, diff -r, and owner, mode and mtime of every entry."""
    site = Site(size="2G")
    try:
        site.mount()
        tree = site.shm / "tree"
        make_tree(tree, count)
        site.run_ok("cp", "-a", tree, site.mnt / "tree")
        site.umount()
        site.mount()
        same(site, tree, site.mnt / "tree")
        site.restart()
        same(site, tree, site.mnt / "tree")
        site.run_ok("rm", "-rf", site.mnt / "tree")
        assert os.listdir(site.mnt) == ["iommu"]
    finally:
        site.close()


def test_tar_through_a_pipe(shared: Site, source: Path) -> None:
    """Into the mount, out of it again, and within."""
    inside, outside, copy = shared.mnt / "tar", shared.shm / "tar", shared.mnt / "tar2"
    for one, two in ((source, inside), (inside, outside), (inside, copy)):
        two.mkdir()
        command = (
            f"tar -C '{one}' --xattrs --format=posix -cf - . | tar -C '{two}' --xattrs --xattrs-include='*' -xpf -"
        )
        shared.run_ok("bash", "-o", "pipefail", "-c", command)
        same(shared, source, two)


def test_rsync(shared: Site, source: Path) -> None:
    needs("rsync")
    inside, outside = shared.mnt / "rsync", shared.shm / "rsync"
    for one, two in ((source, inside), (inside, outside)):
        shared.run_ok("rsync", "-aHAX", f"{one}/", two)
        same(shared, source, two)
        assert shared.run_ok("rsync", "-aHAXn", "--delete", "--checksum", "--itemize-changes", f"{one}/", two) == ""
    # Changes, by replacing files and in place.
    for index, path in enumerate([path for path in below(outside) if path.suffix == ".py"][:50]):
        if index % 2:
            path.write_bytes(path.read_bytes()[: index * 100] + b"changed" * index)
        else:
            path.unlink()
        os.utime(path.parent, ns=(10**18, 10**18 + 10**9 * index))  # not this second, see make_tree
    for words in (["-aHAX", "--delete"], ["-aHAX", "--delete", "--inplace", "--no-whole-file"]):
        for _ in range(2):  # once leaves times of directories behind, on ext4 too
            shared.run_ok("rsync", *words, f"{outside}/", inside)
        same(shared, outside, inside)
        shared.run_ok("rsync", "-aHAX", f"{source}/", inside)


def test_git(shared: Site, source: Path) -> None:
    needs("git")
    repository, clone, bare = (shared.mnt / name for name in ("git", "clone", "bare.git"))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        **{f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        **{"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": str(shared.tmp)},
    }

    def git(folder: Path, *words: str) -> str:
        done = subprocess.run(
            ["git", "-C", folder, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout

    repository.mkdir()
    for path in sorted((source / STDLIB.name).iterdir())[:150]:
        if path.is_file():
            shutil.copy2(path, repository, follow_symlinks=False)
    shutil.copytree(source / STDLIB.name / "asyncio", repository / "asyncio", symlinks=True)
    git(repository, "init", "-q", "-b", "main")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")
    for number in range(3):
        for path in islice(repository.glob("*.py"), 0, None, 7):
            with path.open("a") as file:
                file.write(f"# {number}\n")
        git(repository, "commit", "-q", "-a", "-m", f"change {number}")
    git(shared.mnt, "clone", "-q", "--local", str(repository), str(clone))
    git(shared.mnt, "clone", "-q", "--bare", "--no-local", str(repository), str(bare))
    git(clone, "checkout", "-q", "HEAD~2")
    git(clone, "checkout", "-q", "main")
    git(clone, "gc", "-q", "--prune=now")
    for folder in (repository, clone, bare):
        assert "error" not in git(folder, "fsck", "--full", "--strict")
    assert git(repository, "status", "--porcelain") == git(clone, "status", "--porcelain") == ""
    assert git(repository, "rev-parse", "HEAD") == git(bare, "rev-parse", "main")


WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for number in range(int(sys.argv[3])):
    connection.execute("begin immediate")
    (total,) = connection.execute("select coalesce(max(total), 0) from counts").fetchone()
    connection.execute("insert into counts values (?, ?, ?)", (sys.argv[2], number, total + 1))
    connection.execute("commit")
connection.close()
"""
#: Sees counts rise until they end, then waits to be killed: so nobody merges the log at the end.
READER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=60)
assert connection.execute("pragma journal_mode = wal").fetchone() == ("wal",)
connection.execute("create table counts (who text, number integer, total integer unique)")
connection.commit()
print("ready", flush=True)
seen = 0
while seen < int(sys.argv[2]):
    (count,) = connection.execute("select count(*) from counts").fetchone()
    assert count >= seen
    seen = count
print(seen, flush=True)
time.sleep(600)
"""


def test_sqlite_in_wal_mode(site: Site) -> None:
    """Two processes write and one reads (the log's index is memory that all map); then everything is killed."""
    path = str(site.mnt / "data.db")
    processes = [subprocess.Popen([sys.executable, "-c", READER, path, "300"], stdout=subprocess.PIPE, text=True)]
    reader = processes[0]
    assert reader.stdout
    try:
        assert reader.stdout.readline() == "ready\n"
        for who in "ab":
            processes.append(subprocess.Popen([sys.executable, "-c", WRITER, path, who, "150"], text=True))
        assert [writer.wait(PATIENCE) for writer in processes[1:]] == [0, 0]
        assert reader.stdout.readline() == "300\n"
    finally:
        for process in processes:
            process.kill()
            process.wait()
        reader.stdout.close()
    assert (site.mnt / "data.db-wal").stat().st_size > 0
    assert (site.mnt / "data.db-shm").exists()
    site.restart()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        assert connection.execute("select count(*), max(total) from counts").fetchone() == (300, 300)
        assert connection.execute("pragma journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("mode", ["randwrite", "write", "randrw"])
@pytest.mark.parametrize("engine", ["psync", "mmap"])
def test_fio_verifies(shared: Site, engine: str, mode: str) -> None:
    needs("fio")
    folder = shared.mnt / f"fio-{engine}-{mode}"
    folder.mkdir()
    shared.run_ok(
        "fio", "--name=job", f"--directory={folder}", f"--ioengine={engine}", f"--rw={mode}", "--bs=4k", "--size=12M",
        "--numjobs=2", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--do_verify=1",
        "--fsync=500", "--randseed=1",
        "--bssplit=4k/60:64k/30:256k/10" if engine == "psync" else "--bs=4k", "--output=/dev/null",
    )  # fmt: skip
    shutil.rmtree(folder)


def test_fio_verifies_after_a_restart(site: Site) -> None:
    """Written before, verified after the server was killed."""
    needs("fio")
    words = [
        "fio", "--name=job", f"--filename={site.mnt}/f", "--rw=randwrite", "--bs=4k", "--size=16M", "--randseed=7",
        "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output=/dev/null",
    ]  # fmt: skip
    site.run_ok(*words, "--do_verify=0")
    site.restart()
    site.run_ok(*words, "--verify_only")


def test_compiled_python_runs_from_the_mount(shared: Site) -> None:
    """A package in the mount: imported, its bytecode cached there, imported again."""
    shutil.copytree(STDLIB / "json", shared.mnt / "modules" / "json_copy")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import json_copy; print(json_copy.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, shared.mnt / "modules"],
            env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
        assert done.stdout.startswith(str(shared.mnt))
    assert list((shared.mnt / "modules" / "json_copy" / "__pycache__").glob("*.pyc"))
