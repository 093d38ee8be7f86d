"""A live update, shown: a Linux guest outlives QEMU and every pkernfs process.

Boots a guest in QEMU whose RAM is a file on a pkernfs mount, lets it count on its serial port, saves it, ends QEMU,
kills all processes of the mount with SIGKILL, as kexec would, mounts the region again, and resumes the guest.  It is
proven to have gone on when it has the boot_id it had, when no tick of its counting is missing or there twice, and when
it has verified all the memory that it keeps checksums of.  Exit code 0 means just that.

Run as root, by examples/live-update, which first installs what it takes.
"""

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mounted import Mounted
from rich import box
from rich.console import Console
from rich.table import Table

from pkernfs.errors import PkernfsError
from pkernfs.qemu.cmdline import Machine, backend_option
from pkernfs.qemu.console import CHUNKS
from pkernfs.qemu.guest import Guest

MIB = 1 << 20
MODES = ("path", "direct")

#: The guest's first ticks: all its memory has been written and verified once.
WARM = CHUNKS + 1


class Times(NamedTuple):
    """What one restart took, in seconds."""

    mode: str
    save: float  #: state of the devices written, what the guest had dirtied synced, QEMU gone
    remount: float  #: processes killed, dead mount detached, region mounted again
    resume: float  #: new QEMU started, state loaded
    blackout: float  #: from the order to stop until the guest ran again; all of the above but the first sync


class Report:
    """Progress on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Something that takes a while; told with its time once it is done."""
        begin = time.monotonic()
        with self.console.status(text):
            yield
        self.console.print(f"{time.monotonic() - begin:8.3f} s  {text}", markup=False)

    def say(self, text: str) -> None:
        """A line that is true at this moment."""
        self.console.print(f"{'':10}  {text}", markup=False)

    def table(self, boots: dict[str, float], rows: Sequence[Times]) -> None:
        """All times, at the end."""
        table = Table(box=box.SIMPLE if self.console.is_terminal else None, title_justify="left", pad_edge=False)
        for name in ("RAM", "boot s", "save s", "kill + mount s", "resume s", "blackout s"):
            table.add_column(name, justify="left" if name == "RAM" else "right")
        for row in rows:
            boot = f"{boots[row.mode]:.1f}"
            table.add_row(row.mode, boot, *(f"{seconds:.3f}" for seconds in row[1:]))
        self.console.print()
        self.console.print(table)


class LiveUpdate:
    """One guest on one mount, to be put through restarts: `boot` it, `restart` any number of times, `close`.

    `mode` is how QEMU maps the guest's RAM: `path`, through the mount, or `direct`, the region itself.  `memory` is in
    bytes.  `images` is a directory that mount_helpers/guest-kernel made.
    """

    def __init__(self, mounted: Mounted, mode: str, memory: int, images: Path, report: Report) -> None:
        self.mounted = mounted
        self.mode = mode
        self.report = report
        self.ram = mounted.mountpoint / "guest-ram"
        self.state = mounted.mountpoint / "guest-state"
        self.mounted.create_ram(self.ram, memory)
        machine = Machine(self._backend(memory), memory, images / "vmlinuz", images / "initramfs.gz", ram=self.ram)
        self.guest = Guest(machine)

    def _backend(self, memory: int) -> str:
        return backend_option(self.ram, memory) if self.mode == "path" else self.mounted.direct_backend(self.ram)

    def boot(self) -> float:
        """Boot the guest, wait until it counts, and return the seconds that took."""
        begin = time.monotonic()
        with self.report.step(f"booted Linux, its RAM {self.guest.machine.backend}"):
            self.guest.start()
            beat = self.guest.wait(1)
        took = time.monotonic() - begin
        self.guest.wait(WARM)
        self.report.say(f"it counts; boot_id {beat.boot_id}")
        return took

    def restart(self) -> Times:
        """Save, kill everything, mount again, resume.

        Raises PkernfsError unless the guest is proven to have gone on.
        """
        servers = self.mounted.servers()
        if not servers:
            raise PkernfsError(
                f"expected processes that serve {self.mounted.region}, found none: nothing could be shown"
            )
        marks = [time.monotonic()]
        with self.report.step(f"saved it to {self.state}, ended QEMU"):
            self.guest.save(self.state)
            self.guest.quit()
        before = self.guest.console.last()
        assert before is not None
        marks.append(time.monotonic())
        with self.report.step(f"killed all pkernfs processes ({' '.join(map(str, servers))}), mounted again"):
            self.mounted.kill(servers)
            self.mounted.detach()
            self.mounted.mount()
        marks.append(time.monotonic())
        with self.report.step("resumed it"):
            self.guest.machine = self.guest.machine._replace(backend=self._backend(self.guest.machine.memory))
            self.guest.resume(self.state)
        marks.append(time.monotonic())
        after = self.guest.wait(before.tick + CHUNKS)
        # The console has checked more on its way: each tick is the one after the last, all of the same boot.
        if after.boot_id != before.boot_id or after.tick <= before.tick:
            raise PkernfsError(f"expected the guest to go on from {before}, found {after}")
        self.report.say(f"it went on: same boot_id, counter {before.tick} -> {after.tick}, its memory verified")
        save, remount, resume = (late - early for early, late in pairwise(marks))
        return Times(self.mode, save, remount, resume, self.guest.blackout)

    def close(self) -> None:
        """End the guest."""
        self.guest.close()


