"""A process that makes system calls on request, as some user: the other side of permission checks and of locks.

    with Agent(uid=1000, gid=1000, groups=[1002]) as agent:
        fd = agent.open(path, os.O_RDWR)        # os.open, in that process
        agent.flock(fd, fcntl.LOCK_EX)          # or a function of this file

It has the capabilities of its user, a umask of 022, and is a program of its own, so that nothing is forked while
threads run.  Errors come back as the OSErrors that they are.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from typing import Any

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

maps: dict[int, mmap.mmap] = {}
sockets: dict[int, socket.socket] = {}


def libc() -> Any:
    """The C library, for what Python's os module lacks."""
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, path: str | None = None) -> int:
    """Raise the OSError of a failed C call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def renameat2(source: str, target: str, flags: int) -> None:
    """The system call, flags included."""
    check(libc().renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags), source)


def link_open_file(fd: int, path: str) -> None:
    """linkat(2) of an open file: os.link does not follow /proc/self/fd."""
    check(libc().linkat(AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, os.fsencode(path), 0x400), path)


def utimensat(path: str, times: list[tuple[int, int]], follow: bool = True) -> None:
    """The system call with (seconds, nanoseconds) pairs, UTIME_NOW and UTIME_OMIT included."""
    raw = (ctypes.c_long * 4)(*times[0], *times[1])
    check(libc().utimensat(AT_FDCWD, os.fsencode(path), raw, 0 if follow else 0x100), path)


def lockf(fd: int, kind: bytes, start: int = 0, length: int = 0) -> bool:
    """A POSIX record lock without waiting ("r", "w" or "u"); whether it was granted."""
    command = {b"r": fcntl.LOCK_SH, b"w": fcntl.LOCK_EX, b"u": fcntl.LOCK_UN}[kind]
    try:
        fcntl.lockf(fd, command if kind == b"u" else command | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        return False
    return True


def flock(fd: int, kind: bytes) -> bool:
    """Lock a whole file, or unlock it, without waiting; whether it was granted."""
    command = {b"r": fcntl.LOCK_SH, b"w": fcntl.LOCK_EX, b"u": fcntl.LOCK_UN}[kind] | fcntl.LOCK_NB
    try:
        fcntl.flock(fd, command)
    except BlockingIOError:
        return False
    return True


def flock_waiting(fd: int) -> bool:
    """flock(2) that waits."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    return True


def entry_types(path: str) -> list[tuple[str, int]]:
    """Names with the types that readdir(3) gives."""
    directory = Directory(path)
    found = []
    while (name := directory.next()) is not None:
        if name not in (".", ".."):
            found.append((name, directory.type))
    directory.close()
    return sorted(found)


def map_file(path: str, length: int, offset: int = 0) -> int:
    """Map a file shared and writable; a handle."""
    fd = os.open(path, os.O_RDWR)
    try:
        handle = max(maps, default=0) + 1
        maps[handle] = mmap.mmap(fd, length, offset=offset)
    finally:
        os.close(fd)
    return handle


def map_store(handle: int, at: int, data: bytes) -> None:
    """Store into a mapping."""
    maps[handle][at : at + len(data)] = data


def map_load(handle: int, at: int, length: int) -> bytes:
    """Load from a mapping."""
    return maps[handle][at : at + length]


def map_sync(handle: int) -> None:
    """msync(2)."""
    maps[handle].flush()


def count_up(path: str, length: int, offset: int, log: str) -> int:
    """Store 1, 2, 3, ... into the first word of a mapping until SIGUSR1; the last number."""
    ended: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: ended.append(number))
    word = memoryview(maps[map_file(path, length, offset)]).cast("Q")
    number = 0
    while not ended:
        number += 1
        word[0] = number
        if number == 1000:
            write_file(log, b"counting")
        if number % 1000 == 0:
            time.sleep(0.001)  # leave the processor to others
    word.release()
    return number


def bind_socket(path: str) -> int:
    """A listening AF_UNIX socket; a handle."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    made.listen()
    sockets[made.fileno()] = made
    return made.fileno()


def connect_socket(path: str) -> bool:
    """Connect to an AF_UNIX socket; raises OSError."""
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(10)
        made.connect(path)
    return True


def read_file(path: str) -> bytes:
    """All of a file."""
    with open(path, "rb") as file:
        return file.read()


def write_file(path: str, data: bytes) -> None:
    """Create or replace a file's content."""
    with open(path, "wb") as file:
        file.write(data)


