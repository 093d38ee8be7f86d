"""A guest that stands for a host: a stock Debian kernel with device DAX, NUMA nodes and kexec, under emulation.

It has this machine's user space, this checkout and its commands, read-only but for a tmpfs that is laid over it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guest.agent import PORT
from tests.mount.site import ROOT, Result

BOOT = 240.0  #: seconds until a kernel has answered
COMMAND = 180.0  #: seconds for a command
#: Reserved memory of node 1, of two kinds: what a DIMM would be (the first 2 MiB hold its label), and soft-reserved.
PMEM, SOFT = "memmap=192M!1G", "memmap=128M%1344M+0xefffffff"


class Host:
    """Boots when it is entered."""

    def __init__(self, images: Path, append: str = f"{PMEM} {SOFT}") -> None:
        self.images = images
        self.append = append
        self.tmp = Path(tempfile.mkdtemp(prefix="pkernfs-host-", dir="/tmp"))
        self.console = self.tmp / "console"
        self.release = self.boot_id = ""
        self._received = b""
        self.spent: list[tuple[str, float]] = []  #: what took how many seconds

    def command(self) -> list[str]:
        """QEMU's command line.  -no-reboot: a reset ends it, so that a second boot is a kexec."""
        console, port = self.console, self.tmp / "port"
        agent = f"{sys.executable}:-P:{ROOT}/tests/guest/agent.py"
        append = f"console=ttyS0 panic=-1 {self.append} pkernfs_agent={agent}"
        return [
            *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-smp", "2", "-m", "2G"),
            *("-object", "memory-backend-ram,id=ram0,size=1G", "-object", "memory-backend-ram,id=ram1,size=1G"),
            *("-numa", "node,memdev=ram0,cpus=0", "-numa", "node,memdev=ram1,cpus=1"),
            *("-kernel", str(self.images / "vmlinuz"), "-initrd", str(self.images / "initramfs.gz"), "-append", append),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=port,path={port},server=on,wait=off"),
            *("-device", f"virtserialport,chardev=port,name={PORT}"),
            *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        ]

    def __enter__(self) -> Self:
        try:
            with (self.tmp / "qemu.log").open("wb") as log:
                self.qemu = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.port = socket.socket(socket.AF_UNIX)
            end = time.monotonic() + BOOT
            while True:
                try:
                    self.port.connect(str(self.tmp / "port"))
                    break
                except OSError:
                    if self.qemu.poll() is not None or time.monotonic() > end:
                        raise AssertionError(self.last_words("QEMU did not start")) from None
                    time.sleep(0.05)
            self._greet("boot")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, whatever it is doing."""
        if hasattr(self, "port"):
            self.port.close()
        if hasattr(self, "qemu"):
            self.qemu.kill()
            self.qemu.wait()
        shutil.rmtree(self.tmp)

    def last_words(self, what: str) -> str:
        """``what``, and what the guest and QEMU have said last."""
        files = (self.console, self.tmp / "qemu.log")
        said = "\n".join(file.read_text(errors="replace")[-3000:] for file in files if file.exists())
        return f"{what}; its console says:\n{said}"

    def _line(self, timeout: float, what: str) -> dict[str, Any]:
        """The next line from the agent."""
        end = time.monotonic() + timeout
        while b"\n" not in self._received:
            self.port.settimeout(max(end - time.monotonic(), 0.01))
            try:
                more = self.port.recv(1 << 16)
            except TimeoutError:
                raise AssertionError(self.last_words(f"{what}: no answer within {timeout} s")) from None
            assert more, self.last_words(f"{what}: QEMU has ended")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _greet(self, what: str) -> None:
        start = time.monotonic()
        hello = self._line(BOOT, what)
        self.release, self.boot_id = hello["release"], hello["boot"]
        self.spent.append((what, time.monotonic() - start))

    def try_run(self, *words: str | os.PathLike[str], stdin: str = "", env: dict[str, str] | None = None) -> Result:
        """Run a command, one of ours by its name; its result, whatever it is."""
        command = list(map(str, words))
        start = time.monotonic()
        request = {"run": command, "stdin": stdin, "env": env or {}, "timeout": COMMAND}
        self.port.sendall(json.dumps(request).encode() + b"\n")
        answer = self._line(COMMAND + 30, " ".join(command))
        self.spent.append((" ".join(map(str, words))[:100], time.monotonic() - start))
        assert answer["code"] != -1, self.last_words(f"{command}: not within {COMMAND} s, {answer}")
        return Result(command, answer["code"], answer["out"], answer["err"])

    def run(self, *words: str | os.PathLike[str], stdin: str = "") -> str:
        """Run a command that must succeed; what it prints."""
        result = self.try_run(*words, stdin=stdin)
        assert result.returncode == 0, result
        return result.stdout

    def sh(self, script: str) -> str:
        """Run a script of the shell that must succeed; what it prints."""
        return self.run("bash", "-euc", script)

    def python(self, script: str, *arguments: str, stdin: str = "") -> Any:
        """Run a script of Python's standard library that prints JSON; that."""
        return json.loads(self.run("/usr/bin/python3", "-ISc", script, *arguments, stdin=stdin))

    def kexec(self) -> None:
        """Start the same kernel anew, at once: nothing is unmounted, nothing is asked."""
        before = self.boot_id
        request = {"kexec": [str(self.images / "vmlinuz"), str(self.images / "initramfs.gz")]}
        self.port.sendall(json.dumps(request).encode() + b"\n")
        self._greet("kexec")
        assert self.boot_id != before
