"""mkfs.pkernfs: make a region."""

import argparse
import os
import shlex
import stat
import sys
import uuid
from collections.abc import Sequence

from pkernfs.cli.arguments import group, mode, size, user
from pkernfs.cli.parsers import Parser, add_version
from pkernfs.cli.text import human
from pkernfs.errors import RegionError, UsageError, printable, quoted

ROOT_MODE = 0o700  #: as pkernfs.fs.mkfs has it, which a parser does not load

DESCRIPTION = """\
Make a pkernfs region: a file (on tmpfs, hugetlbfs or a disk) or a device-DAX device that holds a filesystem for state
that must survive live updates.  A file is made if it is not there, readable and writable for its owner only.

The new filesystem has a directory iommu/ with an empty file root-pgtables, for IOMMU page tables.  Its root directory
is for its owner only (0700), as guests' memory will be there: --mode, or the mount option mode=, lets others in.

A region whose memory a process maps, as a guest on the direct map does while nothing is mounted, is refused, with
--force too: the error names the process.
"""
EPILOG = """\
examples:
  mkfs.pkernfs --size 1G /dev/shm/pkernfs.img
  mkfs.pkernfs --size 8G --owner libvirt-qemu --group kvm --mode 0700 /dev/shm/tenant.img
  mkfs.pkernfs --label host7 --phys-base 0x40000000 /dev/dax0.0

exit status:
  0  made          1  it failed, and nothing was changed          2  wrong usage
"""


def parser() -> Parser:
    """The parser of mkfs.pkernfs."""
    made = Parser(prog="mkfs.pkernfs", description=DESCRIPTION, epilog=EPILOG)
    add_version(made)
    made.add_argument("region", metavar="REGION", help="file or device")
    made.add_argument(
        "-s", "--size", type=size, help="of the region, a multiple of 2 MiB (default: what the file or device has)"
    )
    made.add_argument(
        "--sparse",
        action="store_true",
        help="make it though the host can never have as much memory (or room on its disk), and say nothing where it has"
        " not now: what it cannot give later is ENOSPC",
    )
    made.add_argument("-L", "--label", default="", help="a name for people, up to 64 bytes")
    made.add_argument("-U", "--uuid", type=_uuid, help="its UUID (default: a random one)")
    made.add_argument(
        "--phys-base",
        type=size,
        metavar="ADDRESS",
        help="physical address of the region's first byte, for addresses in page tables "
        "(default: from sysfs for device DAX, else 0)",
    )
    made.add_argument(
        "--owner",
        type=user,
        metavar="USER",
        help="whose the root directory is, and the region's file where it is made here (default: who runs this)",
    )
    made.add_argument("--group", type=group, metavar="GROUP", help="the group of both")
    made.add_argument(
        "--mode",
        type=mode,
        metavar="MODE",
        default=ROOT_MODE,
        help="of the root directory, in octal (default 0700); a region's file that is made here has 0600",
    )
    made.add_argument("-f", "--force", action="store_true", help="overwrite a region, or other data, that is there")
    made.add_argument(
        "--even-if-mapped",
        action="store_true",
        help="go on though processes map the region's memory: a guest that has its RAM there loses it",
    )
    made.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    return made


