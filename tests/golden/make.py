"""Make the golden image of a version of the format, with the commands of the release that has it.

    PYTHON-OF-THE-RELEASE -m tests.golden.make NAME

as root, where NAME is the version of the format, and what features its regions have beyond it: 1-far-copy.  The region
is left as kexec finds it: the server killed, a file open that has no name any more, a device with DMA under way, and
hardware not yet told of what is not mapped any more.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.golden.image import HERE, version_of
from tests.golden.image import to_text as image_text
from tests.golden.manifest import manifest, may_change, to_text
from tests.namespace import enter_mount_namespace

KiB, MiB = 1 << 10, 1 << 20
PROGRAMS = Path(sysconfig.get_path("scripts"))


def run(program: str, *words: str | Path) -> str:
    """Run a command of the release; what it prints."""
    done = subprocess.run([PROGRAMS / program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def fill(mnt: Path) -> None:
    """Put something of each kind into a mount."""
    (mnt / "empty").mkdir()
    (mnt / "small").write_text("a small file\n")
    os.link(mnt / "small", mnt / "second name")
    os.chown(mnt / "small", 1000, 100)
    (mnt / "short link").symlink_to("small")
    (mnt / "long link").symlink_to("x/" * 100)
    os.mkfifo(mnt / "fifo", 0o640)
    os.mknod(mnt / "null", 0o20666, os.makedev(1, 3))
    (mnt / os.fsdecode(b"not UTF-8: \xff")).touch(0o4755)
    many = mnt / "many"
    many.mkdir(0o1777)
    for number in range(100):
        (many / f"a name that takes some room in a node of the tree {number}").touch()
    with (mnt / "sparse").open("wb") as file:
        for number in range(12):
            file.seek(number * 40 * KiB)
            file.write(b"%d\n" % number * 2000)
    (mnt / "blocks").write_bytes(b"block\n" * 500_000)
    os.setxattr(mnt / "small", "user.small", b"value")
    os.setxattr(mnt / "small", "trusted.large", b"value" * 2000)
    os.setxattr(mnt / "many", "user.of a directory", b"")
    tenant = mnt / "tenant"
    tenant.mkdir()
    run("pkernfs", "quota", tenant, "1M")
    (tenant / "file").write_bytes(b"tenant's\n" * 5000)


def map_memory(mnt: Path) -> None:
    """Make domains, of both formats of tables, with a device that goes on doing DMA."""
    ram = mnt / "guest-ram"
    with ram.open("wb") as file:
        file.truncate(2 * MiB)
    run("pkernfs", "direct", ram, "on")
    for name, form in (("dom-0", "vtd"), ("dom-1", "amd")):
        path = mnt / "iommu" / name
        run("pkernfs", "iommu", "create", path, "--format", form)
        run("pkernfs", "iommu", "map", path, "0", ram)
        run("pkernfs", "iommu", "map", path, "0x40001000", ram, "--offset", "64K", "--length", "32K", "--ro")
    run("pkernfs", "iommu", "attach", mnt / "iommu/dom-0", "00:05.0", "--persistent")
    run("pkernfs", "iommu", "unmap", mnt / "iommu/dom-0", "0x40003000", "4K")


def set_times(mnt: Path) -> None:
    """Give every file times that no clock gives."""
    for number, path in enumerate(sorted([mnt, *mnt.rglob("*")], reverse=True)):
        if not may_change(path):
            stamp = number * 1_000_000_007 + 1
            os.utime(path, ns=(stamp, stamp), follow_symlinks=False)


def kill_servers(status: dict[str, Any]) -> None:
    """End all that serves a mount, as kexec does."""
    for who in ("keeper", "standby", "worker"):
        os.kill(status[who], signal.SIGKILL)
        while Path(f"/proc/{status[who]}/exe").exists():
            time.sleep(0.01)


def make(name: str) -> None:
    """Write the image and the manifest."""
    work = Path(tempfile.mkdtemp(prefix="pkernfs-golden-", dir="/dev/shm"))
    region, mnt = work / "region", work / "mnt"
    mnt.mkdir()
    try:
        uuid = f"f0f0f0f0-1111-2222-3333-{version_of(name):012}"
        run("mkfs.pkernfs", "--size", "32M", "--label", "golden", "--uuid", uuid, "--phys-base", "1T", region)
        run("mount.pkernfs", region, mnt)
        fill(mnt)
        map_memory(mnt)
        with (mnt / "orphan").open("wb") as orphan:
            orphan.write(b"orphan\n" * 1000)
            orphan.flush()
            (mnt / "orphan").unlink()
            set_times(mnt)
            (HERE / f"format-{name}.json").write_text(to_text(manifest(mnt, str(PROGRAMS / "pkernfs"))))
            os.sync()
            kill_servers(json.loads(run("pkernfs", "status", mnt, "--json")))
            with region.open("rb") as image:
                (HERE / f"format-{name}.txt").write_text(image_text(image))
    finally:
        subprocess.run(["umount", "--lazy", mnt], check=False)
        shutil.rmtree(work)


if __name__ == "__main__":
    enter_mount_namespace()
    make(sys.argv[1])
