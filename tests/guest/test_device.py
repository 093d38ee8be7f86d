"""On real device DAX, with a stock Debian kernel, and over a kexec: what no file can show.

One boot and one kexec for all; what comes after the kexec needs what came before, by fixtures.
"""

from __future__ import annotations

import base64
import json
import re
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pkernfs.fs.journal import Journal
from pkernfs.fs.mkfs import mkfs
from pkernfs.qemu.cmdline import find_qemu
from pkernfs.qemu.errors import QemuError
from pkernfs.region import MemoryRegion, RecordingRegion
from tests.core.images import cast
from tests.core.support import ROOT as ROOT_INO
from tests.core.support import MiB, mkdir, open_fs
from tests.guest.host import Host
from tests.mount.site import ROOT

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

SMALL = 16 * MiB  #: the region that is killed in the middle of a transaction
MNT = "/tmp/mnt"


class Device(NamedTuple):
    """What sysfs tells of a device, in decimal."""

    path: str
    size: int
    align: int
    resource: int
    target_node: int


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """The guest; at the end it tells what took how long."""
    try:
        find_qemu()
    except QemuError as error:
        pytest.skip(str(error))
    images = subprocess.run([ROOT / "mount_helpers/guest-host"], check=True, stdout=subprocess.PIPE, text=True).stdout
    with Host(Path(images.strip())) as host:
        host.run("mkdir", MNT)
        yield host
        for what, seconds in host.spent:
            print(f"{seconds:6.1f} s  {what}")


@pytest.fixture(scope="module")
def devices(host: Host) -> dict[str, Device]:
    """By kind: "pmem", that of memmap=SIZE!ADDRESS, and "soft", soft-reserved memory."""
    return find_devices(host)


def find_devices(host: Host) -> dict[str, Device]:
    """All that the guest has."""
    script = """
import json, os
top = "/sys/bus/dax/devices"
found = {}
for name in os.listdir(top):
    kind = "pmem" if "/ndbus" in os.path.realpath(f"{top}/{name}") else "soft"
    words = [int(open(f"{top}/{name}/{fact}").read(), 0) for fact in ("size", "align", "resource", "target_node")]
    found[kind] = (f"/dev/{name}", *words)
print(json.dumps(found))
"""
    return {kind: Device(*words) for kind, words in host.python(script).items()}


def info(host: Host, path: str) -> Any:
    """What `pkernfs info` tells of a region or a file."""
    return json.loads(host.run("pkernfs", "info", "--json", path))


def checksum(host: Host, device: Device) -> int:
    """Of every byte of a device."""
    script = "import mmap, os, sys, zlib; fd = os.open(sys.argv[1], os.O_RDONLY)\n"
    script += "print(zlib.crc32(mmap.mmap(fd, int(sys.argv[2]), prot=mmap.PROT_READ)))"
    found: int = host.python(script, device.path, str(device.size))
    return found


# -- before the kexec -------------------------------------------------------------------------------------------------


def test_both_kinds_of_memory_become_devices(devices: dict[str, Device]) -> None:
    assert {kind: device[1:] for kind, device in devices.items()} == {
        "pmem": (190 * MiB, 2 * MiB, 1026 * MiB, 1),  # the first 2 MiB hold its label
        "soft": (128 * MiB, 2 * MiB, 1344 * MiB, 1),
    }


@pytest.fixture(scope="module")
def made(host: Host, devices: dict[str, Device]) -> dict[str, Device]:
    """A region in each of them, made without --force."""
    for device in devices.values():
        assert f"{device.path}: {device.size // MiB} MiB" in host.run("mkfs.pkernfs", device.path)
    return devices


def test_a_region_is_not_overwritten(host: Host, made: dict[str, Device]) -> None:
    before = checksum(host, made["soft"])
    refused = host.try_run("mkfs.pkernfs", made["soft"].path)
    assert refused.returncode == 1
    assert f"{made['soft'].path}: holds a pkernfs region already" in refused.line
    assert checksum(host, made["soft"]) == before


