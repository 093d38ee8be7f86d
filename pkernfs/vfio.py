"""A domain as VFIO's container: the calls of VFIO_TYPE1v2_IOMMU, for programs that know those.  Stable Python API.

    container = Container("/mnt/pkernfs/iommu/dom-0")
    container.map_dma(0x100000, "/mnt/pkernfs/guest-ram", size=64 << 20)
    ... a restart, of whatever ...
    container = Container("/mnt/pkernfs/iommu/dom-0")       all mappings are there
    container.map_dma(0x100000, "/mnt/pkernfs/guest-ram", size=64 << 20, live_update=True)      which this verifies

Instead of a virtual address a mapping names a file of the same mount.  Raises OSError with VFIO's errno: EEXIST for an
overlap, EINVAL for what is not aligned or out of range, ENOENT where nothing is mapped, ENOSPC, EXDEV.  examples/api.md
has more.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from pkernfs.client import ask
from pkernfs.errors import PkernfsError
from pkernfs.format import PAGE

if TYPE_CHECKING:
    from pkernfs import api

__all__ = ["Container", "DmaMapping"]

ACCESS: Final[dict[tuple[bool, bool], api.Access]] = {(True, True): "rw", (True, False): "ro", (False, True): "wo"}
R = TypeVar("R")


class DmaMapping(NamedTuple):
    """One mapping; ``file`` is a path in the mount, None when it has no name any more."""

    iova: int
    size: int
    file: str | None
    offset: int
    access: str  #: "rw", "ro" or "wo"


class Container:
    """The container that stands in a file of iommu/.  It is opened anew by naming it: nothing of it is in here."""

    pgsizes: Final = PAGE  #: VFIO_IOMMU_INFO_PGSIZES: what IOVAs and sizes are multiples of

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def _ask(self, request: api.Request[R]) -> R:
        try:
            return ask(self.path, request)
        except PkernfsError as error:
            raise OSError(error.errno, str(error)) from None

    def map_dma(
        self,
        iova: int,
        file: str | os.PathLike[str],
        offset: int = 0,
        size: int = 0,
        *,
        read: bool = True,
        write: bool = True,
        live_update: bool = False,
    ) -> None:
        """VFIO_IOMMU_MAP_DMA: ``size`` bytes (0: up to the end) of a file.

        ``live_update``, VFIO_DMA_MAP_FLAG_LIVE_UPDATE: verify that it is mapped already, and change nothing.
        """
        from pkernfs import api

        if os.stat(file).st_dev != os.stat(self.path).st_dev:
            raise OSError(errno.EXDEV, f"{os.fspath(file)}: expected a file of the mount that {self.path} is in")
        if (read, write) not in ACCESS:
            raise OSError(errno.EINVAL, f"{os.fspath(file)}: expected that the device may read or write")
        request = api.IommuMap(
            iova=iova,
            file_ino=os.stat(file).st_ino,
            offset=offset,
            length=size,
            access=ACCESS[read, write],
            live_update=live_update,
        )
        self._ask(request)

    def unmap_dma(self, iova: int, size: int) -> int:
        """VFIO_IOMMU_UNMAP_DMA, of parts of mappings too; how many bytes were mapped."""
        from pkernfs import api

        return self._ask(api.IommuUnmap(iova=iova, length=size)).unmapped

    def _domain(self) -> api.Domain:
        from pkernfs import api

        ino = os.stat(self.path).st_ino
        for domain in self._ask(api.IommuList()).domains:
            if domain.ino == ino:
                return domain
        raise OSError(errno.EINVAL, f"{self.path}: expected a domain, a file in iommu/")

    def invalidations(self) -> api.Invalidations:
        """What hardware must invalidate after changes, of all domains, and the token of this list.

        VFIO invalidates by itself; here whoever drives the IOMMU does, and then acknowledges the token.
        """
        from pkernfs import api

        return self._ask(api.IommuInvalidations())

    def acknowledge(self, token: int) -> None:
        """All of the list with this token was invalidated.  Raises OSError(EAGAIN) when there is more by now."""
        from pkernfs import api

        self._ask(api.IommuInvalidations(acknowledge=token))

    def iotlb_needed(self) -> tuple[list[dict[str, Any]], int]:
        """What ``invalidations`` gives, as 0.1 gave it.  Goes with release 0.3."""
        from pkernfs.api import to_builtins

        found = self.invalidations()
        return to_builtins(found.invalidations), found.token

    #: The name of ``acknowledge`` in 0.1.  Goes with release 0.3.
    invalidated = acknowledge

    def mappings(self) -> list[DmaMapping]:
        """All mappings, by IOVA."""
        found = self._domain().mappings
        return [DmaMapping(one.iova, one.length, one.file, one.offset, one.access) for one in found]

    def iova_ranges(self) -> list[tuple[int, int]]:
        """VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: (first, last) of the IOVAs that can be mapped."""
        domain = self._domain()
        ranges = []
        first = 0
        for reserved_first, reserved_last in domain.reserved:
            ranges.append((first, reserved_first - 1))
            first = reserved_last + 1
        return [*ranges, (first, domain.aperture - 1)]
