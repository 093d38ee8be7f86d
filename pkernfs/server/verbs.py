"""What the worker's control socket can be asked: each verb is one function from the request to the reply."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from msgspec.structs import asdict

from pkernfs import api
from pkernfs.errors import CorruptError, FsError, MappedError
from pkernfs.format import FLAG_REGION_MAPPED, Ino, PageNo
from pkernfs.fs.facts import count_others, file_facts, region_facts
from pkernfs.fsck.scrub import scrub_step
from pkernfs.processes import NoProcError
from pkernfs.server.control import Handler, inode_of
from pkernfs.server.holding import holding_verbs
from pkernfs.server.iommu import STEP, iommu_verbs
from pkernfs.server.mappers import mappers
from pkernfs.server.operations import Operations
from pkernfs.server.threads import in_thread


def verbs(
    operations: Operations,
    device: str,
    invalidate: Callable[[int], None],
    invalidate_name: Callable[[int, bytes], None],
) -> dict[type[api.Request[Any]], Handler]:
    """The verbs of the mount ``device``, MAJOR:MINOR.

    ``invalidate(ino)`` makes the kernel drop what it has cached of an inode, ``invalidate_name(directory, name)`` of a
    name and its directory.  Both may block until requests have been answered.
    """
    fs = operations.fs

    async def info(_: api.Info) -> api.MountInfo:
        return api.MountInfo(**asdict(region_facts(fs)), server=os.getpid())

    async def file(request: api.WorkerRequest[api.FileInfo]) -> api.FileInfo:
        facts = file_facts(fs, inode_of(request))
        with suppress(NoProcError):
            facts.mapped_by = await mappers(fs, device, inode_of(request))
        return facts

    async def scrub(request: api.Scrub) -> api.Scrubbed:
        return scrub_step(fs, PageNo(request.page)).reply()

    async def direct(request: api.Direct) -> api.FileInfo:
        ino = inode_of(request)
        if request.on and operations.enable_writeback_cache:
            raise FsError(errno.EOPNOTSUPP, "a direct mapping of a file on a mount with -o writeback: mount it without")
        before = bool(fs.getattr(ino).flags & FLAG_REGION_MAPPED)
        await check_not_mapped(ino, "path" if request.on else "direct")
        fs.attributes.set_region_mapped(ino, request.on)
        try:
            # In a thread: the kernel waits for dirty pages to be written, which this server must do meanwhile.
            await in_thread(invalidate, ino)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel does not know the inode: nothing is cached
                raise
        if request.on:
            # From now on no open allows a shared mapping; one that was made meanwhile has pages of its own.
            try:
                await check_not_mapped(ino, "path")
            except FsError:
                fs.attributes.set_region_mapped(ino, before)
                raise
        return await file(request)

    async def check_not_mapped(ino: Ino, way: str) -> None:
        """Raise MappedError when a process maps the file in this way.  Raises NoProcError."""
        for one in await mappers(fs, device, ino):
            if one.map == way:
                raise MappedError(ino, one.text, directly=way == "direct")

    async def others(request: api.GetOthers) -> api.Others:
        found = api.Others(files=0, path="")
        begun = trio.current_time()
        for _ in count_others(fs, inode_of(request), found):
            if trio.current_time() - begun > STEP:
                await trio.lowlevel.checkpoint()
                begun = trio.current_time()
        return found

    async def quota(request: api.Quota) -> api.QuotaUse:
        ino, limit = inode_of(request), request.limit
        return api.QuotaUse(*(fs.quotas.get(ino) if limit is None else fs.quotas.set(ino, limit)))

    def noting(handler: Handler) -> Handler:
        async def call(request: api.Request[Any]) -> object:
            try:
                return await handler(request)
            except CorruptError as error:
                fs.volume.damage.note(error)
                raise
            except FsError as error:
                if error.errno == errno.ENOSPC:
                    error.hint = error.hint or fs.guard.how_to_release()
                raise
            finally:
                if fs.reclaimer.pending:  # an unmap or an acknowledgement has left something to be freed
                    operations.housekeeping.wake()

        return call

    known: dict[type[api.Request[Any]], Handler] = {
        api.Info: info,
        api.File: file,
        api.Direct: direct,
        api.GetOthers: others,
        api.Scrub: scrub,
        api.Quota: quota,
        **holding_verbs(fs, device, invalidate, invalidate_name),
        **iommu_verbs(fs, invalidate, invalidate_name),
    }
    return {request: noting(handler) for request, handler in known.items()}
