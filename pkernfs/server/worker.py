"""A worker: pyfuse3 over one region, on a session that its keeper hands over.

python -m pkernfs.server.worker FD: FD is the socket to the keeper, see messages.py for what goes through it.  A worker
ends with status 0 when the mount has ended and the region is closed, or when it was drained.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import pyfuse3
import trio

import pkernfs
from pkernfs.errors import PkernfsError, RegionError
from pkernfs.format import ROOT_INO
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.lookups import Lookups
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.restore import restore
from pkernfs.options import MountOptions
from pkernfs.region import Region, open_region, read_superblock
from pkernfs.server import loop
from pkernfs.server.bdi import tune
from pkernfs.server.buffers import keep_resident
from pkernfs.server.child import PROTOCOL, receive, send
from pkernfs.server.daemon import let_go_of_terminal
from pkernfs.server.logs import start_logging
from pkernfs.server.messages import Checked, Failure, Instruction, Opened, Pulse, Ready, Up
from pkernfs.server.operations import Operations
from pkernfs.server.requests import Requests
from pkernfs.server.state import State
from pkernfs.server.stats import AWAITING, map_stats

if TYPE_CHECKING:
    from pkernfs.server.control import ControlSocket

log = logging.getLogger("pkernfs")

#: Seconds from the end of the keeper to the start of another one.  Whoever kills everything kills the keeper first, and
#: is not to meet a new one.
GRACE = 1.0
BUSY = 1.0  #: seconds after a takeover for requests that have waited, before what nobody has asked for is loaded
IDLE = 0.2  #: seconds without a message after which a worker is a standby


def _invalidate_name(directory: int, name: bytes) -> None:
    """Make the kernel drop what it has cached of a name, and of its directory; from a thread that may wait."""
    with suppress(FileNotFoundError):  # the kernel does not know it: nothing is cached
        pyfuse3.invalidate_entry(pyfuse3.InodeT(directory), pyfuse3.FileNameT(name))
    with suppress(FileNotFoundError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(directory))


def control_socket(operations: Operations, listener: int) -> ControlSocket:
    """What answers the verbs of a mount."""
    from pkernfs.server.control import ControlSocket
    from pkernfs.server.verbs import verbs

    known = verbs(operations, pyfuse3.invalidate_inode, _invalidate_name)
    return ControlSocket(socket.socket(fileno=os.dup(listener)), known)


def set_barriers(region: Region, options: MountOptions) -> None:
    """Flush as the medium needs it, or as the options say.  Raises RegionError."""
    if options.barriers is None or options.readonly:
        return
    if options.barriers and not region.volatile:
        raise RegionError(
            f"{region.path}: -o barrier: expected a region on a disk, found {region.kind}, which has nothing to flush",
            hint="leave the option out",
        )
    region.barriers = options.barriers


class Worker:
    """What one worker holds.  ``keeper``: the socket to its keeper."""

    def __init__(self, keeper: socket.socket) -> None:
        self.keeper = keeper
        self.first = False
        self.replaces_keeper = False  #: starts another keeper when this one ends: no service manager does
        self.drained = False
        self.counted = -1  #: transactions, when it was counted what awaits an invalidation
        self.fds: list[int] = []  #: what another keeper needs
        stacks = os.memfd_create("pkernfs-stacks", os.MFD_CLOEXEC)
        self.stacks = open(stacks, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives

    def run(self) -> None:
        """All messages, to the end of the mount."""
        faulthandler.register(signal.SIGUSR1, self.stacks, all_threads=True)
        keep_resident()
        up: Up = {
            "pid": os.getpid(),
            "version": pkernfs.__version__,
            "protocol": PROTOCOL,
            "stacks": self.stacks.fileno(),
        }
        send(self.keeper, up)
        if not select.select([self.keeper], [], [], IDLE)[0]:
            importlib.import_module("pkernfs.server.verbs")  # a standby: a takeover is to find everything loaded
        while True:
            message, fds = receive(self.keeper)
            if message is None:
                return None
            self.state = State.from_json(message["state"])
            try:
                if message["verb"] == "serve":
                    return self.serve(message, *fds)
                reply: Mapping[str, object] = (
                    self.check(*fds) if message["verb"] == "check" else self.open(message, *fds)
                )
            except PkernfsError as error:
                reply = Failure(error=str(error), exit_code=error.exit_code, errno=error.errno)
            send(self.keeper, reply)

    def check(self, region_fd: int) -> Checked:
        """Whether this version can read the region.  Raises FormatError."""
        with open_region(self.state.region, readonly=True, fd=region_fd) as region:
            read_superblock(region, readonly=self.state.options.readonly)
        return Checked(checked=True)

    def open(self, message: Instruction, region_fd: int, references_fd: int, stats_fd: int) -> Opened:
        """Open and recover the region, and apply the options that change its root.  Raises PkernfsError."""
        options = self.state.options
        self.first = message["first"]
        self.fds = [region_fd, references_fd, stats_fd]
        start_logging(options)
        region = open_region(self.state.region, readonly=options.readonly, fd=region_fd)
        set_barriers(region, options)
        self.fs = fs = open_filesystem(region, Lookups(region.size, mmap.mmap(references_fd, 0)))
        fs.times.policy = options.atime
        if self.first and not options.readonly:
            fs.volume.mark_mounted()
            restore(fs, cold=options.cold)
            if (options.uid, options.gid, options.mode) != (None, None, None):
                fs.setattr(ROOT_INO, SetAttr(uid=options.uid, gid=options.gid, mode=options.mode))
        return {"opened": fs.volume.recovered}

    def serve(self, message: Instruction, device: int, session: int, control: int, commands: int) -> None:
        """Serve until the mount ends, and close the filesystem."""
        fs, state = self.fs, self.state
        self.fds += [control, commands, device]
        self.replaces_keeper = message["revive"]
        facts = {"control": state.control_path, "region": fs.region.path, "pid": os.getpid()}
        operations = Operations(fs, facts.copy, map_stats(self.fds[2]), writeback=state.options.writeback)
        loop.install(loop.PollingLowlevel(session, device, operations.replay))
        # The mount is the keeper's: libfuse gets a descriptor, and options that say nothing about mounting.
        pyfuse3.init(operations, f"/dev/fd/{session}", {"default_permissions"})

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.handle_messages, operations.requests, nursery.cancel_scope)
                nursery.start_soon(self.answer_verbs, operations, control)
                nursery.start_soon(operations.housekeeping.run)
                try:
                    await pyfuse3.main()
                finally:
                    pyfuse3.close(unmount=False)
                nursery.cancel_scope.cancel()

        trio.run(run)
        if self.drained:
            fs.region.close()
        else:
            fs.close()
        logging.shutdown()
        # Threads may still wait for answers that the next worker gives.
        os._exit(0)

    async def answer_verbs(self, operations: Operations, listener: int) -> None:
        """Serve the control socket; in the first worker only when the mount is usable.

        Its module is loaded in a thread, as that takes as long as a twentieth of mounting; and when somebody asks, or
        after a while: a worker that takes over without having been a standby has requests to answer first.
        """
        if self.first:
            await self.report_ready()
        else:
            with trio.move_on_after(BUSY):
                await trio.lowlevel.wait_readable(listener)
        socket_ = await trio.to_thread.run_sync(control_socket, operations, listener, abandon_on_cancel=True)
        await socket_.serve()

    async def report_ready(self) -> None:
        """Tell that the mount is usable, once it is."""
        state = self.state

        def wait_and_tune() -> str:
            os.stat(state.mountpoint)  # waits for the kernel's INIT, which sets the limits that are tuned next
            return tune(state.mountpoint) if state.options.tune else ""

        warning = await trio.to_thread.run_sync(wait_and_tune, abandon_on_cancel=True)
        send(self.keeper, Ready(ready=os.getpid(), warning=warning))

    async def handle_messages(self, requests: Requests, scope: trio.CancelScope) -> None:
        """Handle the keeper's messages; start another keeper when it has ended."""
        while True:
            await trio.lowlevel.wait_readable(self.keeper)
            with suppress(OSError):
                message, _ = receive(self.keeper)
                if message is not None:
                    await self.handle(message, requests, scope)
                    continue
            await trio.sleep(GRACE)
            if not self.replaces_keeper:
                log.warning("the keeper has ended")
                return
            await self.start_keeper()

    async def handle(self, message: Instruction, requests: Requests, scope: trio.CancelScope) -> None:
        """Handle one message."""
        match message["verb"]:
            case "beat":
                self.count_awaiting(requests.counters)
                send(self.keeper, Pulse(oldest=requests.oldest(), begun=requests.begun))
            case "know":
                self.state = State.from_json(message["state"])
                if not self.state.options.foreground:
                    let_go_of_terminal()
            case "drain":
                # No request is lost: handlers do not await, so none is between its reading and its reply here, but for
                # those that wait for space, which the kernel delivers to the next worker again.
                self.drained = True
                scope.cancel()
            case "end":
                await trio.to_thread.run_sync(pyfuse3.syncfs, self.state.mountpoint, abandon_on_cancel=True)
                pyfuse3.terminate()

    def count_awaiting(self, counters: memoryview) -> None:
        """Count what awaits an invalidation, if something may have changed since it was counted."""
        sequence = self.fs.volume.journal.sequence
        if sequence != self.counted:
            self.counted = sequence
            with suppress(PkernfsError):
                counters[AWAITING] = self.fs.guard.kept_bytes()

    async def start_keeper(self) -> None:
        """Start another keeper, and give it the state of the mount and its descriptors."""
        self.keeper.close()
        self.keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(  # noqa: ASYNC220  # some ms, while the mount has no keeper
                [sys.executable, "-P", "-m", "pkernfs.server.succession", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
            )
        with suppress(OSError):
            send(self.keeper, {"state": self.state.to_json()}, self.fds)
        await trio.to_thread.run_sync(process.wait)


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the keeper
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
