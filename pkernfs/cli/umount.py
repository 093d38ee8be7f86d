"""umount.pkernfs: what umount(8) calls (as umount.fuse.pkernfs), so that it returns when the server has ended."""

import os
import select
import subprocess
import sys
from collections.abc import Sequence

from pkernfs.cli.words import Parser, add_version
from pkernfs.errors import UsageError

DESCRIPTION = """\
Unmount a pkernfs filesystem and wait until its server has ended: then everything is in the region, and the region can
be mounted again, copied or removed.  Installed as umount.fuse.pkernfs, it is what umount(8) calls.
"""
EPILOG = """\
exit status, as umount(8) has it:
  0  unmounted          1  wrong usage          32  it failed: one line says why
"""
#: Seconds to wait for a server to end after the kernel has let go of the mount.
PATIENCE = 60


def parser() -> Parser:
    """The parser of umount.pkernfs."""
    made = Parser(prog="umount.pkernfs", description=DESCRIPTION, epilog=EPILOG)
    made.usage_exit = 1
    add_version(made)
    made.add_argument("directory", metavar="DIR")
    made.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, clean up when nothing uses it; do not wait"
    )
    made.add_argument("-f", "--force", action="store_true", help="abort requests that hang")
    made.add_argument("-n", action="store_true", help="ignored: there is no mtab")
    made.add_argument("-v", "--verbose", action="store_true", help="ignored")
    made.add_argument("-r", action="store_true", help="ignored: busy mounts stay as they are")
    made.add_argument("-t", dest="type", help="ignored: the type that umount(8) found")
    return made


def run(argv: Sequence[str] | None) -> int:
    """Unmount and wait.  Raises UsageError; the exit status is umount(8)'s."""
    arguments = parser().parse_args(argv)
    from pkernfs.mounts import FSTYPE, mount_at

    real = os.path.realpath(arguments.directory)
    mount = mount_at(real)
    if mount is None or mount.fstype != FSTYPE:
        raise UsageError(f"{arguments.directory}: expected a pkernfs mount", hint="findmnt -t fuse.pkernfs lists them")
    server = _server(mount.source)
    words = [word for word, on in (("-l", arguments.lazy), ("-f", arguments.force)) if on]
    status = subprocess.run(["umount", "-i", *words, real], check=False).returncode
    if status or server is None or arguments.lazy or select.select([server], [], [], PATIENCE)[0]:
        return status
    print(f"umount.pkernfs: the server of {mount.source} still runs after {PATIENCE} s", file=sys.stderr)
    return 32


def _server(region: str) -> int | None:
    """A descriptor that becomes readable when the process that serves ``region`` ends."""
    from pkernfs.region import lock_holder

    try:
        holder = lock_holder(region)
        return None if holder is None else os.pidfd_open(holder.pid)
    except OSError:
        return None
