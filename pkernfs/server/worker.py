"""A worker: pyfuse3 over one region, on a session that its keeper hands over.

python -m pkernfs.server.worker FD: FD is the socket to the keeper, see messages.py for what goes through it.  A worker
ends with status 0 when the mount has ended and the region is closed, or when it was drained.
"""

from __future__ import annotations

import pkernfs.server.packages  # before anything else imports trio

# isort: split
import faulthandler
import importlib
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3
import trio

import pkernfs
from pkernfs.errors import PkernfsError, RegionError
from pkernfs.format import ROOT_INO, SUPERBLOCK_CHECKED
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.lookups import Lookups
from pkernfs.iommu.guard import open_filesystem
from pkernfs.iommu.restore import restore
from pkernfs.mountinfo import reached
from pkernfs.options import MountOptions
from pkernfs.processes import NoProcError
from pkernfs.region import Region, copies_of, open_region, read_superblock
from pkernfs.server import loop
from pkernfs.server.bdi import tune
from pkernfs.server.buffers import keep_resident
from pkernfs.server.child import PROTOCOL, python_command, receive, send
from pkernfs.server.daemon import let_go_of_terminal
from pkernfs.server.logs import start_logging
from pkernfs.server.messages import Checked, Failure, Forked, Instruction, Opened, Pulse, Ready, Up
from pkernfs.server.operations import Operations
from pkernfs.server.requests import Requests
from pkernfs.server.resources import GONE, Attempt, ResourceError, asking, backoff, readable, refusal, reserve
from pkernfs.server.sibling import fork_sibling
from pkernfs.server.state import State
from pkernfs.server.stats import AWAITING, map_stats
from pkernfs.server.threads import enduring, in_thread
from pkernfs.surroundings import open_standard_descriptors, raise_limits

if TYPE_CHECKING:
    from pkernfs.server.control import ControlSocket

log = logging.getLogger("pkernfs")

#: Seconds from the end of the keeper to the start of another one.  Whoever kills everything kills the keeper first, and
#: is not to meet a new one.
GRACE = 1.0
REFUSED = 0.1  #: seconds before the next try where the host refuses to send or receive a message
STARTED = 0.01  #: seconds between two looks whether the next keeper is on its own
BUSY = 1.0  #: seconds after a takeover for requests that have waited, before what nobody has asked for is loaded
IDLE = 0.2  #: seconds without a message after which a worker is a standby


def load() -> None:
    """Import what this process may need later: the installation may be gone by then.  Raises ResourceError: it is."""
    try:
        importlib.import_module("pkernfs.server.verbs")
    except Exception as error:  # of a package that is half replaced it may be any
        raise ResourceError(
            f"{type(error).__name__}: {error}", hint="install this version again, or pkernfs upgrade MOUNT"
        ) from None


def _invalidate_name(directory: int, name: bytes) -> None:
    """Make the kernel drop what it has cached of a name, and of its directory; from a thread that may wait."""
    with suppress(FileNotFoundError):  # the kernel does not know it: nothing is cached
        pyfuse3.invalidate_entry(pyfuse3.InodeT(directory), pyfuse3.FileNameT(name))
    with suppress(FileNotFoundError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(directory))


def control_socket(operations: Operations, device: str, listener: int) -> ControlSocket:
    """What answers the verbs of the mount ``device``, MAJOR:MINOR."""
    from pkernfs.server.control import ControlSocket
    from pkernfs.server.verbs import verbs

    known = verbs(operations, device, pyfuse3.invalidate_inode, _invalidate_name)
    return ControlSocket(socket.socket(fileno=os.dup(listener)), known)


