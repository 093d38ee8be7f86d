"""Finding QEMU, and writing its command lines."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pkernfs.errors import quoted
from pkernfs.qemu.errors import QemuError

BINARY = "qemu-system-x86_64"

#: The machine's RAM.  A RAM block's name is part of the migration stream: it must be the same at save and at resume.
RAM_ID = "pc.ram"


class Version(NamedTuple):
    """A version of QEMU; compares as versions do."""

    major: int
    minor: int
    micro: int = 0

    def __str__(self) -> str:
        return ".".join(map(str, self))


#: First version whose memory-backend-file knows `offset=`.
OFFSET_SINCE = Version(8, 1)
#: First version with the migration mode cpr-reboot and with `file:` URIs.
CPR_SINCE = Version(8, 2)


class Qemu(NamedTuple):
    """A QEMU that was found on this machine."""

    path: str  #: of the executable
    version: Version

    @property
    def knows_offset(self) -> bool:
        """Can it map a range of a file, as the direct map needs?"""
        return self.version >= OFFSET_SINCE

    @property
    def knows_cpr(self) -> bool:
        """Can it save a guest whose RAM stays where it is?"""
        return self.version >= CPR_SINCE


def parse_version(text: str) -> Version | None:
    """The version in the output of `qemu-system-x86_64 --version`, or None if that is not what `text` is."""
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        return None
    major, minor, micro = match.groups(default="0")
    return Version(int(major), int(minor), int(micro))


def find_qemu(needed: Version = CPR_SINCE, binary: str = BINARY) -> Qemu:
    """The QEMU on PATH.

    Raises QemuError if there is none, or if it is older than `needed`.
    """
    hint = "run mount_helpers/guest-qemu as root"
    path = shutil.which(binary)
    if path is None:
        raise QemuError(f"{binary} >= {needed} on PATH", "none", hint)
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = parse_version(answer.stdout)
    if version is None:
        first = next(iter((answer.stdout or answer.stderr).splitlines()), "")
        raise QemuError(f"{path} --version to tell a version", quoted(first), hint)
    if version < needed:
        raise QemuError(f"{binary} >= {needed}", f"{version} at {path}", hint)
    return Qemu(path, version)


def escape(value: str) -> str:
    """`value` as it must stand inside a QEMU option list: commas are doubled."""
    return value.replace(",", ",,")


def backend_option(
    mem_path: str | Path, size: int, offset: int | None = None, id: str = RAM_ID, align: int | None = None
) -> str:
    """The argument of `-object` that makes `size` bytes of `mem_path` a memory backend, shared with the file.

    `offset` is in bytes, and asks for a QEMU >= 8.1; None maps the file from its start.  `align` is for a device DAX,
    whose mappings must be aligned to 2 MiB.  Whoever hands this to a shell has to quote it.
    """
    if size <= 0 or (offset or 0) < 0:
        raise ValueError(f"no such range of memory: size {size}, offset {offset}")
    options = ["memory-backend-file", f"id={escape(id)}", f"size={size}", f"mem-path={escape(str(mem_path))}"]
    if offset is not None:
        options.append(f"offset={offset}")
    if align is not None:
        options.append(f"align={align}")
    options.append("share=on")
    return ",".join(options)


def backend_arguments(mem_path: str | Path, size: int, offset: int | None = None, id: str = RAM_ID) -> list[str]:
    """`backend_option` as two words of a command line, `-object` and its argument."""
    return ["-object", backend_option(mem_path, size, offset, id)]


class Machine(NamedTuple):
    """A Linux guest without disks or network, whose RAM is a memory backend.

    The same Machine must be given at the resume as at the start, except for `backend`, which may name another way to
    the same bytes.
    """

    backend: str  #: argument of `-object`, as `backend_option` makes it, with the id RAM_ID
    memory: int  #: bytes of RAM, the size of the backend
    kernel: Path
    initrd: Path
    append: str = "console=ttyS0 quiet"  #: the kernel's command line
    accel: str = "tcg"
    #: `max` would be faster to name than to migrate: it means another CPU in another QEMU.
    cpu: str = "qemu64"
    type: str = "q35"
    #: The file of a mount that the RAM is, where the backend names the region: it is held while the guest is saved.
    ram: Path | None = None


def guest_command(
    qemu: Qemu, machine: Machine, *, monitor: Path, console: Path, incoming: bool = False, extra: Sequence[str] = ()
) -> list[str]:
    """The command line for `machine`: QMP on the unix socket `monitor`, the serial port appended to the file `console`.

    With `incoming` the guest waits for its state (`-incoming defer`) instead of booting.
    """
    command = [qemu.path, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-machine", f"{machine.type},accel={machine.accel},memory-backend={RAM_ID}", "-cpu", machine.cpu]
    command += ["-m", f"size={machine.memory}B", "-object", machine.backend]
    # The kernel is given at the resume too: it is in the table of firmware files, which must look as it did.
    command += ["-kernel", str(machine.kernel), "-initrd", str(machine.initrd), "-append", machine.append]
    command += ["-chardev", f"file,id=console,path={escape(str(console))},append=on", "-serial", "chardev:console"]
    command += ["-qmp", f"unix:{escape(str(monitor))},server=on,wait=off"]
    if incoming:
        command += ["-incoming", "defer"]
    return command + list(extra)
