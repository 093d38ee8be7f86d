"""/dev/fuse itself: mounting without libfuse, and the few messages that a keeper reads and writes.

The messages are those of the kernel's include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import subprocess
from typing import Final, NamedTuple

from pkernfs.errors import RegionError
from pkernfs.layout import i32, layout, u16, u32, u64
from pkernfs.options import MountOptions
from pkernfs.sockets import receive_fds

#: Flags of mount(2); statvfs(3) has the same values.
MS_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024}
BUFFER: Final = (1 << 20) + 4096  #: bytes of the largest request


class Request(NamedTuple):
    """The header of a request: fuse_in_header."""

    length: u32
    opcode: u32
    unique: u64
    nodeid: u64
    uid: u32
    gid: u32
    pid: u32
    extra: u32

    def __str__(self) -> str:
        name = OPCODES.get(self.opcode, str(self.opcode))
        return f"{name} of inode {self.nodeid} by process {self.pid}"


REQUEST = layout(Request, size=40)
RESENT: Final = 1 << 63  #: in ``unique``: delivered again
FORGET, SETXATTR, INTERRUPT, BATCH_FORGET = 2, 21, 36, 42
SETXATTR_FLAGS_AT: Final = 44  #: in a SETXATTR: fuse_setxattr_in.flags
WITHOUT_REPLY: Final = {FORGET, INTERRUPT, BATCH_FORGET}


def _names(first: int, names: str) -> dict[int, str]:
    return dict(enumerate(names.split(), first))


OPCODES = {
    **_names(1, "LOOKUP FORGET GETATTR SETATTR READLINK SYMLINK"),
    **_names(8, "MKNOD MKDIR UNLINK RMDIR RENAME LINK OPEN READ WRITE STATFS RELEASE"),
    **_names(20, "FSYNC SETXATTR GETXATTR LISTXATTR REMOVEXATTR FLUSH INIT OPENDIR READDIR"),
    **_names(29, "RELEASEDIR FSYNCDIR GETLK SETLK SETLKW ACCESS CREATE INTERRUPT BMAP DESTROY"),
    **_names(39, "IOCTL POLL NOTIFY_REPLY BATCH_FORGET FALLOCATE READDIRPLUS RENAME2 LSEEK"),
    **_names(47, "COPY_FILE_RANGE SETUPMAPPING REMOVEMAPPING SYNCFS TMPFILE STATX"),
}


class Reply(NamedTuple):
    """The header of a reply or a notification: fuse_out_header."""

    length: u32
    error: i32
    unique: u64


REPLY = layout(Reply, size=16)
NOTIFY_RESEND: Final = 7


class InitReply(NamedTuple):
    """The start of fuse_init_out."""

    major: u32
    minor: u32
    max_readahead: u32
    flags: u32
    max_background: u16
    congestion_threshold: u16
    max_write: u32
    time_gran: u32
    max_pages: u16
    map_alignment: u16
    flags2: u32  #: bits 32 and up; counts with INIT_EXT


INIT_REPLY = layout(InitReply, size=36)
HANDLE_KILLPRIV: Final = 1 << 19
HANDLE_KILLPRIV_V2: Final = 1 << 28


class Device:
    """The descriptor of one connection to the kernel, mounted or about to be."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def readable(self, timeout: float = 0) -> bool:
        """Whether a request waits.  Raises ConnectionAbortedError when the mount has ended."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        events = dict(poll.poll(timeout * 1000)).get(self.fd, 0)
        if events & select.POLLERR:
            raise ConnectionAbortedError(errno.ENODEV, "the mount has ended")
        return bool(events & select.POLLIN)

    def has_ended(self) -> bool:
        """Whether the kernel has ended the mount."""
        try:
            self.readable()
        except ConnectionAbortedError:
            return True
        return False

    def read(self) -> bytes:
        """The next request; waits for it.  Raises ConnectionAbortedError when the mount has ended."""
        while True:
            try:
                return os.read(self.fd, BUFFER)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise ConnectionAbortedError(errno.ENODEV, "the mount has ended") from None
                if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # ENOENT: withdrawn meanwhile
                    raise

    def reply(self, message: bytes) -> None:
        """Hand a reply over.  Nobody may be waiting for it any more."""
        try:
            os.write(self.fd, message)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def fail(self, unique: int, number: int) -> None:
        """Answer a request with an error; ``unique`` as it came, for one that came again with RESENT."""
        self.reply(REPLY.pack(Reply(REPLY.size, -number, unique)))

    def resend(self) -> bool:
        """Let the kernel deliver again what was read and not answered; False: it cannot.

        Linux 6.9 and later: "fuse: Introduce a new notification type for resend pending requests".  They come with bit
        63 of ``unique`` set ("fuse: Use the high bit of request ID for indicating resend requests").
        """
        try:
            os.write(self.fd, REPLY.pack(Reply(REPLY.size, NOTIFY_RESEND, 0)))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True


def patched_init(reply: bytes, largest: int) -> bytes:
    """A reply to INIT with what pyfuse3 has no option for.

    HANDLE_KILLPRIV_V2: without it the kernel reads security.capability before each write.  It stands for: writing,
    truncating and changing the owner clear set-user-ID bits here (Linux 5.11, "fuse: introduce the notion of
    FUSE_HANDLE_KILLPRIV_V2"; earlier ones ignore it, and do so themselves).  ``largest``: bytes of a write that fit
    through a socket.

    Not DIRECT_IO_ALLOW_MMAP (Linux 6.6, "fuse: rename FUSE_DIRECT_IO_RELAX to FUSE_DIRECT_IO_ALLOW_MMAP"): a file that
    is read past the cache, since somebody stores to it past the mount (attributes.py), could be mapped shared with it,
    and such a mapping shows the pages that were there when they were first touched.

    The reply is patched, and not pyfuse3: it fills in the structure inside of libfuse, where no option reaches.
    """
    init = INIT_REPLY.unpack(reply, REPLY.size)
    flags = init.flags & ~HANDLE_KILLPRIV | HANDLE_KILLPRIV_V2
    max_write = min(init.max_write, largest)
    init = init._replace(flags=flags, max_write=max_write, max_pages=min(init.max_pages, max_write // 4096))
    return reply[: REPLY.size] + INIT_REPLY.pack(init) + reply[REPLY.size + INIT_REPLY.size :]


def mount_device(source: str, mountpoint: str, options: MountOptions) -> Device:
    """Mount, as root with mount(2), else with fusermount3.  Raises RegionError."""
    if os.geteuid() == 0:
        return _mount(source, mountpoint, options)
    return _fusermount(source, mountpoint, options)


def allows_others(options: MountOptions) -> bool:
    """Whether other users may use the mount: as the options say, else root's only."""
    return options.allow_other or (options.allow_other is None and os.geteuid() == 0)


def _failed(mountpoint: str, why: str) -> RegionError:
    return RegionError(f"{mountpoint}: mounting failed: {why}", hint="may you use /dev/fuse and this directory?")


def mount_again(source: str, mountpoint: str, options: MountOptions, fd: int) -> None:
    """Mount what is mounted already once more, by the descriptor of its connection.  Raises OSError.

    Linux 5.15, "fuse: allow sharing existing sb"; EINVAL before, ENOTCONN when the connection has ended.  Not by
    open_tree(2) of a mount that is there: it may be hidden by others, or be in no mount namespace any more.
    """
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    mount2(source, mountpoint, "fuse.pkernfs", _flags(options), data)


def _flags(options: MountOptions) -> int:
    flags = 0
    for word in ("ro", *options.kernel) if options.readonly else options.kernel:
        flags |= MS_FLAGS.get(word, 0)
    return flags


def _mount(source: str, mountpoint: str, options: MountOptions) -> Device:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(mountpoint, f"/dev/fuse: {error.strerror}") from None
    data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    if allows_others(options):
        data += ",allow_other"
    try:
        mount2(source, mountpoint, "fuse.pkernfs", _flags(options), data)
    except OSError as error:
        os.close(fd)
        raise _failed(mountpoint, error.strerror or str(error)) from None
    return Device(fd)


def mount2(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2).  Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def umount2(target: str, flags: int) -> None:
    """Unmount, as umount(2) describes it.  Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _fusermount(source: str, mountpoint: str, options: MountOptions) -> Device:
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    arguments = [f"fsname={escaped}", "subtype=pkernfs", "default_permissions", *options.kernel]
    arguments += ["allow_other"] * allows_others(options) + ["ro"] * options.readonly
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(arguments), "--", mountpoint],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                check=False,
            )
        except FileNotFoundError:
            raise _failed(mountpoint, "fusermount3 is not installed") from None
        if done.returncode:
            raise _failed(mountpoint, " ".join(done.stderr.decode(errors="replace").split()))
        _, fds = receive_fds(ours, 1, 1)
    return Device(fds[0])
