"""Holding the files of a saved guest: its RAM is mapped by nobody then, and an rm would take it.

Where they are in no mount, or this user may not hold them (only root may), or the mount does not answer, a guest is
saved and resumed all the same: the log says what is not held.
"""

import logging
from pathlib import Path

from pkernfs import client
from pkernfs.errors import PkernfsError, printable

log = logging.getLogger(__name__)

REASON = 255  #: bytes at most


def hold(path: Path, reason: str) -> None:
    """Hold a file of a mount."""
    if client.mount_of(str(path)) is None:
        return
    text = printable(reason).encode()[:REASON].decode(errors="ignore")
    try:
        client.hold(str(path), text)
    except PkernfsError as error:
        log.warning("not held: %s", error)


def release(path: Path) -> None:
    """Release a file of a mount, if it is held."""
    if client.mount_of(str(path)) is None:
        return
    try:
        if client.file(str(path)).held is not None:
            client.release(str(path))
    except PkernfsError as error:
        log.warning("not released: %s", error)
