"""Which mappings of which domains name a file: what its pins are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.format import PAGE, Ino, Iova, Mapping
from pkernfs.fs.guard import pins
from pkernfs.fs.volume import Volume
from pkernfs.iommu.awaiting import of_file
from pkernfs.iommu.directory import domains
from pkernfs.iommu.records import Records


class Pin(NamedTuple):
    """One mapping of a file."""

    domain: int  #: inode
    name: str | None  #: of the domain, in iommu/; None: it is about to be freed
    iova: Iova
    mapping: Mapping


def pins_of(volume: Volume, ino: Ino) -> Iterator[Pin]:
    """The mappings that name file ``ino``, by domain and IOVA.  Raises CorruptError.

    There is no index from a file to its mappings: all domains are read, up to the last pin.  That is for messages and
    facts; whether a file is pinned at all is counted in its inode.
    """
    left = pins(volume.inode(ino))
    left -= len(of_file(volume, ino)) if left else 0
    if not left:
        return
    for name, domain in domains(volume):
        for page, mapping in Records(volume, domain).mappings():
            if mapping.ino == ino:
                yield Pin(domain, name, Iova(page * PAGE), mapping)
                left -= 1
                if not left:
                    return
