"""The filesystems that are measured.  All keep their data in a tmpfs, and none is asked to share it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final

GiB: Final = 1 << 30

#: Where a virtual environment has its commands.
BIN: Final = Path(sys.executable).parent


def run(*command: str | Path) -> None:
    """Run a command; raises RuntimeError with its output if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}: {done.stdout[-2000:]}")


def drop_caches() -> None:
    """Write back and drop the page cache and unused dentries and inodes, so that calls reach the FUSE server again.

    What tmpfs holds is no cache: nothing changes for it.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


class System(ABC):
    """One filesystem: its memory is made by `prepare`, and it can be mounted and unmounted any number of times."""

    #: Heading of the column.
    name: str
    #: Its command or commands, each of which must be there.
    commands: tuple[str, ...] = ()

    def __init__(self, scratch: Path) -> None:
        """`scratch` is a directory on a tmpfs, of which this system has its own folder."""
        self.home = scratch / type(self).__name__.lower()
        self.mnt = self.home / "mnt"

    def missing(self) -> str:
        """Say which command is missing; empty if none."""
        return ", ".join(command for command in self.commands if not self.command(command))

    def command(self, name: str) -> str | None:
        """Full path of a command: that of the virtual environment, else that on PATH."""
        return shutil.which(name, path=f"{BIN}:{os.environ.get('PATH', os.defpath)}")

    def prepare(self, size: int = 2 * GiB) -> None:
        """Make an empty filesystem of `size` bytes."""
        self.discard()
        self.mnt.mkdir(parents=True)
        self.make(size)

    def discard(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.home, ignore_errors=True)

    def unmount(self) -> None:
        """Unmount; the data stay."""
        run("umount", self.mnt)

    @abstractmethod
    def make(self, size: int) -> None:
        """Make the memory."""

    @abstractmethod
    def mount(self) -> None:
        """Mount; when it returns, the mount is usable."""


class Pkernfs(System):
    """This filesystem, with the commands and defaults that a user gets."""

    name = "pkernfs"
    commands = ("mkfs.pkernfs", "mount.pkernfs")

    def make(self, size: int) -> None:
        run(str(self.command("mkfs.pkernfs")), "--size", str(size), self.home / "region")

    def mount(self) -> None:
        run(str(self.command("mount.pkernfs")), self.home / "region", self.mnt)


class PkernfsWriteback(Pkernfs):
    """The same with the kernel's writeback cache."""

    name = "pkernfs -o writeback"

    def mount(self) -> None:
        run(str(self.command("mount.pkernfs")), self.home / "region", self.mnt, "-o", "writeback")


class Tmpfs(System):
    """The kernel's own: what the machine's memory can do."""

    name = "tmpfs"

    def make(self, size: int) -> None:
        self.size = size

    def mount(self) -> None:
        run("mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", self.mnt)


class Bindfs(System):
    """C libfuse, which passes every request on to a directory of a tmpfs; with its defaults (one thread)."""

    name = "bindfs over tmpfs"
    commands = ("bindfs",)

    def make(self, _size: int) -> None:
        (self.home / "tmpfs").mkdir()

    def mount(self) -> None:
        run("bindfs", self.home / "tmpfs", self.mnt)


def discard_all(systems: list[System]) -> None:
    """Unmount what is mounted, with patience and at last by force, and remove everything."""
    for system in systems:
        for force in ([], [], [], ["--lazy"]):
            if not os.path.ismount(system.mnt):
                break
            if subprocess.run(["umount", *force, system.mnt], capture_output=True, check=False).returncode:
                time.sleep(1)
        system.discard()


def present(scratch: Path, kinds: Sequence[type[System]] = (Pkernfs, Tmpfs, Bindfs)) -> tuple[list[System], list[str]]:
    """Return the systems that can be measured here, and a line about each that cannot."""
    systems: list[System] = []
    absent = []
    for kind in kinds:
        system = kind(scratch)
        if missing := system.missing():
            absent.append(f"{system.name}: left out, found no {missing}")
        else:
            systems.append(system)
    return systems, absent
