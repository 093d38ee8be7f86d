"""The verbs about page tables: each is one function from the request to the reply."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from pkernfs import api
from pkernfs.errors import FsError
from pkernfs.format import IOMMU_INO, ROOT_PGTABLES_INO, Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.iommu import devices, domain, mapping, names, pci, reclaim, replace, views
from pkernfs.iommu.audit import Audit
from pkernfs.iommu.directory import called, name_of
from pkernfs.iommu.walk import walk, walk_device
from pkernfs.server.control import Handler, inode_of
from pkernfs.server.threads import in_thread

STEP = 0.005  #: seconds of an audit, or of a search for names, after which other requests are served
TRIES = 5  #: audits of a mount that changes meanwhile


def file_name(name: str) -> bytes:
    """The bytes of a name.  Raises FsError(EINVAL)."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        raise FsError(errno.EINVAL, '"name": expected the name of a file, found half a character') from None


def _pending(fs: Filesystem, ino: Ino) -> list[api.Invalidation]:
    """What hardware must invalidate of a domain."""
    return views.pending_facts(fs, domain.Domain(fs.volume, ino).record.id)


def _create(fs: Filesystem, request: api.IommuCreate) -> api.Domain:
    if request.ino != IOMMU_INO:
        raise FsError(errno.EINVAL, "domains are files in the directory iommu of the mount")
    caller = Caller(os.getuid(), os.getgid())
    ino = domain.create(fs, file_name(request.name), request.format, request.levels, caller, request.key)
    return views.domain_facts(fs, ino, request.name)


def _map(fs: Filesystem, request: api.IommuMap) -> api.Mapped:
    ino = inode_of(request)
    done = mapping.map_file(
        fs,
        ino,
        request.iova,
        Ino(request.file_ino),
        request.offset,
        request.length,
        request.access,
        live_update=request.live_update,
        key=request.key,
    )
    return api.Mapped(
        iova=done.iova,
        length=done.length,
        ino=request.file_ino,
        offset=request.offset,
        access=request.access,
        entries=done.stored,
        invalidations=[] if request.live_update else _pending(fs, ino),
    )


def _unmap(fs: Filesystem, request: api.IommuUnmap) -> api.Unmapped:
    ino = inode_of(request)
    unmapped = mapping.unmap(fs, ino, request.iova, request.length, request.key)
    return api.Unmapped(iova=request.iova, length=request.length, unmapped=unmapped, invalidations=_pending(fs, ino))


def _attach(fs: Filesystem, request: api.IommuAttach) -> api.Device:
    requester = pci.parse(request.device)
    devices.attach(fs, inode_of(request), requester, persistent=request.persistent, key=request.key)
    attachment = views.attachments_of(fs)[requester]
    return views.device_facts(requester, attachment, called(fs.volume, attachment.domain))


def _detach(fs: Filesystem, request: api.IommuDetach) -> api.Detached:
    requester = pci.parse(request.device)
    devices.detach(fs, requester, request.key)
    return api.Detached(device=pci.text(requester), invalidations=views.pending_facts(fs))


def _root(fs: Filesystem, request: api.IommuRoot) -> api.RootTable:
    devices.root_table(fs, request.format, request.segment, request.key)
    return views.root(fs, request.format, request.segment)


def _walk(fs: Filesystem, request: api.IommuWalk) -> api.Walk:
    if request.device is not None:
        return walk_device(fs, pci.parse(request.device), request.iova)
    return walk(fs, inode_of(request), request.iova)


def _replace(fs: Filesystem, request: api.IommuReplace) -> api.Replaced:
    ino = inode_of(request)
    done = replace.replace(fs, ino, request.leaf or 0, rebuild=request.rebuild, key=request.key)
    return api.Replaced(
        tables_before=done.before,
        tables_after=done.after,
        compared=done.compared,
        invalidations=_pending(fs, ino),
    )


def _invalidations(fs: Filesystem, request: api.IommuInvalidations) -> api.Invalidations:
    if request.acknowledge is None:
        return views.invalidations(fs)
    before = views.kept_bytes(fs)
    freed = reclaim.acknowledge(fs, request.acknowledge, request.key)
    return views.invalidations(fs, freed, before)


def _destroy(fs: Filesystem, request: api.IommuDestroy) -> api.Destroyed:
    domain.destroy(fs, inode_of(request), request.key)
    return api.Destroyed(destroyed=request.ino)


OPERATIONS: dict[type[api.WorkerRequest[Any]], Callable[[Filesystem, Any], object]] = {
    api.IommuCreate: _create,
    api.IommuDestroy: _destroy,
    api.IommuMap: _map,
    api.IommuUnmap: _unmap,
    api.IommuAttach: _attach,
    api.IommuDetach: _detach,
    api.IommuReplace: _replace,
    api.IommuInvalidations: _invalidations,
    api.IommuRoot: _root,
    api.IommuList: lambda fs, _: views.list_all(fs),
    api.IommuWalk: _walk,
}


async def _audit(fs: Filesystem) -> api.Audited:
    """An audit, with other requests in between; again when something changed meanwhile, and at last without them."""
    for _ in range(TRIES):
        sequence = fs.volume.journal.sequence
        audit = Audit(fs)
        begun = trio.current_time()
        for _ in audit.run():
            if trio.current_time() - begun > STEP:
                await trio.lowlevel.checkpoint()
                begun = trio.current_time()
                if fs.volume.journal.sequence != sequence:
                    break
        else:
            return views.audited(audit)
    return views.audit(fs)


def _name(fs: Filesystem, request: api.WorkerRequest[Any]) -> bytes | None:
    """The name in iommu/ that a request makes or removes."""
    if isinstance(request, api.IommuCreate):
        return file_name(request.name)
    if isinstance(request, api.IommuDestroy):
        return name_of(fs.volume, Ino(request.ino))
    return None


def iommu_verbs(
    fs: Filesystem, invalidate: Callable[[int], None], invalidate_name: Callable[[int, bytes], None]
) -> dict[type[api.Request[Any]], Handler]:
    """The verbs of a mount.

    ``invalidate(ino)`` makes the kernel drop what it has cached of an inode, ``invalidate_name(directory, name)`` of a
    name (also that it is not there) and of the directory; both may block until requests have been answered.
    """

    def drop(inos: set[int], name: bytes | None) -> None:
        if name is not None:
            invalidate_name(IOMMU_INO, name)
        for ino in inos:
            with suppress(FileNotFoundError):  # the kernel does not know it: nothing is cached
                invalidate(ino)

    async def change(request: api.WorkerRequest[Any]) -> object:
        name = _name(fs, request)  # before: a domain that is destroyed has none
        result = OPERATIONS[type(request)](fs, request)
        inos = {ROOT_PGTABLES_INO, request.ino}
        if isinstance(request, api.IommuMap):
            inos.add(request.file_ino)  # from now on devices change it behind the kernel's back
        await in_thread(drop, inos, name)
        return result

    async def answer(request: api.WorkerRequest[Any]) -> object:
        reply = OPERATIONS[type(request)](fs, request)
        if isinstance(reply, api.Domains | api.Walk):
            begun = trio.current_time()
            for _ in names.in_steps(fs, reply):
                if trio.current_time() - begun > STEP:
                    await trio.lowlevel.checkpoint()
                    begun = trio.current_time()
        return reply

    async def audit(_: api.IommuAudit) -> api.Audited:
        return await _audit(fs)

    changing = {verb.request for verb in api.VERBS.values() if verb.changes}
    return {api.IommuAudit: audit, **{request: change if request in changing else answer for request in OPERATIONS}}
