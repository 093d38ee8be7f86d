"""Mounting: from a region and a directory to a served mount, and to its end."""

from __future__ import annotations

import ctypes
import errno
import logging
import logging.handlers
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pkernfs.client import control
from pkernfs.errors import RegionBusyError, RegionError
from pkernfs.format import ROOT_INO
from pkernfs.fs.filesystem import Filesystem, SetAttr
from pkernfs.mounts import FSTYPE, mount_at
from pkernfs.region import open_region
from pkernfs.server.options import MountOptions

log = logging.getLogger("pkernfs")

#: Flags of mount(2); statvfs(3) has the same values.
MS_REMOUNT = 32
MS_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "noatime": 1024}


def check_mountpoint(path: str) -> str:
    """The real path of the directory to mount on; a dead pkernfs mount that is left there is taken away first.

    Raises RegionError, RegionBusyError when a living pkernfs is mounted there.
    """
    real = os.path.realpath(path)
    mounted = mount_at(real)
    try:
        mode = os.stat(real).st_mode
        if mounted is not None and mounted.fstype == FSTYPE:
            os.statvfs(real)  # the kernel answers stat from its cache, also when the server is dead; this it does not
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED) or mounted is None or mounted.fstype != FSTYPE:
            raise RegionError(f"{path}: cannot mount there: {error.strerror}", hint="mkdir makes it") from None
        print(f"pkernfs: {path}: the server of an earlier mount is gone; taking that mount away", file=sys.stderr)
        subprocess.run(["umount", "-i", "-l", real], check=False)
        return check_mountpoint(path) if mount_at(real) != mounted else real
    if not stat.S_ISDIR(mode):
        raise RegionError(f"{path}: expected a directory to mount on, found {stat.filemode(mode)}")
    if mounted is not None and mounted.fstype == FSTYPE:
        raise RegionBusyError(f"{path}: {mounted.source} is mounted there", hint=f"umount {path} first")
    return real


def remount(path: str, options: MountOptions) -> None:
    """Change the kernel's flags of the mount at ``path``.

    Raises RegionError when there is none, when a server that opened its region for reading is to write, or when it is
    to begin or stop flushing.
    """
    real = os.path.realpath(path)
    mounted = mount_at(real)
    if mounted is None or mounted.fstype != FSTYPE:
        raise RegionError(f"{path}: expected a pkernfs mount to change", hint="findmnt -t fuse.pkernfs lists them")
    if not options.readonly or options.barriers is not None:
        facts = control(real, "info")
        if not options.readonly and facts["readonly"]:
            raise RegionError(f"{path}: its region was opened for reading only", hint="umount it and mount it anew")
        if options.barriers not in (None, facts["barriers"]) and not facts["readonly"]:
            found = "with" if facts["barriers"] else "without"
            raise RegionError(f"{path}: its region was opened {found} barriers", hint="umount it and mount it anew")
    # mount(2) itself: the mount(8) of util-linux 2.41 hands FUSE's own options on, which the kernel then refuses.
    flags = MS_REMOUNT | os.statvfs(real).f_flag & sum(MS_FLAGS.values()) & ~MS_FLAGS["ro"]
    for word in ("ro", *options.kernel) if options.readonly else options.kernel:
        positive = word if word in MS_FLAGS else "no" + word
        flags = flags | MS_FLAGS[word] if word in MS_FLAGS else flags & ~MS_FLAGS.get(positive, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(real), None, ctypes.c_ulong(flags), None):
        raise RegionError(f"{path}: the kernel refuses the new flags: {os.strerror(ctypes.get_errno())}")


def open_filesystem(region_path: str, options: MountOptions) -> Filesystem:
    """Open, lock and recover the region, and apply the options that change its root.  Raises PkernfsError."""
    region = open_region(region_path, readonly=options.readonly)
    try:
        if options.barriers is not None and not options.readonly:
            if options.barriers and not region.volatile:
                raise RegionError(
                    f"{region_path}: -o barrier: expected a region on a disk, found {region.kind}, which has nothing "
                    "to flush",
                    hint="leave the option out",
                )
            region.barriers = options.barriers
        fs = Filesystem.open(region)
        fs.atime_policy = options.atime
        if not options.readonly:
            fs.volume.mark_mounted()
            if (options.uid, options.gid, options.mode) != (None, None, None):
                fs.setattr(ROOT_INO, SetAttr(uid=options.uid, gid=options.gid, mode=options.mode))
    except BaseException:
        region.close()
        raise
    return fs