def warn_of_copies(fs: Filesystem) -> None:
    """Say in the log when a copy of the superblock is damaged: the end of a region that was cut is zeros."""
    sb = fs.volume.sb
    for at in copies_of(sb):
        if fs.region.read(at, SUPERBLOCK_CHECKED) != fs.region.read(0, SUPERBLOCK_CHECKED):
            log.error(
                "%s: the copy of the superblock at %#x is damaged, and so may be what is around it: run pkernfs scrub",
                *(fs.region.path, at),
            )


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
        self.stacks = -1  #: a file for where it stands; -1: the host had none
        self.loaded = False  #: what it may need later
        self.resident = False  #: memory for requests

    def run(self) -> None:
        """All messages, to the end of the mount."""
        self.introduce()
        while True:
            if not self.loaded and not readable(self.keeper.fileno(), IDLE):
                self.load()  # a standby: a takeover is to find everything there
            if self.resident and not readable(self.keeper.fileno(), IDLE):
                # What a takeover writes to of what it shares with its template is copied, page by page, while others
                # wait: half of those 950 pages now, for 2 MB.
                with suppress(Exception):
                    trio.run(trio.lowlevel.checkpoint)
            try:
                message, fds = receive(self.keeper)
                if message is None:
                    return None
                if message["verb"] == "fork":
                    if not message["prints"]:
                        let_go_of_terminal()
                    self.fork(*fds)
                    continue
                self.state = State.from_json(message["state"])
                if message["verb"] == "serve":
                    return self.serve(message, *fds)
                reply: Mapping[str, object] = (
                    self.check(*fds) if message["verb"] == "check" else self.open(message, *fds)
                )
            except PkernfsError as error:
                reply = Failure(error=str(error), exit_code=error.exit_code, errno=error.errno)
            except (OSError, MemoryError) as error:
                refused = refusal(f"worker {os.getpid()}", error)
                reply = Failure(error=str(refused), exit_code=refused.exit_code, errno=refused.errno)
            send(self.keeper, reply)

    def introduce(self) -> None:
        """Say that this process is up."""
        with suppress(OSError):
            if self.stacks >= 0:  # of the process that it was forked from
                os.close(self.stacks)
                self.stacks = -1
            self.stacks = os.memfd_create("pkernfs-stacks", os.MFD_CLOEXEC)
            faulthandler.register(signal.SIGUSR1, self.stacks, all_threads=True)
        up: Up = {
            "pid": os.getpid(),
            "version": pkernfs.__version__,
            "protocol": PROTOCOL,
            "stacks": self.stacks,
            "forks": True,
        }
        send(self.keeper, up)

    def load(self) -> None:
        """Import what this process, and those that are forked from it, may need when the installation is gone."""
        if not self.loaded:
            self.loaded = True
            with suppress(ResourceError):  # said where the verbs are to be answered: it can do all else
                load()

    def keep_resident(self) -> None:
        """Have memory for requests; not in a process that only others are made of."""
        if not self.resident:
            keep_resident()
            self.resident = True

    def fork(self, socket_fd: int) -> None:
        """Become two: the other one is up, and waits, at another socket.  Raises OSError."""
        self.load()
        try:
            pid = fork_sibling()
        except OSError:
            os.close(socket_fd)
            raise
        if pid:
            os.close(socket_fd)
            send(self.keeper, Forked(forked=pid))
        else:
            self.keeper.close()
            self.keeper = socket.socket(fileno=socket_fd)
            self.introduce()
            self.keep_resident()

    def check(self, region_fd: int) -> Checked:
        """Whether this version can read the region.  Raises FormatError."""
        with open_region(self.state.region, readonly=True, fd=region_fd) as region:
            read_superblock(region, readonly=self.state.options.readonly)
        return Checked(checked=True)

    def open(self, message: Instruction, region_fd: int, references_fd: int, stats_fd: int) -> Opened:
        """Open and recover the region, and apply the options that change its root.  Raises PkernfsError."""
        self.keep_resident()
        options = self.state.options
        self.first = message["first"]
        self.fds = [region_fd, references_fd, stats_fd]
        start_logging(options, strict=False)
        region = open_region(self.state.region, readonly=options.readonly, fd=region_fd)
        set_barriers(region, options)
        # The worker before has touched memory that is not there (any more), or is bad: so each page is asked for first.
        region.careful = "SIGBUS" in self.state.last_reason
        self.fs = fs = open_filesystem(region, Lookups(region.size, mmap.mmap(references_fd, 0)))
        fs.times.policy = options.atime
        warn_of_copies(fs)
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
                nursery.start_soon(enduring, "control socket", partial(self.answer_verbs, operations, control))
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
            self.first = False
        else:
            with trio.move_on_after(BUSY):
                await trio.lowlevel.wait_readable(listener)
        await in_thread(load)
        await control_socket(operations, self.state.device, listener).serve()

    async def report_ready(self) -> None:
        """Tell that the mount is usable, once it is."""
        state = self.state

        def wait_and_tune() -> str:
            os.stat(state.mountpoint)  # waits for the kernel's INIT, which sets the limits that are tuned next
            return tune(state.device) if state.options.tune else ""

        await self.tell(Ready(ready=os.getpid(), warning=await in_thread(wait_and_tune)))

    async def tell(self, message: Mapping[str, object]) -> None:
        """Send the keeper a message, which waits for it.  Raises OSError: it has ended."""
        while True:
            try:
                return send(self.keeper, message)
            except OSError as error:
                if error.errno in GONE:
                    raise
            await trio.sleep(REFUSED)

    async def handle_messages(self, requests: Requests, scope: trio.CancelScope) -> None:
        """Handle the keeper's messages; start another keeper when it has ended."""
        attempt = Attempt("keeper")
        while True:
            await trio.lowlevel.wait_readable(self.keeper)
            try:
                message, _ = receive(self.keeper, wait=False)
                if message is not None:
                    await self.handle(message, requests, scope)
                    attempt.succeeded()
                    continue
            except BlockingIOError:
                continue
            except (OSError, MemoryError) as error:
                # Of a keeper that has ended: the socket says so again at once.  Of any other reason nothing ends.
                if not isinstance(error, OSError) or error.errno not in GONE:
                    log.error("a message of the keeper: %s", refusal("it cannot be handled", error))
                    await trio.sleep(REFUSED)
                    continue
            await trio.sleep(GRACE)
            if not self.replaces_keeper:
                log.warning("the keeper has ended")
                return
            try:
                with asking("its process"):
                    await self.start_keeper()
            except ResourceError as error:
                attempt.refused(error)
                await trio.sleep(backoff(attempt.failures))

    async def handle(self, message: Instruction, requests: Requests, scope: trio.CancelScope) -> None:
        """Handle one message.  Raises OSError."""
        match message["verb"]:
            case "beat":
                await self.tell(Pulse(oldest=requests.oldest(), begun=requests.begun))
                self.count_awaiting(requests.counters)  # after what the keeper waits for: it may be refused memory
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
                with suppress(OSError):  # what cannot be written back now will not be
                    await in_thread(self.write_back)
                pyfuse3.terminate()

    def count_awaiting(self, counters: memoryview) -> None:
        """Count what awaits an invalidation, if something may have changed since it was counted."""
        sequence = self.fs.volume.journal.sequence
        if sequence != self.counted:
            self.counted = sequence
            with suppress(PkernfsError):
                counters[AWAITING] = self.fs.guard.kept_bytes()

    def write_back(self) -> None:
        """Let the kernel hand over what is dirty in its page cache; in a thread, as this process must take it."""
        with suppress(OSError, NoProcError):
            with reached(self.state.device) as path:
                pyfuse3.syncfs(path)
            return
        # Other mounts hide all of it: inode by inode.  A page that is invalidated is written first.
        for ino in self.fs.lookups.referenced(self.fds[1]):
            with suppress(OSError):
                pyfuse3.invalidate_inode(pyfuse3.InodeT(ino))

    async def start_keeper(self) -> None:
        """Start another keeper, and give it the state of the mount and its descriptors.

        Raises what resources.REFUSALS has; the socket of the one before says then again that it has ended.
        """
        ours, theirs = reserve().ask(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        with theirs:
            try:
                process = reserve().ask(lambda: self._start_keeper(theirs))
            except BaseException:
                ours.close()
                raise
        self.keeper.close()
        self.keeper = ours
        with suppress(OSError):
            send(self.keeper, {"state": self.state.to_json()}, self.fds)
        # It ends when it has made the keeper its child.
        while process.poll() is None:  # noqa: ASYNC110  # a process has no event, and a thread may be refused
            await trio.sleep(STARTED)

    @staticmethod
    def _start_keeper(theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*python_command("pkernfs.server.succession"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd="/",
        )


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the keeper
    open_standard_descriptors()
    raise_limits(ours=False)  # as they are now, and not as they were when the keeper was started
    reserve()
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