def _uuid(word: str) -> uuid.UUID:
    try:
        return uuid.UUID(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a UUID, found {quoted(word)}") from None


def run(argv: Sequence[str] | None) -> int:
    """Check everything, and only then change something.  Raises PkernfsError."""
    arguments = parser().parse_args(argv)
    path = os.path.realpath(arguments.region)
    from pkernfs.format import BLOCK, MIN_BLOCKS, geometry
    from pkernfs.fs.mkfs import check_parameters, mkfs
    from pkernfs.region import check_unmapped, find_address, open_region

    wanted = arguments.size
    if wanted is not None and (wanted % BLOCK or wanted < MIN_BLOCKS * BLOCK):
        raise UsageError(f"--size: expected a multiple of 2 MiB, at least {human(MIN_BLOCKS * BLOCK)}, found {wanted}")
    device = os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode)
    if device and wanted is not None:
        raise UsageError("--size: a device has the size that it has", hint="leave the option out")
    phys_base = find_address(path) if arguments.phys_base is None and device else arguments.phys_base or 0
    if device and arguments.phys_base is None and not phys_base:
        print(
            f"mkfs.pkernfs: {printable(path)}: the kernel hides its physical address: 0 is taken, and page "
            "tables will be wrong: make it as root, or with --phys-base",
            file=sys.stderr,
        )
    if wanted is not None:
        check_parameters(wanted, arguments.label, phys_base)
    made = None if os.path.exists(path) else _make(path, wanted, arguments)

    def prepare(fd: int) -> None:
        """Under the lock: nobody else makes, mounts or resizes it between these checks and the end."""
        size = wanted
        if not device:
            size = os.fstat(fd).st_size if wanted is None else wanted
            check_parameters(size, arguments.label, phys_base)
            if not arguments.sparse:
                _check_host(fd, path, size, quiet=arguments.quiet)
        if made is None and not arguments.even_if_mapped:
            warning = check_unmapped(fd, path)
            if warning and not arguments.quiet:
                print(f"mkfs.pkernfs: warning: {printable(warning)}", file=sys.stderr)
        if not arguments.force:
            _check_overwrite(fd, path)
        if wanted is not None:
            os.ftruncate(fd, wanted)

    try:
        with open_region(path, prepare=prepare) as region:
            sb = mkfs(
                region,
                label=arguments.label,
                uuid=arguments.uuid,
                phys_base=phys_base,
                owner=arguments.owner,
                group=arguments.group,
                mode=arguments.mode,
            )
        if made is not None:
            _flush_name(path)
    except BaseException:
        if made is not None and os.path.exists(path) and os.path.samestat(made, os.stat(path)):
            os.unlink(path)
        raise
    found_mode = os.stat(path).st_mode
    if found_mode & 0o077 and not arguments.quiet:
        found = f"mode {stat.S_IMODE(found_mode):04o}, expected 0600"
        print(
            f"mkfs.pkernfs: {printable(path)}: others may use it ({found}): chmod 600 {printable(shlex.quote(path))}",
            file=sys.stderr,
        )
    if not arguments.quiet:
        geo = geometry(sb.blocks)
        print(
            f"{printable(arguments.region)}: {human(sb.blocks * BLOCK)}, {sb.blocks} blocks of 2 MiB, "
            f"{geo.first_block} for metadata, UUID {uuid.UUID(bytes=sb.uuid)}"
        )
    return 0


def _make(path: str, size: int | None, arguments: argparse.Namespace) -> os.stat_result:
    """Make an empty file that was not there, for its owner only.  Raises UsageError, RegionError."""
    if size is None:
        raise UsageError(f"{path}: no such file", hint="--size makes one")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RegionError(f"{path}: cannot make the file: {error.strerror}") from None
    try:
        os.fchmod(fd, 0o600)  # whatever the umask took from it
        if (arguments.owner, arguments.group) != (None, None):
            os.fchown(fd, *(-1 if one is None else one for one in (arguments.owner, arguments.group)))
        return os.fstat(fd)
    except OSError as error:
        os.unlink(path)
        raise RegionError(f"{path}: cannot give the file to another owner: {error.strerror}") from None
    finally:
        os.close(fd)


def _flush_name(path: str) -> None:
    """Let the name of a new file survive a power cut, as its content does."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_host(fd: int, path: str, size: int, *, quiet: bool) -> None:
    """Refuse a region for which the host can never have the memory; say so when it has not at the moment.

    Raises RegionError.  Not refused is what a remount, or the end of another program, mends: a tmpfs that is too small
    yet is found in many a script.
    """
    from pkernfs.region.host import free_for, kind_of_file, most_for, what_it_has

    kind = kind_of_file(fd)
    what = {"tmpfs": "memory", "hugetlbfs": "huge pages"}.get(kind, "room on its disk")
    most, found = most_for(fd, kind), what_it_has(fd, size) + free_for(fd, kind, thorough=True)
    text = f"{path}: expected {human(size)} of {what} for the region, the host has "
    if most < size:
        raise RegionError(f"{text}{human(most)} in all", hint="--sparse makes it all the same")
    if found < size and not quiet:
        warning = f"{text}{human(found)} now: what it cannot give later is ENOSPC (--sparse: known)"
        print(f"mkfs.pkernfs: warning: {printable(warning)}", file=sys.stderr)


def _check_overwrite(fd: int, path: str) -> None:
    """Refuse to overwrite a region, or what is left of one, or anything else that is not zeros.  Raises RegionError."""
    from pkernfs.format import MAGIC
    from pkernfs.region import find_copies, find_device
    from pkernfs.region.remains import Descriptor, look_for_structures

    status = os.fstat(fd)
    size = find_device(status.st_rdev, path).usable if stat.S_ISCHR(status.st_mode) else status.st_size
    source = Descriptor(fd, size)
    if source.peek(0, 8) == MAGIC.to_bytes(8, "little"):
        raise RegionError(f"{path}: holds a pkernfs region already", hint="--force overwrites it")
    left = look_for_structures(source)
    if left.structures or find_copies(source):
        text = f"{path}: looks like a pkernfs region whose superblock is damaged"
        raise RegionError(text, hint=f"fsck.pkernfs {shlex.quote(path)}")
    if left.content:
        raise RegionError(f"{path}: holds data that are not a pkernfs region", hint="--force overwrites them")
