"""Mounting a region that is served already on one directory more: the same mount, as with a disk's filesystem.

Wherever it is: here on another directory, in another mount namespace only, or nowhere but in use.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

from pkernfs.errors import PkernfsError, RegionBusyError, RegionError, printable
from pkernfs.options import DECLARED, MountOptions
from pkernfs.served import Served, served, still_mounted
from pkernfs.server.device import mount_again
from pkernfs.sockets import receive_fds

ASK = 10.0  #: seconds that its keeper may take; it may be another one that is just starting
#: What each mount has for itself.
ITS_OWN = {"readonly", "remount", "kernel"}


def share(region: str, mountpoint: str, options: MountOptions) -> bool:
    """Mount the region at the real path ``region`` there if it is served; False: it is not, or not any more.

    What of the options holds for the whole mount and is another there is said on standard error.  Raises RegionError.
    """
    found = served(region)
    if found is None or options.foreground or os.geteuid() != 0:  # fusermount3 cannot
        return False
    try:
        if os.stat(found.keeper).st_uid != os.geteuid():
            return False  # a user's: nobody else may enter it
        name, theirs, fd = _ask(found)
    except (OSError, PkernfsError):
        return False  # it is about to end, or of a version before 0.3.0: the region's lock tells
    try:
        if theirs.readonly and not options.readonly:
            where = next((f"mounted on {mount.mountpoint}" for mount in found.here()), "served")
            raise RegionBusyError(f"{region}: it is {where} for reading only", hint="-o ro mounts it here too")
        holders = [] if found.here() else found.elsewhere()
        try:
            mount_again(name, mountpoint, options, fd)
        except OSError as error:
            if error.errno == errno.ENOTCONN:  # it has ended meanwhile
                return False
            why = f"{region}: {still_mounted(holders)}" if holders else f"{region}: the region is served already"
            hint = "that takes Linux 5.15" if error.errno == errno.EINVAL else ""
            raise RegionBusyError(f"{why}; mounting it on {mountpoint} too: {error.strerror}", hint=hint) from None
    finally:
        os.close(fd)
    if holders:
        print(f"pkernfs: {printable(region)}: {still_mounted(holders)}", file=sys.stderr)
    if differences := differing(options, theirs):
        print(
            f"pkernfs: {printable(mountpoint)}: the region was mounted already, and stays so: {differences}",
            file=sys.stderr,
        )
    return True


def differing(wanted: MountOptions, found: MountOptions) -> str:
    """What was asked for and is another in a mount that is there already; "": nothing."""
    default = MountOptions()
    fields = [
        field
        for field in DECLARED
        if field not in ITS_OWN and getattr(wanted, field) not in (getattr(default, field), getattr(found, field))
    ]
    return ", ".join(f"{field}={_word(getattr(found, field))}, not {_word(getattr(wanted, field))}" for field in fields)


def _word(value: object) -> str:
    return printable(
        "as it was" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _ask(found: Served) -> tuple[str, MountOptions, int]:
    """The region as it was mounted, the options of the mount, and its connection.  Raises OSError, PkernfsError."""
    from pkernfs.api import Share
    from pkernfs.codec import decode_reply, encode_request

    request = Share()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ASK)
        connection.connect(found.keeper)
        connection.sendall(encode_request(request))
        data, fds = receive_fds(connection, 1 << 16, 1)
    try:
        reply = decode_reply(data, request)
        if not fds:
            raise RegionError("the keeper sent no descriptor")
        known = {name: value for name, value in reply.options.items() if name in MountOptions._fields}
        return reply.region, MountOptions(**known), fds[0]
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
