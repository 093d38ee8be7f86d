"""What runs in a guest that stands for a host: executes commands that come over a virtio port, one JSON a line.

From the host: {"run": [words], "stdin": text, "env": {}, "timeout": seconds} or {"kexec": [kernel, initrd]}.  The
answer: {"code", "out", "err"}; code -1 when it took too long.  The first line of each kernel says who it is.

Our own commands run in a fork of this process, which has imported them once: that takes 5 to 10 s under emulation.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, BinaryIO

PORT = "pkernfs-agent"
#: The scripts of pyproject.toml, and what they call in pkernfs.cli.
COMMANDS = {
    "pkernfs": "main",
    "mkfs.pkernfs": "main_mkfs",
    "fsck.pkernfs": "main_fsck",
    "mount.pkernfs": "main_mount",
}
#: What they import when they run.
WARM = ["cli.mkfs", "cli.mount", "cli.fsck", "cli.info", "cli.ls", "cli.cat", "cli.scrub", "cli.explain", "fsck.run"]
SYS_REBOOT, SYS_KEXEC_FILE_LOAD = 169, 320  # x86-64
REBOOT_MAGIC = (0xFEE1DEAD, 672274793, 0x45584543)  #: reboot(2): ..., LINUX_REBOOT_CMD_KEXEC


def open_port() -> BinaryIO:
    """The virtio port that is ours."""
    for folder in Path("/sys/class/virtio-ports").iterdir():
        if (folder / "name").read_text().strip() == PORT:
            return open(f"/dev/{folder.name}", "r+b", buffering=0)
    raise FileNotFoundError(f"no virtio port {PORT}")


class Forked:
    """One of our commands, as a subprocess.Popen: the function that its script calls, in a fork."""

    def __init__(self, words: list[str], env: dict[str, str], files: list[int], port: int) -> None:
        call = getattr(importlib.import_module("pkernfs.cli"), COMMANDS[words[0]])
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(port)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                os.environ.update(env)
                sys.argv = words
                code = call() or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def execute(request: dict[str, Any], port: int) -> dict[str, Any]:
    """Run a command.  Its output goes to files: a server that it leaves behind would keep a pipe open."""
    words, env = request["run"], request["env"]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(request["stdin"].encode())
        stdin.seek(0)
        try:
            if words[0] in COMMANDS:
                process: Any = Forked(words, env, [stdin.fileno(), out.fileno(), err.fileno()], port)
            else:
                process = subprocess.Popen(words, env=os.environ | env, stdin=stdin, stdout=out, stderr=err)
        except OSError as error:
            return {"code": 127, "out": "", "err": str(error)}
        pidfd = os.pidfd_open(process.pid)
        code = -1
        if not select.select([pidfd], [], [], request["timeout"])[0]:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        else:
            code = process.wait()
        os.close(pidfd)
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read().decode(errors="replace"), "err": err.read().decode(errors="replace")}


def kexec(kernel: str, initrd: str) -> dict[str, Any]:
    """Another kernel, with this one's command line.  Only comes back when it fails: as kexec -e, it syncs nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    line = Path("/proc/cmdline").read_bytes().rstrip() + b"\0"
    with open(kernel, "rb") as one, open(initrd, "rb") as two:
        # In the kernel, not as kexec(8) does it: one package less.
        if not libc.syscall(SYS_KEXEC_FILE_LOAD, one.fileno(), two.fileno(), ctypes.c_ulong(len(line)), line, 0):
            libc.syscall(SYS_REBOOT, *map(ctypes.c_ulong, REBOOT_MAGIC), None)
    return {"code": 1, "out": "", "err": os.strerror(ctypes.get_errno())}


def main() -> None:
    """Answer until the host closes the port."""
    with open_port() as port:

        def send(answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode() + b"\n"
            while data:
                data = data[port.write(data) or 0 :]

        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        for name in WARM:
            importlib.import_module(f"pkernfs.{name}")
        send({"boot": boot, "release": os.uname().release})
        for line in iter(port.readline, b""):
            request = json.loads(line)
            if "kexec" in request:
                send(kexec(*request["kexec"]))
            else:
                send(execute(request, port.fileno()))


if __name__ == "__main__":
    main()
