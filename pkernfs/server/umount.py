"""Taking a mount away, wherever it is: found by its number, whoever moved it, bound it or mounted over it.

All mounts of it in the mount namespace of this process belong to it.  Those of others are never touched: where one is
on ours, or hides it, ours is in use, as umount(8) says too, and stays; dead, when the keeper has ended.  In other mount
namespaces it goes on.
"""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from pkernfs.errors import PkernfsError, RegionBusyError
from pkernfs.mountinfo import FSTYPE, Mount, elsewhere, mounts, reach
from pkernfs.processes import Holder
from pkernfs.server.device import umount2
from pkernfs.server.resources import REFUSALS

MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8  #: linux/fs.h
REFUSED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
SETTLE: Final = 1.0  #: seconds after which a mount that is nowhere any more has ended, unless something holds it


def umount(device: str, region: str, *, lazy: bool = False) -> None:
    """Unmount all mounts of ``device`` (MAJOR:MINOR).  Raises RegionBusyError, OSError, NoProcError.

    ``region``: what is mounted, whose lock the caller holds; the number alone, which may not be known yet (""), may be
    another mount's already when this one has ended.  ``lazy``: whoever uses them, where nobody serves any more; without
    it none of them, when one is in the way.
    """
    known = mounts()
    found = [mount for mount in reversed(known) if (mount.fstype, mount.source) == (FSTYPE, region)]
    found = [mount for mount in found if device in ("", mount.device)]
    found.sort(key=lambda mount: -len(mount.mountpoint))  # what is mounted on another one of ours goes first
    problems: list[Exception] = []
    for mount in list(found):
        try:
            _check(mount, known)
        except RegionBusyError as error:
            problems.append(error)
            found.remove(mount)
    if not problems or lazy:
        for mount in found:
            try:
                _check(mount, known)
                _umount(mount.mountpoint, lazy=lazy)
            except (OSError, RegionBusyError) as error:
                problems.append(error)
                if not lazy or is_refusal(error):
                    break
    if problems:
        raise problems[0]


def take_away(mount: Mount) -> None:
    """Unmount one mount that nobody serves any more.  Raises RegionBusyError, OSError, NoProcError."""
    _check(mount, mounts())
    _umount(mount.mountpoint, lazy=True)


def _check(mount: Mount, known: Sequence[Mount]) -> None:
    """Raise RegionBusyError when a mount does not show at its path, or when somebody else's is on it."""
    other = next((one for one in known if one.parent == mount.id and one.device != mount.device), None)
    if other is not None:
        raise RegionBusyError(f"{mount.mountpoint}: another mount is on it, {other.fstype} on {other.mountpoint}")
    try:
        os.close(reach(mount))
    except OSError as error:
        if is_refusal(error):
            raise
        raise RegionBusyError(f"{mount.mountpoint}: it does not show there: {error.strerror}") from None


def _umount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount by path.  Raises OSError.

    umount2(2) knows no other way: of a descriptor in /proc/self/fd it too takes what is mounted on top.  So whoever
    calls has just looked.  Not umount(8), which looks at the path again, and which must be started.
    """
    if os.geteuid() == 0:
        try:
            umount2(mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH | MNT_FORCE if lazy else 0))
        except PermissionError:
            if not lazy:
                raise
            umount2(mountpoint, UMOUNT_NOFOLLOW | MNT_DETACH)  # root of a user namespace must not force
        return
    command = ["fusermount3", "-u", *["-z"] * lazy, "--", mountpoint]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise OSError(errno.EBUSY, " ".join(done.stderr.decode(errors="replace").split()))


def is_refusal(error: BaseException) -> bool:
    """Whether the host has something not that is asked for, and may have it later."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in REFUSED


class Unmounting:
    """An unmount in a thread, since it waits until the worker has taken what is dirty; ``wake`` is called at its end.

    ``problem``: None while it is under way, "" when it is done, else why it is not.  ``refused``: try again later.
    Raises RuntimeError when there is no thread to be had.
    """

    def __init__(self, device: str, region: str, wake: Callable[[], None]) -> None:
        self.problem: str | None = None
        self.refused: BaseException | None = None
        self.elsewhere: list[Holder] = []  #: who has it mounted in other mount namespaces
        self._device, self._region = device, region
        self._wake = wake
        self._done = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            umount(self._device, self._region)
            self.elsewhere = elsewhere(self._device)
            problem = ""
        except (PkernfsError, *REFUSALS) as error:
            problem = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            if is_refusal(error):
                self.refused = error
        self._done = time.monotonic()
        self.problem = problem
        self._wake()

    def settled(self) -> bool:
        """Whether it was done so long ago that the mount has ended by now, or goes on."""
        return self.problem == "" and time.monotonic() > self._done + SETTLE
