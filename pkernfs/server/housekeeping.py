"""Freeing memory in the background: what an unlink, a cut or a FORGET has left to do, step by step between requests.

Each step is one transaction of bounded size (fs/reclaim.py), so that no request waits for more than one of them; what a
crash leaves undone is listed in the region, and the next worker goes on with it.
"""

from __future__ import annotations

import logging

import trio

from pkernfs.errors import PkernfsError
from pkernfs.fs.filesystem import Filesystem

log = logging.getLogger("pkernfs")


class Housekeeping:
    """Takes the steps of one filesystem."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        fs.reclaimer.in_background = True
        self._work = trio.Event()

    def wake(self) -> None:
        """There is something to do (``fs.reclaimer.pending``)."""
        self._work.set()

    async def run(self) -> None:
        """Until cancelled."""
        fs = self.fs
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while fs.reclaimer.pending:
                ino = next(iter(fs.reclaimer.pending))
                try:
                    fs.reclaimer.step()
                except PkernfsError as error:
                    fs.volume.damage.complain(error)
                except Exception:
                    log.exception("a bug: freeing inode %d failed", ino)
                await trio.lowlevel.checkpoint()
