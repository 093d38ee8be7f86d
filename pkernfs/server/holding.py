"""The verbs about guests' memory as files: making it, and holding it while nobody maps it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import trio

from pkernfs import api
from pkernfs.errors import FsError, PkernfsError
from pkernfs.format import ROOT_PGTABLES_INO, Ino
from pkernfs.fs.facts import file_facts, held_facts
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.fs.paths import search
from pkernfs.fs.ram import create_ram
from pkernfs.fs.transaction import Transaction
from pkernfs.iommu.records import Records
from pkernfs.iommu.replies import record_reply, replayed
from pkernfs.processes import NoProcError
from pkernfs.server.control import Handler, inode_of
from pkernfs.server.iommu import file_name
from pkernfs.server.space import may_wait, wait_for_space
from pkernfs.server.threads import in_thread
from pkernfs.server.writers import writer_of

STEP: Final = 0.005  #: seconds of a search, after which other requests are served


def _make(fs: Filesystem, request: api.CreateRam) -> Ino:
    """Make a guest's memory, once."""
    again = replayed(fs, request.key)
    if again is not None:
        return Ino(again)

    def executed(tx: Transaction, ino: Ino) -> None:
        record_reply(tx, Records(fs.volume, ROOT_PGTABLES_INO), request.key, ino)

    return create_ram(
        fs,
        inode_of(request),
        file_name(request.name),
        request.size,
        request.mode,
        Caller(request.owner, request.group),
        fragmented=request.fragmented,
        executed=executed,
    )


async def _held_files(fs: Filesystem) -> api.HeldFiles:
    """All that are held, with a name; others are served meanwhile."""
    found: dict[int, api.HeldFile] = {}
    names: dict[int, list[bytes]] = {}
    begun = trio.current_time()

    async def rest() -> None:
        nonlocal begun
        if trio.current_time() - begun > STEP:
            await trio.lowlevel.checkpoint()
            begun = trio.current_time()

    for one in fs.holds.all():
        held = held_facts(fs, one, fs.getattr(one)) if one is not None else None
        if one is not None and held is not None:
            found[one] = api.HeldFile(ino=one, file=None, since=held.since, reason=held.reason)
        await rest()
    for _ in search(fs.volume, found, names) if found else ():
        if len(names) == len(found):
            break
        await rest()
    for ino, paths in names.items():
        found[ino].file = os.fsdecode(paths[0]).lstrip("/")
    return api.HeldFiles(files=[found[ino] for ino in sorted(found)])


def holding_verbs(
    fs: Filesystem, device: str, invalidate: Callable[[int], None], invalidate_name: Callable[[int, bytes], None]
) -> dict[type[api.Request[Any]], Handler]:
    """The verbs of the mount ``device``, MAJOR:MINOR; the other arguments are those of ``verbs.verbs``."""
    number = os.makedev(*map(int, device.split(":")))

    def flush(ino: int) -> None:
        """Have the kernel write back what it has of a file, and drop it; from a thread, as the server does the rest."""
        with suppress(FileNotFoundError):  # the kernel does not know it: nothing is cached
            invalidate(ino)

    def check_no_writer(ino: int) -> None:
        """From a thread, too.

        Who has it open for writing would lose what it writes from now on; and so would a process that stores into a
        mapping, without a word.
        """
        with suppress(NoProcError):
            writer = writer_of(number, ino)
            if writer is not None:
                raise FsError(errno.EBUSY, f"inode {ino} is open for writing, by {writer}")
        flush(ino)

    async def create(request: api.CreateRam) -> api.FileInfo:
        def make() -> Ino:
            with fs.volume.allocator.ahead.in_steps():
                return _make(fs, request)

        try:
            ino = make()
        except PkernfsError as error:
            if not may_wait(error):
                raise
            ino = await wait_for_space(fs, error, make, lambda: None)
        name = file_name(request.name)
        await in_thread(invalidate_name, request.ino, name)
        return file_facts(fs, ino)

    async def hold(request: api.Hold) -> api.FileInfo:
        ino = inode_of(request)
        if ino in fs.holds.coming:
            raise FsError(errno.EBUSY, f"inode {ino} is about to be held by somebody else")
        fs.holds.coming.add(ino)
        try:
            await in_thread(check_no_writer, ino)
            fs.holds.hold(ino, request.reason)
        finally:
            fs.holds.coming.discard(ino)
        await in_thread(flush, ino)
        return file_facts(fs, ino)

    async def release(request: api.Release) -> api.FileInfo:
        ino = inode_of(request)
        fs.holds.release(ino)
        await in_thread(flush, ino)
        return file_facts(fs, ino)

    async def holds(_: api.Holds) -> api.HeldFiles:
        return await _held_files(fs)

    return {api.CreateRam: create, api.Hold: hold, api.Release: release, api.Holds: holds}
