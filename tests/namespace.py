"""A mount namespace of the tests' own.

A program that copies the mount table meanwhile (``unshare -m``, a container that starts) holds all that was mounted at
that moment until it ends: a mount of a test's would go on after its umount, and so would its server.  In a namespace of
their own nobody copies them; not even a test of another process of pytest-xdist, for each has its own.
"""

from __future__ import annotations

import ctypes

CLONE_NEWNS = 0x00020000  # linux/sched.h
MS_REC, MS_SLAVE = 1 << 14, 1 << 19  # linux/mount.h


def enter_mount_namespace() -> None:
    """Take this thread, and all that it will start, into a mount namespace of their own.

    Nothing that is mounted in it shows in the namespace that we come from.  As a slave, and not private, it follows
    what is unmounted there: we do not hold the mounts of other programs either.  (Python has os.unshare from 3.12 on,
    and no mount(2).)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_SLAVE), None):
        raise OSError(ctypes.get_errno(), "cannot have a mount namespace of our own")
