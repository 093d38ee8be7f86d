"""One guest through its life: start, save, quit, resume, and so on."""

import contextlib
import enum
import errno
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pkernfs.errors import quoted
from pkernfs.qemu import keep
from pkernfs.qemu.cmdline import Machine, Qemu, find_qemu, guest_command
from pkernfs.qemu.console import Beat, Console
from pkernfs.qemu.errors import QemuError
from pkernfs.qemu.monitor import Monitor

log = logging.getLogger(__name__)

#: Seconds that a QEMU which has closed its socket may take to be seen as ended.
LAST_WORDS = 0.5


class Phase(enum.Enum):
    """Where in its life a guest is; the value is the sentence for the reader of an error."""

    NEW = "has never been started"
    RUNNING = "runs in a QEMU of ours"
    SAVED = "is saved and stopped, its QEMU has not been quit"
    DOWN = "is saved, and no QEMU holds it"
    LOST = "has ended without having been saved"


class Guest:
    """A guest in a QEMU that this process starts, with its monitor, its console and QEMU's errors in `directory`.

    Without a `directory` it makes a temporary one, and removes it at the end.  The unix socket lies there, so its path
    must not be long (QEMU takes 107 bytes).

    Use as a context manager, or call `close`: neither leaves a QEMU behind, whatever happened.  The guest itself is in
    the files, so that a later Guest, in another process, can `resume` it.
    """

    def __init__(self, machine: Machine, directory: Path | None = None, qemu: Qemu | None = None) -> None:
        self.machine = machine
        self.qemu = qemu or find_qemu()
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="pkernfs-guest-"))
        self.console = Console(self.directory / "console")
        self.monitor = Monitor(self.directory / "qmp", check=self.check)
        self._errors = self.directory / "qemu-errors"
        self._process: subprocess.Popen[bytes] | None = None
        self._phase = Phase.NEW
        self._state: Path | None = None  #: of a guest that is saved
        self._stopped_at = 0.0
        self._resumed_at = 0.0

    @property
    def blackout(self) -> float:
        """Seconds that the guest stood still in the last save and resume: from the order to stop until it ran again."""
        return self._resumed_at - self._stopped_at

    @property
    def phase(self) -> Phase:
        """Where in its life the guest is, as far as we were told."""
        return self._phase

    @property
    def pid(self) -> int | None:
        """Process id of the QEMU, None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Boot the guest.  Returns when QEMU answers, long before the guest has booted."""
        self._need(Phase.NEW, "start")
        with self._spawned(incoming=False):
            self.monitor.status()
        self._enter(Phase.RUNNING)

    def save(self, state: Path) -> None:
        """Stop the guest and store all that a resume needs: its RAM where it is, the rest in the file `state`.

        Then the mount and its server may be killed, once `quit` has let go of the RAM.  If this fails the guest goes
        on.
        """
        self._need(Phase.RUNNING, "save")
        ram = self._ram()
        # RAM that is mapped through a mount is in the kernel's page cache.  Written back while the guest still runs,
        # only what it dirties from here on is left for the time that it stands still.
        sync(ram)
        self._stopped_at = time.monotonic()
        with self._explained():
            self.monitor.save(state)
        self._enter(Phase.SAVED)
        self._state = state
        sync(ram)
        sync(state)

    def quit(self, timeout: float = 30.0) -> None:
        """End the QEMU of a saved guest, and wait until it is gone.

        From then on nobody maps its RAM: it and the state file are held, where they are in a mount (pkernfs.qemu.keep).
        """
        self._need(Phase.SAVED, "quit")
        with self._explained():
            self.monitor.quit()
        self._reap(timeout)
        self._enter(Phase.DOWN)
        self._hold()

    def resume(self, state: Path) -> None:
        """Start a new QEMU on the same RAM, load `state`, and let the guest go on.

        Also the first call of a Guest whose guest was saved by somebody else.  The RAM is released before QEMU opens
        it, and the state when the guest runs; what a crash in between leaves held the next call releases.
        """
        if self._phase is not Phase.NEW:
            self._need(Phase.DOWN, "resume")
        self._state = state
        keep.release(self._ram_file())
        try:
            with self._spawned(incoming=True):
                self.monitor.resume(state)
        except BaseException:
            self._hold()
            raise
        self._resumed_at = time.monotonic()
        self._enter(Phase.RUNNING)
        keep.release(state)

    def wait(self, tick: int, timeout: float = 120.0) -> Beat:
        """Wait until the guest of mount_helpers/guest-kernel has counted to `tick`, and return its last one."""
        return self.console.wait(tick, timeout, self.check)

    def check(self) -> None:
        """Raise QemuError, with what QEMU had to say, if its process has ended."""
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        said = " | ".join(self._errors.read_text(errors="replace").strip().splitlines()[-3:])
        if status == 0:
            hint = "a guest that resets or powers off ends its QEMU: see its console, give it more memory"
        else:
            hint = "check the files it was given, and that it is started as it was when it saved"
        raise QemuError("QEMU to keep running", f"it ended with status {status} and said: {said or 'nothing'}", hint)

    def close(self) -> None:
        """Kill the QEMU if there is one, and remove the temporary directory."""
        self._kill()
        if self._phase in {Phase.RUNNING, Phase.SAVED}:
            saved = self._phase is Phase.SAVED
            self._enter(Phase.DOWN if saved else Phase.LOST)
            if saved:
                self._hold()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _enter(self, phase: Phase) -> None:
        log.info("guest in %s: %s -> %s", self.directory, self._phase.name, phase.name)
        self._phase = phase

    def _need(self, phase: Phase, verb: str) -> None:
        if self._phase is not phase:
            raise QemuError(
                f"a guest that {phase.value} ({phase.name}), to {verb} it",
                f"one that {self._phase.value} ({self._phase.name})",
                "call the verbs in the order start, save, quit, resume",
            )

    def _ram(self) -> Path:
        """The file that the RAM is in, out of the backend's options."""
        for option in self.machine.backend.replace(",,", "\0").split(","):
            if option.startswith("mem-path="):
                return Path(option.removeprefix("mem-path=").replace("\0", ","))
        raise QemuError("a backend with mem-path=", quoted(self.machine.backend), "make it with backend_option()")

    def _ram_file(self) -> Path:
        """The file that is the RAM, by its name in the mount."""
        return self.machine.ram or self._ram()

    def _hold(self) -> None:
        """Let nobody change or remove what the guest is now."""
        if self._state is not None:
            for path in (self._ram_file(), self._state):
                keep.hold(path, f"guest saved to {self._state.name}")

    @contextlib.contextmanager
    def _spawned(self, *, incoming: bool) -> Iterator[None]:
        """Start a QEMU for what is done with it first; if that fails there is none again."""
        self.monitor.path.unlink(missing_ok=True)  # a killed QEMU leaves its socket, and connecting to it fails
        command = guest_command(
            self.qemu, self.machine, monitor=self.monitor.path, console=self.console.path, incoming=incoming
        )
        log.debug("starting %s", command)
        try:
            with self._errors.open("ab") as errors:
                # In a session of its own: Ctrl-C is for us, who then end QEMU in good order.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
                )
            with self._explained():
                yield
        except BaseException:
            self._kill()
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """If QEMU has died, its last words are the error, rather than that its socket was closed."""
        try:
            yield
        except QemuError:
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LAST_WORDS)
            self.check()
            raise

    def _reap(self, timeout: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise QemuError(
                f"QEMU {self._process.pid} to end", f"it still runs after {timeout:g} s", "see its console"
            ) from None
        self._process = None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def sync(path: Path) -> None:
    """Have what the kernel holds of `path` written to where it belongs; for a mount, to its server."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a device DAX has no cache between, and no fsync
            raise
    finally:
        os.close(descriptor)
