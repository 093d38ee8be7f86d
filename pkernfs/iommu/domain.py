"""Making and removing domains."""

from __future__ import annotations

import errno
import stat

from pkernfs.errors import FsError
from pkernfs.format import IOMMU_INO, ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.fs.pins import named_domains
from pkernfs.fs.records import Records
from pkernfs.iommu.formats import BY_NAME
from pkernfs.iommu.hwpt import Hwpt, done_before, executed


def create(fs: Filesystem, name: bytes, form: str, levels: int, caller: Caller, request: int = 0) -> int:
    """A new domain with its first 2 MiB; its inode."""
    if form not in BY_NAME or not 3 <= levels <= 5:
        raise FsError(errno.EINVAL, f"expected the format vtd or amd and 3 to 5 levels, found {form!r} and {levels!r}")
    again = done_before(fs, request)
    if again is not None:
        return again

    def furnish(ino: int) -> None:
        hwpt = Hwpt(fs.volume, ino)
        hwpt.record = hwpt.record._replace(tables=BY_NAME[form].number, levels=levels)
        roots = Records(fs.volume, ROOT_PGTABLES_INO)
        hwpt.prepare(roots)
        hwpt.save()
        executed(roots, request, ino)

    return fs.create(IOMMU_INO, name, stat.S_IFREG | 0o600, caller, furnish=furnish)


def destroy(fs: Filesystem, ino: int, request: int = 0) -> None:
    """Remove a domain that no device is attached to, and all its mappings."""
    if done_before(fs, request) is not None:
        return
    Hwpt(fs.volume, ino)
    name = next((name for name, of in named_domains(fs.volume) if of == ino), None)
    if name is None:
        raise FsError(errno.ENOENT, f"inode {ino}: the domain has no name")
    fs.unlink(IOMMU_INO, name, also=lambda: executed(Records(fs.volume, ROOT_PGTABLES_INO), request, 0))
