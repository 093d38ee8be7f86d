"""mount.pkernfs: what mount(8) calls for `mount -t pkernfs REGION DIR`."""

import os
import sys
from collections.abc import Sequence

from pkernfs.cli.parsers import Parser, add_version, listing
from pkernfs.options import descriptions, parse_options

DESCRIPTION = """\
Mount a pkernfs region on a directory.  Called by mount(8) for `mount -t pkernfs REGION DIR [-o OPTIONS]`, for lines of
fstab(5) with the type pkernfs, or by hand.  Returns when the mount is usable; two processes go on in the background, a
keeper and its worker, until the filesystem is unmounted.  When one of them is killed, another takes its place: see
pkernfs status --help.
"""
EPILOG = """\
options (-o):
{options}

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
    made = MountParser(
        prog="mount.pkernfs", description=DESCRIPTION, epilog=EPILOG.format(options=listing(descriptions()))
    )
    add_version(made)
    made.add_argument("region", metavar="REGION", help="file or device-DAX device that mkfs.pkernfs made")
    made.add_argument("directory", metavar="DIR", help="directory to mount it on")
    made.add_argument(
        "-o",
        dest="options",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="options with commas between them: see below",
    )
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
    from pkernfs.errors import UsageError, printable
    from pkernfs.server.logs import start_logging
    from pkernfs.server.mountpoint import check_mountpoint, remount
    from pkernfs.server.resources import reserve
    from pkernfs.server.share import share
    from pkernfs.server.start import mount
    from pkernfs.server.succession import resumed
    from pkernfs.server.systemd import service
    from pkernfs.surroundings import settle

    try:
        options = parse_options(arguments.options)
    except UsageError as error:
        error.exit_code = 1
        raise
    if arguments.read_only:
        options = options._replace(readonly=True)
    if options.remount and options.cold:
        raise UsageError("-o remount,cold: what a boot is cannot change later", hint="unmount, and mount with -o cold")
    if options.remount:
        remount(arguments.directory, options)
        return 0
    options = options._replace(foreground=arguments.foreground, log=options.log and os.path.abspath(options.log))
    settle(ours=bool(service()), foreground=arguments.foreground)
    reserve()  # before anything that stays open
    region = os.path.realpath(arguments.region)
    if (keeper := resumed(region, os.path.realpath(arguments.directory))) is not None:
        keeper.keep()
        return 0
    mountpoint = check_mountpoint(arguments.directory)
    if share(region, mountpoint, options):
        if arguments.verbose:
            print(f"pkernfs: {printable(region)} mounted on {printable(mountpoint)} too", file=sys.stderr)
        return 0

    def report(replayed: int, warning: str) -> None:
        if replayed:
            print(f"pkernfs: {printable(region)}: replayed the journal: {replayed} records", file=sys.stderr)
        if warning:
            print(f"pkernfs: {printable(mountpoint)}: {warning}", file=sys.stderr)
        elif arguments.verbose:
            print(f"pkernfs: {printable(region)} mounted on {printable(mountpoint)}", file=sys.stderr)

    if arguments.foreground:
        start_logging(options)
        mount(region, mountpoint, options, report)
        return 0
    from pkernfs.server.daemon import daemonize

    daemon = daemonize()
    if daemon is None:
        return 0
    service.cache_clear()  # who was started by systemd has ended
    with daemon:
        start_logging(options)

        def ready(replayed: int, warning: str) -> None:
            report(replayed, warning)
            daemon.ready()

        mount(region, mountpoint, options, ready)
    os._exit(0)
