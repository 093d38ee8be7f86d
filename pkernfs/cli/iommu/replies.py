"""What the verbs of `pkernfs iommu` say of the server's replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pkernfs.cli.iommu.arguments import FORMATS
from pkernfs.cli.text import human
from pkernfs.errors import printable

if TYPE_CHECKING:
    from pkernfs import api

INVALIDATIONS = "pkernfs iommu invalidations"


def reminder(pending: Sequence[api.Invalidation], path: str = "") -> list[str]:
    """The line that a change ends with when hardware may have cached what it took away; ``path``: in which mount."""
    from pkernfs.client import mount_of

    if not pending:
        return []
    mount = mount_of(path) if path else None
    return [f"invalidations are pending: {INVALIDATIONS} {printable(mount.mountpoint) if mount else 'MOUNT'}"]


def about(domain: api.Domain) -> str:
    """A domain's tables, in a line."""
    parts = [FORMATS[domain.format], f"{domain.levels} levels", f"{human(domain.aperture)} of addresses"]
    parts += [f"id {domain.id}"] if domain.id else []
    return ", ".join(parts)
