"""A domain as VFIO's container: the calls of VFIO_TYPE1v2_IOMMU, for programs that know those.

    container = Container("/mnt/pkernfs/iommu/dom-0")
    container.map_dma(0x100000, "/mnt/pkernfs/guest-ram", size=64 << 20)
    ... a restart, of whatever ...
    container = Container("/mnt/pkernfs/iommu/dom-0")       all mappings are there
    container.map_dma(0x100000, "/mnt/pkernfs/guest-ram", size=64 << 20, live_update=True)      which this verifies

Instead of a virtual address a mapping names a file of the same mount.  Raises OSError with VFIO's errno: EEXIST for an
overlap, EINVAL for what is not aligned or out of range, ENOENT where nothing is mapped, ENOSPC, EXDEV.
"""

from __future__ import annotations

import errno
import os
import secrets
from typing import Any, Final, NamedTuple

from pkernfs.client import control
from pkernfs.errors import PkernfsError
from pkernfs.format import PAGE

ACCESS: Final = {(True, True): "rw", (True, False): "ro", (False, True): "wo"}


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

    def _ask(self, op: str, **words: Any) -> dict[str, Any]:
        try:
            return control(self.path, "iommu", op=op, request=secrets.randbits(63) + 1, **words)
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
        if os.stat(file).st_dev != os.stat(self.path).st_dev:
            raise OSError(errno.EXDEV, f"{os.fspath(file)}: expected a file of the mount that {self.path} is in")
        words = {"file_ino": os.stat(file).st_ino, "access": ACCESS.get((read, write), "")}
        self._ask("map", iova=iova, offset=offset, length=size, live_update=live_update, **words)

    def unmap_dma(self, iova: int, size: int) -> int:
        """VFIO_IOMMU_UNMAP_DMA, of parts of mappings too; how many bytes were mapped."""
        unmapped: int = self._ask("unmap", iova=iova, length=size)["unmapped"]
        return unmapped

    def _facts(self) -> dict[str, Any]:
        ino = os.stat(self.path).st_ino
        for facts in self._ask("list")["domains"]:
            if facts["ino"] == ino:
                return dict(facts)
        raise OSError(errno.EINVAL, f"{self.path}: expected a domain, a file in iommu/")

    def iotlb_needed(self) -> tuple[list[dict[str, Any]], int]:
        """What hardware must forget after changes, as `pkernfs iommu iotlb-needed --json` has it, and the list's token.

        VFIO invalidates itself; here whoever drives the IOMMU does, and then confirms it with ``invalidated``.
        """
        found = self._ask("iotlb-needed")
        return found["stale"], found["token"]

    def invalidated(self, token: int) -> None:
        """All of the list with this token was invalidated.  Raises OSError(EAGAIN) when there is more by now."""
        self._ask("iotlb-needed", done=True, token=token)

    def mappings(self) -> list[DmaMapping]:
        """All mappings, by IOVA."""
        found = self._facts()["mappings"]
        return [DmaMapping(one["iova"], one["length"], one["file"], one["offset"], one["access"]) for one in found]

    def iova_ranges(self) -> list[tuple[int, int]]:
        """VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: (first, last) of the IOVAs that can be mapped."""
        ranges = []
        first = 0
        facts = self._facts()
        for reserved_first, reserved_last in facts["reserved"]:
            ranges.append((first, reserved_first - 1))
            first = reserved_last + 1
        return [*ranges, (first, facts["aperture"] - 1)]