def test_a_device_that_a_guest_maps(host: Host, made: dict[str, Device]) -> None:
    """By another node of it, as libvirt gives each QEMU a /dev of its own; refused though it is not mounted."""
    device = made["soft"]
    mapper = "import mmap, os, time; kept = mmap.mmap(os.open('/dev/dax9.0', os.O_RDWR), 4 << 20)\n"
    mapper += "os.rename('/tmp/mapper.py', '/tmp/mapped'); time.sleep(1000)"
    host.run("tee", "/tmp/mapper.py", stdin=mapper)
    pid = host.sh(f"""
        numbers=$(stat -c '0x%t 0x%T' {device.path})
        unshare -m --propagation private bash -euc "
            mount -t tmpfs none /dev
            mknod /dev/dax9.0 c $numbers
            exec /usr/bin/python3 -IS /tmp/mapper.py" &
        until [ -e /tmp/mapped ]; do kill -0 $!; sleep 0.1; done
        echo $!
    """).strip()
    refused = host.try_run("mkfs.pkernfs", "-f", device.path)
    host.sh(f"kill {pid}")
    assert (refused.returncode, f"is mapped by process {pid}, " in refused.line) == (1, True)


def test_a_device_without_sysfs(host: Host, made: dict[str, Device]) -> None:
    """Of which nothing is known, in a container for one."""
    host.run("mount", "-t", "tmpfs", "none", "/sys")
    try:
        refused = host.try_run("fsck.pkernfs", "-n", made["soft"].path)
    finally:
        host.run("umount", "/sys")
    assert refused.returncode == 8
    assert re.fullmatch(
        rf"fsck.pkernfs: {made['soft'].path}: expected a device-DAX device with a size in /sys/dev/char/[0-9:]+, "
        "found No such file or directory",
        refused.line,
    )


def test_a_device_whose_address_is_hidden(host: Host, made: dict[str, Device]) -> None:
    """As from who is not root: said, since page tables that are made with 0 are wrong."""
    path = made["soft"].path
    address = f"/sys/bus/dax/devices/{path.removeprefix('/dev/')}/resource"
    host.run("mount", "--bind", "/dev/null", address)
    try:
        result = host.try_run("mkfs.pkernfs", "--force", path)
    finally:
        host.run("umount", address)
    assert result.returncode == 0
    assert f"{path}: the kernel hides its physical address: 0 is taken" in result.line


