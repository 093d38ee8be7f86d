"""The directory of a mount: whether one can be made there, and the kernel's flags of one that is there."""

from __future__ import annotations

import errno
import os
import stat
import sys

from pkernfs import client
from pkernfs.errors import RegionBusyError, RegionError, file_type, printable
from pkernfs.mountinfo import FSTYPE, mount_at
from pkernfs.options import MountOptions
from pkernfs.server.device import MS_FLAGS, mount2
from pkernfs.server.umount import take_away

MS_REMOUNT = 32


def check_mountpoint(path: str) -> str:
    """The real path of the directory to mount on; a dead pkernfs mount that is left there is taken away first.

    Raises RegionError, RegionBusyError when a living pkernfs is mounted there.
    """
    real = os.path.realpath(path)
    mounted = mount_at(real)
    try:
        mode = os.stat(real).st_mode
        if mounted is not None and mounted.fstype == FSTYPE:
            os.statvfs(real)  # the kernel answers stat from its cache, also when the server is dead, but not this
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED) or mounted is None or mounted.fstype != FSTYPE:
            raise RegionError(f"{path}: cannot mount there: {error.strerror}", hint="mkdir makes it") from None
        print(
            f"pkernfs: {printable(path)}: the server of an earlier mount is gone; taking that mount away",
            file=sys.stderr,
        )
        try:
            take_away(mounted)
        except OSError as failed:
            raise RegionError(f"{path}: cannot take that mount away: {failed.strerror}") from None
        return check_mountpoint(path)
    if not stat.S_ISDIR(mode):
        raise RegionError(f"{path}: expected a directory to mount on, found {file_type(mode)}")
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
        info = client.info(real)
        if not options.readonly and info.readonly:
            raise RegionError(f"{path}: its region was opened for reading only", hint="umount it and mount it anew")
        if options.barriers not in (None, info.barriers) and not info.readonly:
            found = "with" if info.barriers else "without"
            raise RegionError(f"{path}: its region was opened {found} barriers", hint="umount it and mount it anew")
    # mount(2) itself: the mount(8) of util-linux 2.41 hands FUSE's own options on, which the kernel then refuses.
    flags = MS_REMOUNT | os.statvfs(real).f_flag & sum(MS_FLAGS.values()) & ~MS_FLAGS["ro"]
    for word in ("ro", *options.kernel) if options.readonly else options.kernel:
        positive = word if word in MS_FLAGS else "no" + word
        flags = flags | MS_FLAGS[word] if word in MS_FLAGS else flags & ~MS_FLAGS.get(positive, 0)
    try:
        mount2("none", real, "", flags, "")
    except OSError as error:
        raise RegionError(f"{path}: the kernel refuses the new flags: {error.strerror}") from None
