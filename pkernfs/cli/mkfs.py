"""mkfs.pkernfs: make a region."""

import argparse
import os
import stat
import uuid
from collections.abc import Sequence

from pkernfs.cli.words import Parser, add_version, human, size
from pkernfs.errors import RegionError, UsageError

DESCRIPTION = """\
Make a pkernfs region: a file (on tmpfs, hugetlbfs or a disk) or a device-DAX device that holds a filesystem for state
that must survive live updates.  A file is made if it is not there, readable and writable for its owner only.

The new filesystem has a directory iommu/ with an empty file root-pgtables, for IOMMU page tables.
"""
EPILOG = """\
examples:
  mkfs.pkernfs --size 1G /dev/shm/pkernfs.img
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
    made.add_argument("-L", "--label", default="", help="a name for people, up to 64 bytes")
    made.add_argument("-U", "--uuid", type=_uuid, help="its UUID (default: a random one)")
    made.add_argument(
        "--phys-base",
        type=size,
        metavar="ADDRESS",
        help="physical address of the region's first byte, for addresses in page tables "
        "(default: from sysfs for device DAX, else 0)",
    )
    made.add_argument("-f", "--force", action="store_true", help="overwrite a region, or other data, that is there")
    made.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    return made


def _uuid(word: str) -> uuid.UUID:
    try:
        return uuid.UUID(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a UUID, found {word!r}") from None


def run(argv: Sequence[str] | None) -> int:
    """Check everything first, then make the region.  Raises PkernfsError."""
    arguments = parser().parse_args(argv)
    path = os.path.realpath(arguments.region)
    from pkernfs.format import BLOCK, MIN_BLOCKS, geometry

    wanted = arguments.size
    if wanted is not None and (wanted % BLOCK or wanted < MIN_BLOCKS * BLOCK):
        raise UsageError(f"--size: expected a multiple of 2 MiB, at least {human(MIN_BLOCKS * BLOCK)}, found {wanted}")
    existed = os.path.exists(path)
    device = existed and stat.S_ISCHR(os.stat(path).st_mode)
    if existed:
        _check_overwrite(path, arguments.force, device)
    elif wanted is None:
        raise UsageError(f"{path}: no such file", hint="--size makes one")
    if device and wanted is not None:
        raise UsageError("--size: a device has the size that it has", hint="leave the option out")
    if arguments.phys_base is not None and arguments.phys_base % BLOCK:
        raise UsageError(f"--phys-base: expected a multiple of 2 MiB, found {arguments.phys_base:#x}")
    from pkernfs.fs.mkfs import mkfs
    from pkernfs.region import create_region_file, dax_address, open_region

    old_size = os.stat(path).st_size if existed and not device else None
    try:
        if wanted is not None:
            create_region_file(path, wanted)
        with open_region(path) as region:
            base = arguments.phys_base
            if base is None:
                base = dax_address(path) if device else 0
            sb = mkfs(region, label=arguments.label, uuid=arguments.uuid, phys_base=base)
    except BaseException:
        # Nothing half made: a new file goes, one that was there has its old size.
        if not existed and os.path.exists(path):
            os.unlink(path)
        elif old_size is not None and os.stat(path).st_size != old_size:
            os.truncate(path, old_size)
        raise
    if not arguments.quiet:
        geo = geometry(sb.blocks)
        print(
            f"{arguments.region}: {human(sb.blocks * BLOCK)}, {sb.blocks} blocks of 2 MiB, "
            f"{geo.first_block} for metadata, UUID {uuid.UUID(bytes=sb.uuid)}"
        )
    return 0


def _check_overwrite(path: str, force: bool, device: bool) -> None:
    """Refuse to overwrite a region, or anything else that is not zeros, without --force.  Raises RegionError."""
    from pkernfs.format import BLOCK, MAGIC
    from pkernfs.region import open_region

    mode = os.stat(path).st_mode
    if not device and not stat.S_ISREG(mode):
        raise RegionError(f"{path}: expected a file or a device-DAX device, found {stat.filemode(mode)}")
    if force or (not device and os.stat(path).st_size == 0):
        return
    if device or (os.stat(path).st_size >= 4 * BLOCK and os.stat(path).st_size % BLOCK == 0):
        with open_region(path, readonly=True, locked=False) as region:
            start, backup = region.read(0, BLOCK), region.read(BLOCK, 8)
    else:
        with open(path, "rb") as file:
            start, backup = file.read(BLOCK), b""
    magic = MAGIC.to_bytes(8, "little")
    if magic in (start[:8], backup):
        raise RegionError(f"{path}: holds a pkernfs region already", hint="--force overwrites it")
    if any(start):
        raise RegionError(f"{path}: holds data that are not a pkernfs region", hint="--force overwrites them")