@pytest.fixture(scope="module")
def mounted(host: Host, made: dict[str, Device]) -> Device:
    """The pmem device, mounted, with some files; its workers do what /tmp/strike says."""
    device = made["pmem"]
    result = host.try_run(
        *("mount.pkernfs", device.path, MNT, "-o", "log=/tmp/log"),
        env={"PKERNFS_WORKER": f"{sys.executable} {ROOT}/tests/mount/faulty_worker.py /tmp/strike"},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    host.sh(f"""
        cd {MNT}
        mkdir -p d/e
        echo content >d/e/file
        seq 10000 >numbers
        setfattr -n user.key -v value d
        truncate -s 16M ram
    """)
    return device


def test_a_mount_of_a_device(host: Host, mounted: Device) -> None:
    """Limits raised though this kernel may have fewer; nothing warned about; what is promised is what can be had."""
    limits = host.sh(f"cd /sys/class/bdi/$(mountpoint -d {MNT}); head -n 1 read_ahead_kb max_ratio")
    assert limits.split() == ["==>", "read_ahead_kb", "<==", "1024", "==>", "max_ratio", "<==", "100"]
    assert host.sh("grep -cE 'WARNING|ERROR|CRITICAL|Traceback' /tmp/log || true").strip() == "0"
    facts = info(host, MNT)
    assert (facts["kind"], facts["size"], facts["phys_base"]) == ("devdax", mounted.size, mounted.resource)
    left = int(host.run("stat", "-f", "-c", "%f", MNT)) * 4096
    full = host.try_run("truncate", "-s", str(left + 64 * MiB), f"{MNT}/too-large")
    assert "No space left on device" in full.stderr
    assert host.sh(f"stat -c %s {MNT}/too-large; rm {MNT}/too-large; stat -f -c %f {MNT}").split() == [
        "0",
        str(left // 4096),
    ]


def test_looking_at_a_device_in_use(host: Host, mounted: Device) -> None:
    refused = host.try_run("mkfs.pkernfs", "-f", mounted.path)
    assert refused.returncode == 1
    assert re.search(rf"{mounted.path}: the region is in use by process [0-9]+.*, mounted on {MNT}", refused.line)
    checked = host.try_run("fsck.pkernfs", "-n", mounted.path)
    assert checked.returncode == 0, checked
    assert host.run("pkernfs", "cat", f"{mounted.path}:/d/e/file") == "content\n"
    assert "0 damaged" in host.run("pkernfs", "scrub", mounted.path)
    assert "ram" in host.run(
        "pkernfs", "explain", mounted.path, hex(info(host, f"{MNT}/ram")["extents"][0]["physical"])
    )


def test_guest_memory_on_a_device(host: Host, mounted: Device) -> None:
    """QEMU takes what qemu-args prints; while it maps the file nobody cuts it, or gives it to another one."""
    host.run("pkernfs", "direct", f"{MNT}/ram", "on")
    words = host.run("pkernfs", "qemu-args", f"{MNT}/ram").split()
    assert words[0] == "-object"
    assert f"mem-path={mounted.path},offset=" in words[1]
    assert ",align=2097152," in words[1]
    pid = host.sh(f"""
        qemu-system-x86_64 -M q35,memory-backend=pc.ram -m 16M -object {words[1]} -nodefaults -display none -S \\
            -daemonize -pidfile /tmp/qemu.pid
        cat /tmp/qemu.pid
    """).strip()
    cut = host.try_run("truncate", "-s", "1M", f"{MNT}/ram")
    second = host.try_run("pkernfs", "qemu-args", f"{MNT}/ram")
    host.sh(f"kill {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")
    assert "Device or resource busy" in cut.stderr
    assert second.returncode == 1
    assert re.search(rf"/ram: mapped directly by process {pid}, qemu-system-x86", second.line)


@pytest.mark.usefixtures("mounted")
def test_a_killed_worker(host: Host) -> None:
    """Before Linux 6.9 what it had taken cannot be delivered again: EIO, soon, and for nothing else."""
    before = json.loads(host.run("pkernfs", "status", "--json", MNT))
    script = f"""
import json, os, signal, subprocess, time
open("/tmp/next", "w").write("statfs wait")
os.rename("/tmp/next", "/tmp/strike")
waiting = subprocess.Popen(["stat", "-f", "{MNT}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
while os.path.exists("/tmp/strike"):
    time.sleep(0.01)
os.kill({before["worker"]}, signal.SIGKILL)
content = open("{MNT}/d/e/file").read()
_, said = waiting.communicate(timeout=60)
print(json.dumps([content, waiting.returncode, said]))
"""
    content, code, said = host.python(script)
    after = json.loads(host.run("pkernfs", "status", "--json", MNT))
    assert (content, after["takeovers"] - before["takeovers"]) == ("content\n", 1)
    resent = tuple(map(int, host.release.split(".")[:2])) >= (6, 9)
    assert (code, "Input/output error" in said) == ((0, False) if resent else (1, True))
    assert host.run("stat", "-f", "-c", "%S", MNT) == "4096\n"


# -- killed in the middle of a transaction ----------------------------------------------------------------------------


class Killed(NamedTuple):
    """A region that was killed in the middle of a transaction, on the soft device."""

    device: Device
    before: int  #: checksum of the device
    files: dict[str, int | None]  #: what recovery makes of it: checksum of each file, None: a directory


def killed_image() -> bytes:
    """A rename that is committed, and applied in part."""
    recording = RecordingRegion(SMALL)
    mkfs(recording)
    fs = open_fs(recording)
    cast(fs)
    into = mkdir(fs, b"into")
    image = MemoryRegion(image=recording.view)
    recording.log.clear()
    fs.rename(ROOT_INO, b"d", into, b"renamed")
    journal = Journal(image, fs.volume.sb)
    applied = 0
    for store in recording.log:
        image.store(store.offset, store.data)
        applied = applied + 1 if image.word(journal.header_at) & 1 else 0
        if applied == 3:
            break
    assert journal.waiting()
    return bytes(image.view)


def files_of(image: bytes) -> dict[str, int | None]:
    """The files of a region, after recovery."""
    fs = open_fs(MemoryRegion(image=image))
    found: dict[str, int | None] = {}
    todo = [("", ROOT_INO)]
    while todo:
        folder, parent = todo.pop()
        for entry in fs.readdir(parent):
            path, ino = f"{folder}/{entry.name.decode()}", entry.ino
            mode = fs.getattr(ino).mode
            if stat.S_ISDIR(mode):
                found[path] = None
                todo.append((path, ino))
            elif stat.S_ISREG(mode):
                found[path] = zlib.crc32(fs.read(ino, 0, fs.getattr(ino).size))
    return found


def files_at(host: Host, path: str) -> dict[str, int | None]:
    """The files below a directory of the guest."""
    script = """
import json, os, sys, zlib
found = {}
for folder, folders, files in os.walk(sys.argv[1]):
    place = folder.removeprefix(sys.argv[1])
    found |= {f"{place}/{name}": None for name in folders}
    for name in files:
        if not os.path.islink(f"{folder}/{name}"):
            found[f"{place}/{name}"] = zlib.crc32(open(f"{folder}/{name}", "rb").read())
print(json.dumps(found))
"""
    found: dict[str, int | None] = host.python(script, path)
    return found


@pytest.fixture(scope="module")
def killed(host: Host, made: dict[str, Device]) -> Killed:
    """On the soft device."""
    device, image = made["soft"], killed_image()
    script = "import base64, mmap, os, sys, zlib; fd = os.open(sys.argv[1], os.O_RDWR)\n"
    script += "data = zlib.decompress(base64.b64decode(sys.stdin.read())); mmap.mmap(fd, len(data))[:] = data; print(0)"
    host.python(script, device.path, stdin=base64.b64encode(zlib.compress(image)).decode())
    return Killed(device, checksum(host, device), files_of(image))


def look_only(host: Host, killed: Killed) -> None:
    """Everything that reads only shows what recovery makes of it, and nothing is written."""
    path = killed.device.path
    checked = host.try_run("fsck.pkernfs", "-n", path)
    assert (checked.returncode, "journal" in checked.stdout) == (0, True), checked
    assert "renamed" in host.run("pkernfs", "ls", f"{path}:/into")
    host.run("mkdir", "-p", "/tmp/ro")
    host.run("mount.pkernfs", path, "/tmp/ro", "-o", "ro,log=/tmp/ro.log")
    assert files_at(host, "/tmp/ro") == killed.files
    assert "Read-only file system" in host.try_run("touch", "/tmp/ro/new").stderr
    umount(host, killed.device, "/tmp/ro")
    assert checksum(host, killed.device) == killed.before


def umount(host: Host, device: Device, mountpoint: str) -> None:
    """Unmount, and wait for the end of the server."""
    host.sh(f"umount {mountpoint}; until flock -n {device.path} true; do sleep 0.1; done")


def test_reading_only_after_a_kill(host: Host, killed: Killed) -> None:
    look_only(host, killed)


# -- the next kernel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_kernel(host: Host, mounted: Device, killed: Killed) -> dict[str, int | None]:
    """What was on the mount when the kernel went, in the middle of its life."""
    files = files_at(host, MNT)
    host.kexec()
    assert {mounted, killed.device} == set(find_devices(host).values())
    host.run("mkdir", MNT)
    return files


@pytest.mark.usefixtures("next_kernel")
def test_reading_only_after_a_kexec(host: Host, killed: Killed) -> None:
    look_only(host, killed)


def test_the_next_kernel_goes_on(
    host: Host, mounted: Device, killed: Killed, next_kernel: dict[str, int | None]
) -> None:
    """For good, by fsck and by a mount."""
    checked = host.try_run("fsck.pkernfs", "-y", killed.device.path)
    assert (checked.returncode, "journal" in checked.stdout) == (1, True), checked
    host.run("mount.pkernfs", mounted.path, MNT, "-o", "log=/tmp/log")
    assert files_at(host, MNT) == next_kernel
    host.sh(f"echo more >{MNT}/more; grep -q more {MNT}/more")
    umount(host, mounted, MNT)
    for device in (mounted, killed.device):
        checked = host.try_run("fsck.pkernfs", "-n", device.path)
        assert (checked.returncode, "journal" in checked.stdout) == (0, False), checked
