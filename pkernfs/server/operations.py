"""The FUSE adapter: translates each request to one call of Filesystem, and its answer back.  It decides nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from pkernfs.errors import CorruptError, PkernfsError
from pkernfs.format import BLOCK, FLAG_DIRECT, GUARDED, NAME_MAX, PAGE, Inode, checksum
from pkernfs.fs.content import OUT_OF_SPACE
from pkernfs.fs.facts import file_facts
from pkernfs.fs.filesystem import Filesystem, SetAttr
from pkernfs.fs.guard import pins
from pkernfs.fs.names import Caller
from pkernfs.server.device import REQUEST, RESENT, SETXATTR, SETXATTR_FLAGS_AT
from pkernfs.server.stats import BUGS, INDEX, SIZE

log = logging.getLogger("pkernfs")

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds.  Nothing changes attributes or names behind the kernel's back, but for files that are mapped directly.
TIMEOUT = 86400.0
#: Seconds to wait, one after the other, for the kernel to forget removed files when the space has run out.
FORGETS = (0.001, 0.004, 0.02, 0.05)
#: Bits of a file handle, beside the inode number.
KILL_PRIV = 1 << 62  #: the opener may not keep set-user-ID bits when it writes
NOATIME = 1 << 61  #: O_NOATIME
INO = NOATIME - 1
FACTS = b"user.pkernfs."
#: Requests that make an inode.
MAKING = {"mknod", "mkdir", "symlink", "create"}
#: Requests by which the kernel comes to refer to inodes, or that would fail, or do harm, when they are executed a
#: second time; and how many of their arguments tell one from another.  setxattr without the value: it is asked for by
#: name only, see getxattr.
KEYED = {
    **{"lookup": 2, "readdir": 2, "link": 3, "unlink": 2, "rmdir": 2, "rename": 4, "setxattr": 2, "removexattr": 2},
    **{"mknod": 4, "mkdir": 3, "symlink": 3, "create": 4},
}
#: Those that may be executed a second time, but count references.
TWICE = {"lookup", "readdir"}


def request_key(name: str, args: tuple[Any, ...]) -> int:
    """A number, not 0, by which the next worker knows a request again."""
    return checksum(repr((name, args[: KEYED[name]])).encode()) | 1 << 32


def handler(
    function: Callable[Concatenate[Operations, P], R],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Make a FUSE handler of a plain method: errors become errnos, a bug becomes EIO and a traceback in the log."""

    name = function.__name__
    keyed, once, index = name in KEYED, name in KEYED and name not in TWICE, INDEX[name]

    async def call(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.begun += 1
        self.counters[index] += 1
        fs = self.fs
        key = 0
        try:
            if keyed:
                key = request_key(name, args)
                self.executed = True
                fs.lookups.begin(key, again=self.again)
                if self.again and key == fs.volume.inherited:
                    return self.answer_again(name, *args)  # type: ignore[no-any-return]
                if once:
                    fs.volume.asked = key
            try:
                return function(self, *args, **kwargs)
            except PkernfsError as error:
                if error.errno not in OUT_OF_SPACE:
                    raise
                full = error
            return await self.with_patience(full, key if once else 0, lambda: function(self, *args, **kwargs))
        except PkernfsError as error:
            if isinstance(error, CorruptError):
                fs.volume.damage.note(error)
            raise FUSEError(error.errno) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("a bug: %s%r failed", name, args)
            self.counters[BUGS] += 1
            raise FUSEError(errno.EIO) from None
        finally:
            fs.volume.asked = 0
            if fs.pending:
                self.work.set()

    call.__name__ = function.__name__
    call.__doc__ = function.__doc__
    return call


class Operations(pyfuse3.Operations):
    """pyfuse3's handlers over one Filesystem.  A file handle is the inode number (with KILL_PRIV, NOATIME)."""

    supports_dot_lookup = True
    enable_acl = False

    def __init__(
        self,
        fs: Filesystem,
        facts: Callable[[], dict[str, Any]],
        counters: memoryview | None = None,
        *,
        writeback: bool = False,
    ) -> None:
        """``counters``: see stats.py.  ``writeback``: the kernel holds back what is written, and has the say on size,
        mtime and ctime of files."""
        super().__init__()
        self.enable_writeback_cache = writeback
        fs.write_updates_times = not writeback
        self.fs = fs
        self.facts = facts
        self.counters = counters or memoryview(bytearray(SIZE)).cast("Q")
        self.unwritten: dict[int, tuple[int, PkernfsError]] = {}  #: where a write ended too soon, and why
        self.begun = 0  #: requests so far
        self.at_work: dict[int, float] = {}  #: those that wait: their numbers, and when they were first seen waiting
        self.executed = self.again = self.creates_again = False
        self.work = trio.Event()
        fs.in_background = True

    # -- after a takeover -----------------------------------------------------------------------------------------

    def before_read(self) -> None:
        """All requests so far are answered, but for those that wait for space, which have changed nothing."""
        if self.executed:
            self.executed = False
            self.fs.volume.answered()

    def relayed(self, header: bytes) -> None:
        """A request comes from the keeper; ``header``: its first bytes, b"" after the last one.

        What comes again was not answered by the worker before.
        """
        if not header:
            self.fs.volume.forget_inherited()
        request = REQUEST.unpack(header) if header else None
        self.again = request is not None and bool(request.unique & RESENT)
        # pyfuse3 looks at the flags of setxattr(2) itself, before it calls the handler.
        setxattr = self.again and request is not None and request.opcode == SETXATTR
        self.creates_again = setxattr and bool(header[SETXATTR_FLAGS_AT] & os.XATTR_CREATE)

    def oldest(self) -> float:
        """For how many seconds, from one call to another, a request has been at work; 0.0: none was before."""
        now = trio.current_time()
        for begun, seen in self.at_work.items():
            self.at_work[begun] = seen or now
        return now - min(self.at_work.values(), default=now)

    def answer_again(self, name: str, *args: Any) -> Any:
        """The answer to a request that was executed by the worker before, which did not come to answer it."""
        self.fs.volume.take_inherited()
        if name == "link":
            return self._found(args[0])
        if name not in MAKING:
            return None
        entry = self._found(self.fs.lookup(args[0], args[1]))
        return (self._opened(entry.st_ino, args[3], args[4]), entry) if name == "create" else entry

    async def with_patience(self, error: PkernfsError, key: int, call: Callable[[], R]) -> R:
        """Try ``call`` again, which has found no space.  ``key``: if it must not be executed twice, else 0.

        What was removed may be just what is missing: it is freed when the kernel forgets it, which can come behind this
        request.  Nothing was changed, so others may come in between.
        """
        fs = self.fs
        number = self.begun
        self.at_work[number] = 0.0
        try:
            for patience in FORGETS:
                if not fs.awaits_forget():
                    break
                fs.volume.asked = 0
                await trio.sleep(patience)
                fs.settle()
                fs.volume.asked = key
                try:
                    return call()
                except PkernfsError as once_more:
                    if once_more.errno not in OUT_OF_SPACE:
                        raise
                    error = once_more
            raise error
        finally:
            del self.at_work[number]

    async def housekeeping(self) -> None:
        """Free memory step by step, with other requests in between, until cancelled."""
        while True:
            await self.work.wait()
            self.work = trio.Event()
            while self.fs.pending:
                ino = next(iter(self.fs.pending))
                try:
                    self.fs.pending_step()
                except PkernfsError as error:
                    self.fs.complain(error)
                except Exception:
                    log.exception("a bug: freeing inode %d failed", ino)
                await trio.lowlevel.checkpoint()

    # -- attributes -----------------------------------------------------------------------------------------------

    def attributes(self, ino: int, inode: Inode) -> EntryAttributes:
        """The one place that turns our attributes into pyfuse3's."""
        entry = EntryAttributes()
        entry.st_ino = ino
        entry.generation = inode.generation
        entry.st_mode = inode.mode
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        # A directory's size is 20 bytes an entry, as tmpfs has it, with "." and "..".
        entry.st_size = inode.size if not stat.S_ISDIR(inode.mode) else (inode.size + 2) * 20
        entry.st_blocks = inode.pages * (PAGE // 512)
        entry.st_blksize = PAGE
        entry.st_atime_ns = inode.atime
        entry.st_ctime_ns = inode.ctime
        entry.entry_timeout = TIMEOUT
        if inode.flags & FLAG_DIRECT or pins(inode) > 0:
            # Somebody may be storing into the file's memory at any moment.  Attributes that are asked for at every
            # read and an mtime that is never the same make the kernel (AUTO_INVAL_DATA) drop its cached pages.
            entry.attr_timeout = 0
            entry.st_mtime_ns = max(inode.mtime, self.fs.now())
        else:
            entry.attr_timeout = 0 if inode.flags & GUARDED else TIMEOUT  # they grow by themselves
            entry.st_mtime_ns = inode.mtime
        return entry

    def _found(self, ino: int) -> EntryAttributes:
        """Attributes for a reply by which the kernel comes to know the inode."""
        entry = self.attributes(ino, self.fs.getattr(ino))
        self.fs.remember(ino)
        return entry

    @handler
    def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            return self._found(self.fs.lookup(parent_inode, name))
        except PkernfsError as error:
            if error.errno != errno.ENOENT:
                raise
            missing = EntryAttributes()
            missing.st_ino = pyfuse3.InodeT(0)
            missing.entry_timeout = TIMEOUT
            return missing

    @handler
    def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self.attributes(inode, self.fs.getattr(inode))

    @handler
    def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        change = SetAttr(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
            ctime=attr.st_ctime_ns if fields.update_ctime else None,
        )
        if change == SetAttr(ctime=change.ctime):
            # chown(-1, -1), which clears set-user-ID bits as any change of owner does.
            change = change._replace(uid=self.fs.getattr(inode).uid)
        return self.attributes(inode, self.fs.setattr(inode, change, privileged=ctx.uid == 0))

    async def forget(self, inode_list: Any) -> None:
        for ino, count in inode_list:
            try:
                self.fs.forget(ino, count)
                if not self.fs.lookups[ino]:
                    self.unwritten.pop(ino, None)
            except PkernfsError as error:
                self.fs.complain(error)
            except Exception:
                log.exception("a bug: forgetting inode %d failed", ino)
        if self.fs.pending:
            self.work.set()

    # -- names ----------------------------------------------------------------------------------------------------

    @handler
    def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return self._found(self.fs.create(parent_inode, name, mode, Caller(ctx.uid, ctx.gid), rdev=rdev))

    @handler
    def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._found(self.fs.create(parent_inode, name, stat.S_IFDIR | mode, Caller(ctx.uid, ctx.gid)))

    @handler
    def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        mode = stat.S_IFLNK | 0o777
        return self._found(self.fs.create(parent_inode, name, mode, Caller(ctx.uid, ctx.gid), target=target))

    @handler
    def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self.fs.check_open(parent_inode, flags)
        ino = self.fs.create(parent_inode, name, stat.S_IFREG | mode, Caller(ctx.uid, ctx.gid))
        return self._opened(ino, flags, ctx), self._found(ino)

    @handler
    def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self.fs.readlink(inode)

    @handler
    def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        self.fs.link(inode, new_parent_inode, new_name)
        return self._found(inode)

    @handler
    def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self.fs.unlink(parent_inode, name)

    @handler
    def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self.fs.rmdir(parent_inode, name)

    @handler
    def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self.fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @handler
    def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    @handler
    def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        # Cookies 1 and 2 stand for "." and "..", the cookie of an entry is its key + 3.
        reply = pyfuse3.readdir_reply
        directory = self.fs.directory(fh)
        if start_id == 0 and not reply(token, b".", self.attributes(fh, directory.inode), 1):
            return
        if start_id <= 1:
            above = directory.inode.parent
            if not reply(token, b"..", self.attributes(above, self.fs.getattr(above)), 2):
                return
        for entry in self.fs.readdir(fh, max(start_id - 2, 0)):
            try:
                attributes = self.attributes(entry.ino, directory.target(entry))
            except CorruptError as error:
                self.fs.volume.damage.note(error)
                continue
            if not reply(token, entry.name, attributes, entry.key + 3):
                return
            self.fs.remember(entry.ino)

    @handler
    def releasedir(self, fh: int) -> None:
        pass

    # -- content --------------------------------------------------------------------------------------------------

    def _opened(self, ino: int, flags: int, ctx: RequestContext) -> FileInfo:
        # A file that has blocks of its own may be mapped directly: what the kernel cached is dropped at each open.
        # So it is where a read is to update the access time: the kernel does not tell of reads that it answers itself.
        inode = self.fs.getattr(ino)
        changing = bool(inode.flags & FLAG_DIRECT) or pins(inode) > 0
        keep_cache = inode.size < BLOCK // 2 and not changing and not self.fs.atime_due(inode)
        # What writes back reads, to complete a page, from files that are open for writing only.
        is_read = not flags & (os.O_NOATIME | os.O_WRONLY)
        handle = ino | (KILL_PRIV if ctx.uid else 0) | (0 if is_read else NOATIME)
        # What writes back looks for no changes but its own: a file that somebody may be storing into past the mount is
        # read and written past the cache then, as page tables always are (and Linux before 6.6 does not map it).
        direct_io = bool(inode.flags & GUARDED) or (self.enable_writeback_cache and changing)
        return FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=keep_cache, direct_io=direct_io)

    @handler
    def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        self.fs.check_open(inode, flags)
        if flags & os.O_TRUNC:
            self.fs.setattr(inode, SetAttr(size=0), privileged=ctx.uid == 0)
        return self._opened(inode, flags, ctx)

    @handler
    def read(self, fh: int, off: int, size: int) -> Any:  # bytes, or a view of the region: pyfuse3 takes any buffer
        return self.fs.read(fh & INO, off, size, noatime=bool(fh & NOATIME))

    @handler
    def write(self, fh: int, off: int, buf: bytes) -> int:
        ino = fh & INO
        if self.unwritten and self.unwritten.get(ino, (-1,))[0] == off:
            del self.unwritten[ino]
        done = self.fs.write(ino, off, buf, kill_priv=bool(fh & KILL_PRIV))
        while done < len(buf):
            try:
                done += self.fs.write(ino, off + done, buf[done:])
            except PkernfsError as error:
                # A caller of write(2) sees the count and asks again for the rest.  The kernel, when it writes back
                # pages that were changed through a mapping, does not look at it: fsync and msync tell.  With a
                # writeback cache close(2) is to tell too, which it does of errors.
                if self.enable_writeback_cache:
                    raise
                self.unwritten[ino] = (off + done, error)
                break
        return done

    @handler
    def release(self, fh: int) -> None:
        pass

    @handler
    def fsync(self, fh: int, datasync: bool) -> None:
        self.fs.region.flush()
        if fh & INO in self.unwritten:
            raise self.unwritten.pop(fh & INO)[1]

    @handler
    def fsyncdir(self, fh: int, datasync: bool) -> None:
        self.fs.region.flush()

    # -- extended attributes --------------------------------------------------------------------------------------

    @handler
    def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if self.creates_again and self.fs.volume.inherited == request_key("setxattr", (inode, name)):
            raise FUSEError(errno.ENODATA)
        if name.startswith(FACTS):
            if ctx.uid not in (0, os.getuid()):
                raise FUSEError(errno.EPERM)
            return self._fact(inode, name.removeprefix(FACTS).decode("ascii", "replace"))
        _check_namespace(name)
        return self.fs.getxattr(inode, name)

    def _fact(self, ino: int, name: str) -> bytes:
        """A read-only attribute user.pkernfs.NAME: facts of the mount (any inode) and of a file's memory.

        For the owner of the mount and root only, as the control socket is.
        """
        facts = self.facts()
        if name in facts:
            return str(facts[name]).encode(errors="surrogateescape")
        if not stat.S_ISREG(self.fs.getattr(ino).mode):
            raise FUSEError(errno.ENODATA)
        of_file = file_facts(self.fs, ino)
        if name not in of_file:
            raise FUSEError(errno.ENODATA)
        return json.dumps(of_file[name]).encode()

    @handler
    def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        if name.startswith(FACTS):
            raise FUSEError(errno.EPERM)
        _check_namespace(name)
        self.fs.setxattr(inode, name, value)

    @handler
    def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        names = self.fs.listxattr(inode)
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    @handler
    def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        if name.startswith(FACTS):
            raise FUSEError(errno.EPERM)
        _check_namespace(name)
        self.fs.removexattr(inode, name)

    # -- the whole ------------------------------------------------------------------------------------------------

    @handler
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        figures = self.fs.statfs()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = PAGE
        data.f_blocks = figures.blocks
        data.f_bfree = data.f_bavail = figures.free
        data.f_files = figures.files
        data.f_ffree = data.f_favail = figures.free_files
        data.f_namemax = NAME_MAX
        return data


def _check_namespace(name: bytes) -> None:
    """Only the namespaces of xattr(7) that are for users, and names in them.

    Not system: POSIX ACLs would need the kernel to leave the umask to us, which pyfuse3 cannot ask for.
    """
    namespace, _, rest = name.partition(b".")
    if namespace not in (b"user", b"trusted", b"security"):
        raise FUSEError(errno.EOPNOTSUPP)
    if not rest:
        raise FUSEError(errno.EINVAL)
