"""mount.pkernfs: what mount(8) calls for `mount -t pkernfs REGION DIR`."""

import os
import sys
from collections.abc import Sequence

from pkernfs.cli.words import Parser, add_version

DESCRIPTION = """\
Mount a pkernfs region on a directory.  Called by mount(8) for `mount -t pkernfs REGION DIR [-o OPTIONS]`, for lines of
fstab(5) with the type pkernfs, or by hand.  Returns when the mount is usable; the server goes on in the background and
ends when the filesystem is unmounted.
"""
EPILOG = """\
options (-o):
  ro, rw                 read-only: nothing in the region is changed, not even by recovery
  allow_other            other users may use the mount (default for root); noallow_other: only its owner
  uid=N, gid=N, mode=M   give the root directory this owner, group, mode (octal), as tmpfs does
  remount                with ro, rw, nosuid and so on: change the flags of a mount that is there
  relatime, strictatime, noatime
                         when reading updates access times (default relatime), as mount(8) describes
  log=FILE               log there, not to the journal
  barrier, nobarrier     whether what is stored in a region on a disk is flushed in order (the default there), so that a
                         power cut leaves it whole; fsync flushes either way
  notune                 leave the kernel's page cache limits for this mount alone (they are raised when root mounts:
                         random writes to mapped memory are hundreds of times slower without)
  suid, dev, exec, sync, dirsync and their opposites go to the kernel; the words that only mount(8) uses are ignored

examples:
  mount -t pkernfs /dev/shm/pkernfs.img /mnt/pkernfs
  mount -t pkernfs -o ro,noallow_other /dev/dax0.0 /mnt/pkernfs
  /dev/shm/pkernfs.img /mnt/pkernfs pkernfs defaults,nofail 0 0        (a line of /etc/fstab)

exit status, as mount(8) has it:
  0  mounted          1  wrong usage          32  it failed: one line says why
"""


class MountParser(Parser):
    """mount(8) has 1 for wrong usage."""

    usage_exit = 1


def parser() -> Parser:
    """The parser of mount.pkernfs; -n, -s, -v, -N and -t are what mount(8) passes along."""
    made = MountParser(prog="mount.pkernfs", description=DESCRIPTION, epilog=EPILOG)
    add_version(made)
    made.add_argument("region", metavar="REGION", help="file or device-DAX device that mkfs.pkernfs made")
    made.add_argument("directory", metavar="DIR")
    made.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see below")
    made.add_argument("-f", "--foreground", action="store_true", help="stay in front; log to the terminal")
    made.add_argument("-r", "--read-only", action="store_true", help="the same as -o ro")
    made.add_argument("-n", action="store_true", help="ignored: there is no mtab")
    made.add_argument("-s", action="store_true", help="ignored: tolerate unknown options")
    made.add_argument("-v", "--verbose", action="store_true", help="say what is done")
    made.add_argument("-t", dest="type", help="ignored: the type that mount(8) was given")
    return made


def run(argv: Sequence[str] | None) -> int:
    """Mount.  Raises PkernfsError before anything is mounted; afterwards only the server's exit status tells."""
    arguments = parser().parse_args(argv)
    from pkernfs.errors import UsageError
    from pkernfs.server.mount import check_mountpoint, open_filesystem, remount, serve, start_logging
    from pkernfs.server.options import parse_options

    try:
        options = parse_options(arguments.options)
    except UsageError as error:
        error.exit_code = 1
        raise
    if arguments.read_only:
        options = options._replace(readonly=True)
    if options.remount:
        remount(arguments.directory, options)
        return 0
    mountpoint = check_mountpoint(arguments.directory)
    fs = open_filesystem(arguments.region, options)
    if fs.volume.recovered:
        print(f"pkernfs: {arguments.region}: replayed the journal: {fs.volume.recovered} records", file=sys.stderr)

    def tell(warning: str) -> None:
        if warning:
            print(f"pkernfs: {mountpoint}: {warning}", file=sys.stderr)
        elif arguments.verbose:
            print(f"pkernfs: {fs.region.path} mounted on {mountpoint}", file=sys.stderr)

    if arguments.foreground:
        if options.log:
            start_logging(options.log)
        serve(fs, mountpoint, options, tell)
        return 0
    from pkernfs.server.daemon import daemonize

    daemon = daemonize()
    if daemon is None:
        # The parent has the region open too; the child's descriptor keeps the lock.
        return 0
    with daemon:
        start_logging(options.log)

        def ready(warning: str) -> None:
            tell(warning)
            daemon.ready()

        serve(fs, mountpoint, options, ready)
    os._exit(0)
