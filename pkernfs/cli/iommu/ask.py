"""How the verbs of `pkernfs iommu` ask the server, and what is said of its answers."""

from __future__ import annotations

import secrets
from typing import Any

from pkernfs.cli.iommu.arguments import FORMATS
from pkernfs.cli.text import human, printable

INVALIDATIONS = "pkernfs iommu invalidations"


def ask(path: str, op: str, **arguments: Any) -> dict[str, Any]:
    """One question to the server of ``path``, with a number that tells it from one that is asked again.

    Raises UsageError, ControlError.
    """
    from pkernfs.client import control

    request = 1 + secrets.randbelow((1 << 64) - 1)
    return control(path, "iommu", timeout=None, op=op, request=request, **arguments)


def reminder(result: dict[str, Any], path: str = "") -> list[str]:
    """The line that a change ends with when hardware may have cached what it took away; ``path``: in which mount."""
    from pkernfs.client import mount_of

    if not result["stale"]:
        return []
    mount = mount_of(path) if path else None
    return [f"invalidations are pending: {INVALIDATIONS} {printable(mount.mountpoint) if mount else 'MOUNT'}"]


def about(domain: dict[str, Any]) -> str:
    """A domain's tables, in a line."""
    parts = [FORMATS[domain["format"]], f"{domain['levels']} levels", f"{human(domain['aperture'])} of addresses"]
    parts += [f"id {domain['id']}"] if domain["id"] else []
    return ", ".join(parts)
