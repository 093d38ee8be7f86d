"""The control verb "iommu": one function for each operation, from the request to what --json prints."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from pkernfs.errors import FsError, UsageError
from pkernfs.format import IOMMU_INO, ROOT_PGTABLES_INO
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.iommu import devices, domain, mapping, pci, reclaim, replace, views
from pkernfs.iommu.audit import Audit
from pkernfs.iommu.directory import called, name_of
from pkernfs.server.control import Verb

STEP = 0.005  #: seconds of an audit after which other requests are served
TRIES = 5  #: audits of a mount that changes meanwhile


class Words:
    """A request's words, checked."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request

    def number(self, name: str, default: int | None = None, end: int = 1 << 64) -> int:
        """A number from 0 up to ``end``, without it.  Raises FsError(EINVAL)."""
        value = self.request.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
            raise FsError(errno.EINVAL, f'"{name}": expected a number from 0 to {end - 1:#x}, found {value!r}')
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string.  Raises FsError(EINVAL)."""
        value = self.request.get(name, default)
        if not isinstance(value, str):
            raise FsError(errno.EINVAL, f'"{name}": expected a string, found {value!r}')
        return value

    def flag(self, name: str) -> bool:
        """A boolean that need not be there."""
        return self.request.get(name) is True

    @property
    def ino(self) -> int:
        """The inode that the request is about."""
        return self.number("ino", end=1 << 60)

    @property
    def name(self) -> int:
        """What names the request, so that it is not executed twice; 0: nothing does."""
        return self.number("request", 0)

    @property
    def file_name(self) -> bytes:
        """A name of a file.  Raises FsError(EINVAL)."""
        try:
            return os.fsencode(self.text("name"))
        except UnicodeEncodeError:
            raise FsError(errno.EINVAL, f'"name": {self.text("name")!r} is no name of a file') from None

    @property
    def device(self) -> int:
        """A requester."""
        try:
            return pci.parse(self.text("device"))
        except UsageError as error:
            raise FsError(errno.EINVAL, str(error)) from None


def _create(fs: Filesystem, words: Words) -> dict[str, Any]:
    if words.ino != IOMMU_INO:
        raise FsError(errno.EINVAL, "domains are files in the directory iommu of the mount")
    name = words.text("name")
    levels = words.number("levels", 4, 256)
    caller = Caller(os.getuid(), os.getgid())
    ino = domain.create(fs, words.file_name, words.text("format", "vtd"), levels, caller, words.name)
    return views.domain_facts(fs, ino, name)


def _destroy(fs: Filesystem, words: Words) -> dict[str, Any]:
    domain.destroy(fs, words.ino, words.name)
    return {"destroyed": words.ino}


def _stale(fs: Filesystem, ino: int) -> list[dict[str, Any]]:
    return views.pending_facts(fs, domain.Domain(fs.volume, ino).record.id)


def _map(fs: Filesystem, words: Words) -> dict[str, Any]:
    file_ino = words.number("file_ino", end=1 << 60)
    offset = words.number("offset", 0)
    access = words.text("access", "rw")
    done = mapping.map_file(
        fs,
        words.ino,
        words.number("iova"),
        file_ino,
        offset,
        words.number("length", 0),
        access,
        live_update=words.flag("live_update"),
        request=words.name,
    )
    facts = {**done._asdict(), "ino": file_ino, "offset": offset, "access": access}
    facts["entries"] = facts.pop("stored")
    return {**facts, "stale": [] if words.flag("live_update") else _stale(fs, words.ino)}


def _unmap(fs: Filesystem, words: Words) -> dict[str, Any]:
    iova, length = words.number("iova"), words.number("length")
    unmapped = mapping.unmap(fs, words.ino, iova, length, words.name)
    return {"iova": iova, "length": length, "unmapped": unmapped, "stale": _stale(fs, words.ino)}


def _attach(fs: Filesystem, words: Words) -> dict[str, Any]:
    devices.attach(fs, words.ino, words.device, persistent=words.flag("persistent"), request=words.name)
    attachment = views.attachments_of(fs)[words.device]
    return views.device_facts(words.device, attachment, called(fs.volume, attachment.domain))


def _detach(fs: Filesystem, words: Words) -> dict[str, Any]:
    devices.detach(fs, words.device, words.name)
    return {"device": pci.text(words.device), "stale": views.pending_facts(fs)}


def _root(fs: Filesystem, words: Words) -> dict[str, Any]:
    form, segment = words.text("format", "vtd"), words.number("segment", 0, 1 << 16)
    devices.root_table(fs, form, segment, words.name)
    return views.root(fs, form, segment)


def _walk(fs: Filesystem, words: Words) -> dict[str, Any]:
    requester = words.device if words.request.get("device") is not None else None
    return views.walk(fs, requester, words.ino, words.number("iova"))


def _replace(fs: Filesystem, words: Words) -> dict[str, Any]:
    leaf = words.number("leaf", 0, 256) if words.request.get("leaf") is not None else 0
    done = replace.replace(fs, words.ino, leaf, rebuild=words.flag("rebuild"), request=words.name)
    figures = {"tables_before": done.before, "tables_after": done.after, "compared": done.compared}
    return {**figures, "stale": _stale(fs, words.ino)}


def _iotlb_needed(fs: Filesystem, words: Words) -> dict[str, Any]:
    if not words.flag("done"):
        return views.invalidations(fs)
    token = words.number("token", 0)
    freed = reclaim.acknowledge(fs, token, words.name)
    return {**views.invalidations(fs), "freed": freed}


OPERATIONS: dict[str, Callable[[Filesystem, Words], dict[str, Any]]] = {
    "create": _create,
    "destroy": _destroy,
    "map": _map,
    "unmap": _unmap,
    "attach": _attach,
    "detach": _detach,
    "root": _root,
    "list": lambda fs, words: views.list_all(fs),
    "walk": _walk,
    "replace": _replace,
    "iotlb-needed": _iotlb_needed,
}


#: Operations that change nothing.
LOOKING = {"list", "walk"}


async def _audit(fs: Filesystem) -> dict[str, Any]:
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
            return audit.facts()
    return views.audit(fs)


def _name(fs: Filesystem, op: Any, words: Words) -> bytes | None:
    """The name in iommu/ that an operation makes or removes."""
    if op == "create":
        return words.file_name
    return name_of(fs.volume, words.ino) if op == "destroy" else None


def iommu(fs: Filesystem, invalidate: Callable[[int], None], invalidate_name: Callable[[int, bytes], None]) -> Verb:
    """The verb.

    ``invalidate(ino)`` makes the kernel drop what it has cached of an inode, ``invalidate_name(directory, name)`` of a
    name (also that it is not there) and of the directory; both may block until requests have been answered.
    """

    def drop(inos: set[int]) -> None:
        for ino in inos:
            with suppress(FileNotFoundError):  # the kernel does not know it: nothing is cached
                invalidate(ino)

    async def call(request: dict[str, Any]) -> dict[str, Any]:
        op = request.get("op")
        if op == "audit":
            return await _audit(fs)
        operation = OPERATIONS.get(op) if isinstance(op, str) else None
        if operation is None:
            raise FsError(errno.EOPNOTSUPP, f'"op": expected one of {", ".join((*OPERATIONS, "audit"))}, found {op!r}')
        words = Words(request)
        name = _name(fs, op, words)
        result = operation(fs, words)
        if name is not None:
            await trio.to_thread.run_sync(invalidate_name, IOMMU_INO, name, abandon_on_cancel=True)
        if op not in LOOKING:
            inos = {ROOT_PGTABLES_INO, words.ino}
            if op == "map":
                inos.add(words.number("file_ino"))  # from now on devices change it behind the kernel's back
            await trio.to_thread.run_sync(drop, inos, abandon_on_cancel=True)
        return result

    return call
