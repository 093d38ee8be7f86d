"""The same system calls on two directories, one in the mount and one on a tmpfs: what comes back must be equal.

    fd = twin.open("f", os.O_CREAT | os.O_RDWR, 0o644)      # os.open on both; a pair of descriptors
    twin.write(fd, b"abc")                                  # both must give 3, or the same errno
    twin.stat("f")                                          # compares the fields, and which times have changed
    twin.by(1000).unlink("f")                               # as another user

Words that are str are paths below the two directories; bytes are taken as they are (a symlink's target, an attribute's
name).  An OSError is a result like any other: calls never raise, ``twin.error`` is the errno's name ("" for none).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, NamedTuple

from tests.mount.agent import Agent
from tests.mount.site import coarse_tick

#: Calls whose results are handles, which differ.
HANDLES = {"open", "map_file", "bind_socket", "dup"}


class Pair(NamedTuple):
    """One value for each side: the mount's, and the tmpfs's."""

    ours: Any
    theirs: Any


class Users:
    """The processes that make the calls, started when they are first needed."""

    def __init__(self) -> None:
        self.agents: dict[tuple[int, int, tuple[int, ...]], Agent] = {}

    def get(self, uid: int = 0, gid: int | None = None, groups: tuple[int, ...] = ()) -> Agent:
        """The agent with this identity."""
        key = (uid, uid if gid is None else gid, groups)
        if key not in self.agents:
            self.agents[key] = Agent(*key)
        return self.agents[key]

    def tidy(self) -> None:
        """Close whatever they have open."""
        for agent in self.agents.values():
            agent.tidy()

    def close(self) -> None:
        """End them all."""
        for agent in self.agents.values():
            agent.close()


class Twin:
    """Two directories, seen through the eyes of one user."""

    def __init__(
        self, roots: Pair, users: Users, agent: Agent | None = None, seen: dict[Any, Any] | None = None
    ) -> None:
        self.roots = roots
        self.users = users
        self.agent = agent or users.get()
        self.seen: dict[Any, Any] = {} if seen is None else seen
        self.error = ""

    def by(self, uid: int, gid: int | None = None, groups: tuple[int, ...] = ()) -> Twin:
        """The same directories for another user."""
        return Twin(self.roots, self.users, self.users.get(uid, gid, groups), self.seen)

    def _side(self, index: int, value: Any) -> Any:
        if isinstance(value, Pair):
            return value[index]
        if isinstance(value, str):
            return f"{self.roots[index]}/{value}" if value else self.roots[index]
        return value

    def _one(self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        try:
            words = [self._side(index, value) for value in args]
            return "", self.agent.call(name, *words, **{k: self._side(index, v) for k, v in kwargs.items()})
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno)), None

    def both(self, name: str, *args: Any, **kwargs: Any) -> tuple[Pair, Pair]:
        """Call on both sides: the errors, and the values."""
        (our_error, ours), (their_error, theirs) = (self._one(index, name, args, kwargs) for index in (0, 1))
        return Pair(our_error, their_error), Pair(ours, theirs)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call on both sides and compare; the value (a Pair of handles for calls that open something)."""
        errors, values = self.both(name, *args, **kwargs)
        what = f"{name}{args}{kwargs or ''} as user {self.agent.uid}"
        assert errors.ours == errors.theirs, (
            f"{what}: expected {errors.theirs or 'success'}, got {errors.ours or values.ours!r}"
        )
        self.error = errors.ours
        if errors.ours:
            return None
        if name in HANDLES:
            return values
        assert values.ours == values.theirs, f"{what}: expected {values.theirs!r}, got {values.ours!r}"
        return values.ours

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.call(name, *args, **kwargs)

    def fails(self, wanted: str, name: str, *args: Any, **kwargs: Any) -> None:
        """Both sides fail with this errno."""
        value = self.call(name, *args, **kwargs)
        assert self.error == wanted, f"{name}{args}: expected {wanted}, both gave {self.error or value!r}"

    def file(self, path: str, data: bytes = b"", mode: int = 0o644) -> None:
        """A regular file with this content and mode."""
        self.write_file(path, data)
        self.chmod(path, mode)

    def stat(self, path: Any, *, times: bool = True) -> dict[str, Any]:
        """lstat (fstat for a pair of descriptors) on both sides.

        Compared: type, mode, links, owner, size, device; with ``times`` also which of the three have changed since the
        last look at the same inode.
        """
        call = "fstat" if isinstance(path, Pair) else "lstat"
        errors, values = self.both(call, path)
        assert errors.ours == errors.theirs, f"{call}({path}): expected {errors.theirs!r}, got {errors.ours!r}"
        self.error = errors.ours
        if errors.ours:
            return {}
        told = [self._fields(value) for value in values]
        if times:
            now = [{"atime": v.st_atime_ns, "mtime": v.st_mtime_ns, "ctime": v.st_ctime_ns} for v in values]
            before = [self.seen.get((index, value.st_ino), {}) for index, value in enumerate(values)]
            for index, value in enumerate(values):
                self.seen[index, value.st_ino] = now[index]
                if all(before):
                    told[index]["changed"] = [name for name, time in now[index].items() if time != before[index][name]]
            coarse_tick()
        assert told[0] == told[1], f"{call}({path}):\nexpected {told[1]}\ngot      {told[0]}"
        return told[0]

    def _fields(self, value: os.stat_result) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "mode": oct(value.st_mode),
            "nlink": value.st_nlink,
            "uid": value.st_uid,
            "gid": value.st_gid,
            "size": value.st_size,
        }
        if stat.S_ISCHR(value.st_mode) or stat.S_ISBLK(value.st_mode):
            fields["rdev"] = value.st_rdev
        return fields

    def umask(self, mask: int) -> None:
        """The umask of the process that makes the calls."""
        self.agent.umask(mask)

    def tree(self, path: str = "") -> list[tuple[Any, ...]]:
        """Everything below ``path``, without times; equal on both sides."""
        sides = [sorted(self._walk(self._side(index, path))) for index in (0, 1)]
        assert sides[0] == sides[1]
        return sides[0]

    def _walk(self, top: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        for folder, directories, files in os.walk(os.fsencode(top)):
            for name in (*directories, *files):
                path = os.path.join(folder, name)
                found = os.lstat(path)
                content: Any = None
                if stat.S_ISLNK(found.st_mode):
                    content = os.readlink(path)
                elif stat.S_ISREG(found.st_mode):
                    with open(path, "rb") as file:
                        content = file.read()
                size = None if stat.S_ISDIR(found.st_mode) else found.st_size
                where = os.path.relpath(path, os.fsencode(top))
                rows.append((where, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, content))
        return rows
