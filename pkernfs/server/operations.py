"""The FUSE adapter: translates each request to one call of Filesystem, and its answer back.  It decides nothing.

What handlers have in common is in requests.py; what the kernel may keep of a reply, in attributes.py.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from typing import Any

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from pkernfs.errors import CorruptError, FsError, PkernfsError, quoted
from pkernfs.format import Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.names import Caller
from pkernfs.server.attributes import Attributes, requested, statvfs
from pkernfs.server.handles import INO, KILL_PRIV, NOATIME
from pkernfs.server.housekeeping import Housekeeping
from pkernfs.server.replay import Replay
from pkernfs.server.requests import Requests, handler
from pkernfs.server.space import ShortWrites
from pkernfs.server.xattrs import FACTS, Facts, check_changeable, check_namespace, visible

log = logging.getLogger("pkernfs")


class Operations(pyfuse3.Operations):
    """pyfuse3's handlers over one Filesystem."""

    supports_dot_lookup = True
    enable_acl = False

    def __init__(
        self,
        fs: Filesystem,
        facts: Callable[[], dict[str, object]],
        counters: memoryview | None = None,
        *,
        writeback: bool = False,
    ) -> None:
        """``facts``: of the mount, see xattrs.py.  ``counters``: see stats.py.

        ``writeback``: the kernel holds back what is written, and has the say on size, mtime and ctime of files.
        """
        super().__init__()
        self.enable_writeback_cache = writeback
        fs.times.on_write = not writeback
        self.fs = fs
        self.facts = Facts(fs, facts)
        self.attributes = Attributes(fs, writeback=writeback)
        self.short_writes = ShortWrites(fs, strict=writeback)
        self.housekeeping = Housekeeping(fs)
        self.replay = Replay(fs, self.attributes)
        self.requests = Requests(counters)

    # -- attributes -----------------------------------------------------------------------------------------------

    @handler
    def lookup(self, parent_inode: Ino, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            return self.attributes.found(self.fs.lookup(parent_inode, name))
        except PkernfsError as error:
            if error.errno != errno.ENOENT:
                raise
            return self.attributes.missing()

    @handler
    def getattr(self, inode: Ino, ctx: RequestContext) -> EntryAttributes:
        return self.attributes.of(inode, self.fs.getattr(inode))

    @handler
    def setattr(
        self, inode: Ino, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        change = requested(attr, fields)
        if change == SetAttr(ctime=change.ctime):
            # chown(-1, -1), which clears set-user-ID bits as any change of owner does.
            change = change._replace(uid=self.fs.getattr(inode).uid)
        with self.fs.volume.allocator.ahead.in_steps():
            return self.attributes.of(inode, self.fs.setattr(inode, change, privileged=ctx.uid == 0))

    async def forget(self, inode_list: Any) -> None:
        for ino, count in inode_list:
            try:
                self.fs.reclaimer.forget(ino, count)
                if not self.fs.lookups[ino]:
                    self.short_writes.drop(ino)
            except PkernfsError as error:
                self.fs.volume.damage.complain(error)
            except Exception:
                log.exception("a bug: FORGET of inode %d failed", ino)
        if self.fs.reclaimer.pending:
            self.housekeeping.wake()

    # -- names ----------------------------------------------------------------------------------------------------

    def _made(self, parent: Ino, name: bytes, mode: int, ctx: RequestContext, **what: Any) -> EntryAttributes:
        return self.attributes.found(self.fs.create(parent, name, mode, Caller(ctx.uid, ctx.gid), **what))

    @handler
    def mknod(self, parent_inode: Ino, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return self._made(parent_inode, name, mode, ctx, rdev=rdev)

    @handler
    def mkdir(self, parent_inode: Ino, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._made(parent_inode, name, stat.S_IFDIR | mode, ctx)

    @handler
    def symlink(self, parent_inode: Ino, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._made(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target)

    @handler
    def create(
        self, parent_inode: Ino, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self.fs.attributes.check_open(parent_inode, flags)
        ino = self.fs.create(parent_inode, name, stat.S_IFREG | mode, Caller(ctx.uid, ctx.gid))
        return self.attributes.opened(ino, flags, ctx.uid), self.attributes.found(ino)

    @handler
    def readlink(self, inode: Ino, ctx: RequestContext) -> bytes:
        return self.fs.readlink(inode)

    @handler
    def link(self, inode: Ino, new_parent_inode: Ino, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        self.fs.link(inode, new_parent_inode, new_name)
        return self.attributes.found(inode)

    @handler
    def unlink(self, parent_inode: Ino, name: bytes, ctx: RequestContext) -> None:
        self.fs.unlink(parent_inode, name)

    @handler
    def rmdir(self, parent_inode: Ino, name: bytes, ctx: RequestContext) -> None:
        self.fs.rmdir(parent_inode, name)

    @handler
    def rename(
        self,
        parent_inode_old: Ino,
        name_old: bytes,
        parent_inode_new: Ino,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self.fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @handler
    def opendir(self, inode: Ino, ctx: RequestContext) -> int:
        return inode

    @handler
    def readdir(self, fh: Ino, start_id: int, token: ReaddirToken) -> None:
        # Cookies 1 and 2 stand for "." and "..", the cookie of an entry is its key + 3.
        reply, attributes = pyfuse3.readdir_reply, self.attributes.of
        directory = self.fs.names.directory(fh)
        if start_id == 0 and not reply(token, b".", attributes(fh, directory.inode), 1):
            return
        if start_id <= 1:
            parent = Ino(directory.inode.parent)
            if not reply(token, b"..", attributes(parent, self.fs.getattr(parent)), 2):
                return
        for entry in self.fs.readdir(fh, max(start_id - 2, 0)):
            try:
                found = attributes(entry.ino, directory.target(entry))
            except CorruptError as error:
                self.fs.volume.damage.note(error)
                continue
            if not reply(token, entry.name, found, entry.key + 3):
                return
            self.fs.lookups.add(entry.ino)

    @handler
    def releasedir(self, fh: int) -> None:
        pass

    # -- content --------------------------------------------------------------------------------------------------

    @handler
    def open(self, inode: Ino, flags: int, ctx: RequestContext) -> FileInfo:
        self.fs.attributes.check_open(inode, flags)
        if flags & os.O_TRUNC:
            self.fs.setattr(inode, SetAttr(size=0), privileged=ctx.uid == 0)
        return self.attributes.opened(inode, flags, ctx.uid)

    @handler
    def read(self, fh: int, off: int, size: int) -> Any:  # bytes, or a view of the region: pyfuse3 takes any buffer
        return self.fs.read(fh & INO, off, size, noatime=bool(fh & NOATIME))

    @handler
    def write(self, fh: int, off: int, buf: bytes) -> int:
        ino = fh & INO
        if self.short_writes.ends:
            self.short_writes.retried(ino, off)
        done = self.fs.write(ino, off, buf, kill_priv=bool(fh & KILL_PRIV))
        return done if done == len(buf) else self.short_writes.rest(ino, off, buf, done)

    @handler
    def release(self, fh: int) -> None:
        pass

    @handler
    def fsync(self, fh: int, datasync: bool) -> None:
        self.fs.region.flush()
        self.short_writes.raise_reason(fh & INO)

    @handler
    def fsyncdir(self, fh: int, datasync: bool) -> None:
        self.fs.region.flush()

    # -- extended attributes --------------------------------------------------------------------------------------

    @handler
    def getxattr(self, inode: Ino, name: bytes, ctx: RequestContext) -> bytes:
        if self.replay.hides_xattr(inode, name):
            raise FsError(errno.ENODATA, f"attribute {quoted(name)} was made by this request, which comes again")
        if name.startswith(FACTS):
            return self.facts.value(inode, name, ctx.uid)
        check_namespace(name)
        return self.fs.getxattr(inode, name)

    @handler
    def setxattr(self, inode: Ino, name: bytes, value: bytes, ctx: RequestContext) -> None:
        check_changeable(name)
        self.fs.setxattr(inode, name, value)

    @handler
    def listxattr(self, inode: Ino, ctx: RequestContext) -> list[bytes]:
        return visible(self.fs.listxattr(inode), ctx.uid)

    @handler
    def removexattr(self, inode: Ino, name: bytes, ctx: RequestContext) -> None:
        check_changeable(name)
        self.fs.removexattr(inode, name)

    # -- the whole ------------------------------------------------------------------------------------------------

    @handler
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        return statvfs(self.fs.statfs())