def demonstrate(arguments: argparse.Namespace, report: Report) -> None:
    """Everything, for each mode; cleans up whatever happens."""
    images = guest_images()
    boots: dict[str, float] = {}
    rows: list[Times] = []
    for mode in MODES if arguments.mode == "both" else (arguments.mode,):
        with contextlib.ExitStack() as stack:
            region_directory = scratch(stack, arguments.region_dir, arguments.keep)
            work = scratch(stack, None, arguments.keep)
            mounted = Mounted(region_directory / "region", work / "mnt", work / "log")
            if not arguments.keep:
                stack.callback(mounted.close)
            with report.step(f"made a region of {arguments.region_size} in {mounted.region} and mounted it"):
                mounted.make(arguments.region_size)
                mounted.mount()
            update = LiveUpdate(mounted, mode, arguments.memory * MIB, images, report)
            stack.callback(update.close)
            boots[mode] = update.boot()
            rows += [update.restart() for _ in range(arguments.restarts)]
            if arguments.keep:
                report.say(f"kept: region {mounted.region}, mounted on {mounted.mountpoint}; log {mounted.log}")
    report.table(boots, rows)


def scratch(stack: contextlib.ExitStack, parent: Path | None, keep: bool) -> Path:
    """A temporary directory, deleted when `stack` ends, unless it is to be kept."""
    path = Path(tempfile.mkdtemp(prefix="pkernfs-live-update-", dir=parent))
    if not keep:
        # The server's log may still grow while this goes on.
        stack.callback(shutil.rmtree, path, ignore_errors=True)
    return path


def guest_images() -> Path:
    """The directory with the guest's kernel and initramfs, made if need be."""
    script = Path(__file__).resolve().parent.parent / "mount_helpers" / "guest-kernel"
    done = subprocess.run([script], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise PkernfsError(f"{script} ended with {done.returncode}", hint="see its messages above")
    return Path(done.stdout.strip())


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="live-update", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--restarts", type=int, default=1, metavar="N", help="how often, one after the other (default: 1)"
    )
    parser.add_argument(
        "--mode", choices=(*MODES, "both"), default="path", help="guest RAM mapped through the mount, or past it"
    )
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="RAM of the guest (default: 512)")
    parser.add_argument("--region-size", default="1G", metavar="SIZE", help="size of the region (default: 1G)")
    parser.add_argument(
        "--region-dir",
        type=Path,
        default=Path("/dev/shm"),
        metavar="DIR",
        help="tmpfs to make it in (default: /dev/shm)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the region and the mount there, and say where")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run, and turn errors of use into one line and an exit code."""
    arguments = parse(words)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # as an exception, so that all is cleaned up
    try:
        demonstrate(arguments, Report())
    except PkernfsError as error:
        print(f"live-update: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("live-update: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
