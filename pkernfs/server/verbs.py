"""What the control socket can be asked: each verb is one function from the request to the result."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import trio

from pkernfs.errors import CorruptError, FsError
from pkernfs.fs.facts import file_facts, region_facts
from pkernfs.fsck.scrub import scrub_step
from pkernfs.server.control import Verb
from pkernfs.server.iommu import iommu
from pkernfs.server.operations import Operations


def _ino(request: dict[str, Any]) -> int:
    ino = request.get("ino")
    if not isinstance(ino, int) or not 0 < ino < 1 << 60:
        raise FsError(errno.EINVAL, f'"ino": expected an inode number, found {ino!r}')
    return ino


def verbs(
    operations: Operations, invalidate: Callable[[int], None], invalidate_name: Callable[[int, bytes], None]
) -> dict[str, Verb]:
    """The verbs of a mount.

    ``invalidate(ino)`` makes the kernel drop what it has cached of an inode, ``invalidate_name(directory, name)`` of a
    name and its directory.  Both may block until requests have been answered.
    """
    fs = operations.fs

    async def info(request: dict[str, Any]) -> dict[str, Any]:
        return {**region_facts(fs), "server": os.getpid()}

    async def file(request: dict[str, Any]) -> dict[str, Any]:
        return {"region": fs.region.path, **file_facts(fs, _ino(request))}

    async def scrub(request: dict[str, Any]) -> dict[str, Any]:
        """Verify some checksums from a page on; the caller goes on with "next"."""
        page = request.get("page")
        if not isinstance(page, int):
            raise FsError(errno.EINVAL, f'"page": expected a number, found {page!r}')
        step = scrub_step(fs, page)
        return {**step._asdict(), "problems": [damage._asdict() for damage in step.problems]}

    async def direct(request: dict[str, Any]) -> dict[str, Any]:
        """Mark a file as mapped directly from the region, or ("on": false) as no longer so."""
        ino, on = _ino(request), request.get("on") is not False
        if on and operations.enable_writeback_cache:
            raise FsError(errno.EOPNOTSUPP, "a direct mapping of a file on a mount with -o writeback: mount it without")
        fs.attributes.set_direct(ino, on)
        try:
            # In a thread: the kernel waits for dirty pages to be written, which this server must do meanwhile.
            await trio.to_thread.run_sync(invalidate, ino, abandon_on_cancel=True)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel does not know the inode: nothing is cached
                raise
        return await file(request)

    async def quota(request: dict[str, Any]) -> dict[str, Any]:
        """The quota of a directory (or what is above it), after setting it to "limit" bytes if that is there."""
        ino = _ino(request)
        limit = request.get("limit")
        if limit is None:
            return fs.quotas.get(ino)._asdict()
        if not isinstance(limit, int) or not 0 <= limit < 1 << 63:
            raise FsError(errno.EINVAL, f'"limit": expected bytes, found {limit!r}')
        return fs.quotas.set(ino, limit)._asdict()

    def noting(verb: Verb) -> Verb:
        async def call(request: dict[str, Any]) -> dict[str, Any]:
            try:
                return await verb(request)
            except CorruptError as error:
                fs.volume.damage.note(error)
                raise

        return call

    known: dict[str, Verb] = {"info": info, "file": file, "direct": direct, "scrub": scrub, "quota": quota}
    known["iommu"] = iommu(fs, invalidate, invalidate_name)
    return {name: noting(verb) for name, verb in known.items()}