def start_logging(path: str) -> None:
    """Log to a file, or to the journal (syslog's socket); warnings of Python itself too.  Raises RegionError."""
    handler: logging.Handler
    if path:
        try:
            handler = logging.FileHandler(path)
        except OSError as error:
            raise RegionError(f"{path}: cannot write the log: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s pkernfs[%(process)d]: %(levelname)s: %(message)s"))
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log", facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("pkernfs[%(process)d]: %(levelname)s: %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("pkernfs: %(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.captureWarnings(True)


class _Option(str):
    """An option of libfuse with a path in it; pyfuse3 encodes options as ASCII, paths are whatever bytes they are."""

    def encode(self, *_: str) -> bytes:
        return os.fsencode(str(self))


def fuse_options(region_path: str, options: MountOptions) -> set[str]:
    """What libfuse is told; commas and backslashes in the region's path escaped as libfuse wants."""
    root = os.geteuid() == 0
    escaped = region_path.replace("\\", "\\\\").replace(",", "\\,")
    words = {"default_permissions", _Option(f"fsname={escaped}"), "subtype=pkernfs"}
    if options.allow_other or (options.allow_other is None and root):
        words.add("allow_other")
    if options.readonly:
        words.add("ro")
    if root:
        # libfuse's defaults are nosuid and nodev; a filesystem of root's own has both unless told otherwise.
        words |= {"suid", "dev"} - {word.removeprefix("no") for word in options.kernel}
    return words | set(options.kernel)


def unmount(mountpoint: str, device: str) -> bool:
    """umount, by fusermount3 for users; False when it is in use, or something else is mounted on top of ``device``."""
    mounted = mount_at(mountpoint)
    if mounted is None or mounted.device != device:
        return False
    command = ["umount", "-i", mountpoint] if os.geteuid() == 0 else ["fusermount3", "-u", mountpoint]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


@contextmanager
def stderr_of_libfuse() -> Iterator[Callable[[], str]]:
    """Keep what C code prints on standard error; the function gives it as one line."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: " ".join(os.pread(file.fileno(), 4096, 0).decode(errors="replace").split())
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def serve(fs: Filesystem, mountpoint: str, options: MountOptions, ready: Callable[[str], None]) -> None:
    """Mount, serve until the mount ends, and close the filesystem.

    ``ready`` is called once the mount is usable, with a warning or "".  Raises RegionError when mounting fails.
    """
    import pyfuse3
    import trio

    from pkernfs.server import loop
    from pkernfs.server.bdi import tune
    from pkernfs.server.control import ControlSocket
    from pkernfs.server.operations import Operations
    from pkernfs.server.verbs import verbs

    def facts() -> dict[str, Any]:
        return {"control": listener.path, "region": fs.region.path, "pid": os.getpid()}

    fs.volume.damage.log_again()
    loop.install()
    operations = Operations(fs, facts)
    listener = ControlSocket(verbs(operations, pyfuse3.invalidate_inode))
    with stderr_of_libfuse() as said:
        try:
            pyfuse3.init(operations, mountpoint, fuse_options(fs.region.path, options))
        except RuntimeError as error:
            listener.close()
            fs.close()
            raise RegionError(
                f"{mountpoint}: mounting failed: {said() or error}", hint="may you use /dev/fuse and this directory?"
            ) from None

    mounted = mount_at(mountpoint)
    device = mounted.device if mounted else ""

    async def announce() -> None:
        def settle() -> str:
            os.stat(mountpoint)  # waits for the kernel's INIT, which sets the limits that are tuned next
            return tune(mountpoint) if options.tune else ""

        ready(await trio.to_thread.run_sync(settle, abandon_on_cancel=True))

    async def watch_signals(signals: AsyncIterator[int]) -> None:
        number = await anext(signals)
        log.info("%s: unmounting %s", signal.Signals(number).name, mountpoint)
        # In a thread, and served meanwhile: what is dirty in the kernel's cache comes in as requests.
        if await trio.to_thread.run_sync(unmount, mountpoint, device, abandon_on_cancel=True):
            # The end of the mount ends the loop, unless it is mounted elsewhere too: then the next signal does.
            await anext(signals)
        log.warning("%s is in use: what is open there fails from now on", mountpoint)
        with suppress(OSError):
            await trio.to_thread.run_sync(pyfuse3.syncfs, mountpoint, abandon_on_cancel=True)
        pyfuse3.terminate()

    async def run() -> None:
        # Before the first task: the session's may serve many requests before another one gets its turn.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_signals, signals)
                nursery.start_soon(listener.serve)
                nursery.start_soon(operations.housekeeping)
                nursery.start_soon(announce)
                try:
                    await pyfuse3.main()
                finally:
                    # Before anything is waited for: whoever still has a request here gets an error, not silence.
                    pyfuse3.close(unmount=True)
                nursery.cancel_scope.cancel()

    try:
        trio.run(run)
    finally:
        listener.close()
        fs.close()
        log.info("%s: unmounted %s", fs.region.path, mountpoint)