def listdir(path: str) -> list[str]:
    """Sorted names."""
    return sorted(os.listdir(path))


def raw_getxattr(path: str, name: bytes, size: int) -> int:
    """getxattr(2) with a buffer of this size."""
    return check(libc().getxattr(os.fsencode(path), name, ctypes.create_string_buffer(size), size), path)


def raw_listxattr(path: str, size: int) -> int:
    """listxattr(2) with a buffer of this size."""
    return check(libc().listxattr(os.fsencode(path), ctypes.create_string_buffer(size), size), path)


def append_records(path: str, index: int, count: int) -> None:
    """Append records of different lengths, one write(2) each."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    for number in range(count):
        os.write(fd, f"{index} {number} {'x' * (number % 97)}\n".encode())
    os.close(fd)


def close_fd(fd: int) -> None:
    """os.close (the agent's own ``close`` ends it)."""
    os.close(fd)


def output_of(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout


def tidy() -> None:
    """Close all files, maps and sockets, and leave the directory."""
    for made in sockets.values():
        made.detach()
    sockets.clear()
    for area in maps.values():
        area.close()
    maps.clear()
    os.closerange(3, 1 << 16)
    os.chdir("/")
    os.umask(0o022)


def serve() -> None:
    """The other process: requests come on standard input, answers go to standard output."""
    uid, gid, *groups = map(int, sys.argv[1:])
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.umask(0o022)
    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            function = globals().get(name) or getattr(os, name)
            answer = (True, function(*args, **kwargs))
        except Exception as error:
            answer = (False, error)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


class Dirent(ctypes.Structure):
    """struct dirent of Linux."""

    _fields_ = (
        ("d_ino", ctypes.c_ulong),
        ("d_off", ctypes.c_long),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


class Directory:
    """opendir(3), readdir(3), telldir(3), seekdir(3): Python's own functions keep no position."""

    def __init__(self, path: str) -> None:
        self.libc = libc()
        self.libc.opendir.restype = ctypes.c_void_p
        self.libc.readdir.restype = ctypes.POINTER(Dirent)
        self.libc.telldir.restype = ctypes.c_long
        self.handle = ctypes.c_void_p(self.libc.opendir(os.fsencode(path)))
        self.type = 0
        if not self.handle:
            check(-1, path)

    def next(self) -> str | None:
        """The next name; None at the end."""
        ctypes.set_errno(0)
        entry = self.libc.readdir(self.handle)
        if not entry:
            if ctypes.get_errno():
                check(-1)
            return None
        self.type = entry.contents.d_type
        return os.fsdecode(entry.contents.d_name)

    def tell(self) -> int:
        """A cookie for the place."""
        return int(self.libc.telldir(self.handle))

    def seek(self, cookie: int) -> None:
        """Back to the place of a cookie."""
        self.libc.seekdir(self.handle, ctypes.c_long(cookie))

    def rewind(self) -> None:
        """Back to the beginning, with what has changed meanwhile."""
        self.libc.rewinddir(self.handle)

    def close(self) -> None:
        """closedir(3)."""
        self.libc.closedir(self.handle)


class Agent:
    """The handle on such a process."""

    def __init__(self, uid: int = 0, gid: int = 0, groups: tuple[int, ...] = ()) -> None:
        self.uid = uid
        words = [sys.executable, "-I", __file__, str(uid), str(gid), *map(str, groups)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Make one call there."""
        self.start(name, *args, **kwargs)
        return self.finish()

    def start(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Begin a call; ``finish`` gives what came of it."""
        assert self.process.stdin
        pickle.dump((name, args, kwargs), self.process.stdin)
        self.process.stdin.flush()

    def finish(self) -> Any:
        """Wait for the call that was started."""
        assert self.process.stdout
        good, value = pickle.load(self.process.stdout)
        if not good:
            raise value
        return value

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.call(name, *args, **kwargs)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


if __name__ == "__main__":
    serve()
