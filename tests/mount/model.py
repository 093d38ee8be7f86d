"""What system calls make of a tree of files, in plain Python, and how that compares with what is there after a crash.

A call is a JSON list, its kind first.  Paths are relative to the worker that makes the call; those that begin with "s/"
are in a directory that all workers share.  ``choose`` picks the next call from a seeded generator and the model alone,
so that the same seed always gives the same calls.
"""

from __future__ import annotations

import copy
import os
import random
import stat
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = list[Any]

PLACES = ["", "a", "b", "a/c", "s"]
BASES = [f"f{index}" for index in range(5)]
FOLDERS = ["a", "b", "a/c", "b/c"]
RECORD = 3000  #: bytes of a record in the file that all workers write
RECORDS = 40  #: records of one worker
FAR = 400_000  #: bytes: how far most writes go
LARGE = 5 << 19  #: bytes: how far a few go, so that pages become blocks and the reverse

#: How often each kind of call is picked.
KINDS = {
    "write": 28,
    "append": 12,
    "mapped": 8,
    "truncate": 10,
    "create": 10,
    "unlink": 5,
    "rename": 8,
    "exchange": 4,
    "link": 4,
    "symlink": 2,
    "mkdir": 4,
    "rmdir": 3,
    "setxattr": 6,
    "removexattr": 2,
    "chmod": 2,
    "fsync": 6,
    "record": 8,
}
#: Calls of which the beginning, or any part, may be there when they did not return.
PARTIAL = ("write", "append", "mapped", "record")


def content(seed: int, length: int) -> bytes:
    """The bytes of a write."""
    return random.Random(seed).randbytes(length)


class Node:
    """A file, a directory or a symbolic link; hard links are several paths to one Node."""

    def __init__(self, kind: str, number: int, mode: int = 0o644) -> None:
        self.kind = kind
        self.number = number  #: distinguishes it from all others of the worker
        self.mode = mode
        self.data = bytearray()
        self.target = ""
        self.xattrs: dict[str, bytes] = {}


class Model:
    """What one worker has made."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.records: dict[int, bytes] = {}
        self.made = 0

    def paths(self, kind: str) -> list[str]:
        """The paths of all nodes of a kind, sorted."""
        return sorted(path for path, node in self.nodes.items() if node.kind == kind)

    def new(self, path: str, kind: str, mode: int) -> Node:
        """Add a node."""
        self.made += 1
        node = self.nodes[path] = Node(kind, self.made, mode)
        return node

    def below(self, path: str) -> list[str]:
        """What is in a directory, at any depth."""
        return [other for other in self.nodes if other.startswith(path + "/")]

    # -- choosing -------------------------------------------------------------------------------------------------

    def choose(self, rng: random.Random) -> Call:
        """The next call."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        pick: Callable[[random.Random], Call | None] = getattr(self, f"_pick_{kind}")
        return pick(rng) or self._pick_create(rng) or self._pick_write(rng)

    def _file(self, rng: random.Random) -> str | None:
        files = self.paths("file")
        return rng.choice(files) if files else None

    def _place(self, rng: random.Random) -> str:
        """A path for a file, taken or not."""
        there = [place for place in PLACES if place in ("", "s") or place in self.nodes]
        return os.path.join(rng.choice(there), rng.choice(BASES))

    def _free_place(self, rng: random.Random) -> str | None:
        for _ in range(3):
            path = self._place(rng)
            if path not in self.nodes:
                return path
        return None

    def _pick_create(self, rng: random.Random) -> Call | None:
        path = self._free_place(rng)
        return ["create", path, rng.choice([0o600, 0o644, 0o4755])] if path else None

    def _pick_symlink(self, rng: random.Random) -> Call | None:
        path = self._free_place(rng)
        return ["symlink", path, "t" * rng.choice([1, 120, 121, 3000])] if path else None

    def _pick_write(self, rng: random.Random) -> Call:
        path = self._file(rng)
        if path is None:
            return ["unlink", BASES[0]] if BASES[0] in self.nodes else ["create", BASES[0], 0o644]
        length = rng.choice([1, 100, 4096, 5000, 70_000, 200_000])
        far = LARGE if rng.random() < 0.06 else FAR
        at = rng.choice([0, rng.randrange(far), rng.randrange(far // 4096) * 4096])
        return ["write", path, at, length, rng.getrandbits(32)]

    def _pick_append(self, rng: random.Random) -> Call | None:
        path = self._file(rng)
        if path is None or len(self.nodes[path].data) > LARGE:
            return None
        return ["append", path, rng.choice([10, 3000, 50_000]), rng.getrandbits(32)]

    def _pick_mapped(self, rng: random.Random) -> Call | None:
        path = self._file(rng)
        size = len(self.nodes[path].data) if path else 0
        if not size:
            return None
        length = min(size, rng.choice([1, 8, 4096, 30_000]))
        return ["mapped", path, rng.randrange(size - length + 1), length, rng.getrandbits(32)]

    def _pick_truncate(self, rng: random.Random) -> Call | None:
        path = self._file(rng)
        far = LARGE if rng.random() < 0.2 else FAR
        return ["truncate", path, rng.choice([0, rng.randrange(far), rng.randrange(far)])] if path else None

    def _pick_unlink(self, rng: random.Random) -> Call | None:
        paths = self.paths("file") + self.paths("link")
        return ["unlink", rng.choice(paths)] if paths else None

    def _pick_rename(self, rng: random.Random) -> Call | None:
        folders = self.paths("dir")
        if folders and rng.random() < 0.3:
            return self._folder_renamed(rng, rng.choice(folders))
        paths = self.paths("file") + self.paths("link")
        old = rng.choice(paths) if paths else None
        new = self._place(rng)
        target = self.nodes.get(new)
        if old is None or (target and (target.kind == "dir" or target is self.nodes[old])):
            return None
        return ["rename", old, new]

    def _folder_renamed(self, rng: random.Random, old: str) -> Call | None:
        new = rng.choice(FOLDERS)
        parent = os.path.dirname(new)
        inside = new == old or new.startswith(old + "/")
        if inside or (parent and parent not in self.nodes) or (new in self.nodes and self.below(new)):
            return None
        return ["rename", old, new]

    def _pick_exchange(self, rng: random.Random) -> Call | None:
        paths = sorted(self.nodes)
        if len(paths) < 2:
            return None
        one, two = rng.sample(paths, 2)
        apart = not (one + "/").startswith(two + "/") and not (two + "/").startswith(one + "/")
        # Names of files and of directories stay apart, so that every call can be picked at any time.
        alike = (self.nodes[one].kind == "dir") == (self.nodes[two].kind == "dir")
        return ["exchange", one, two] if apart and alike else None

    def _pick_link(self, rng: random.Random) -> Call | None:
        old, new = self._file(rng), self._free_place(rng)
        return ["link", old, new] if old and new else None

    def _pick_mkdir(self, rng: random.Random) -> Call | None:
        free = [
            path
            for path in FOLDERS
            if path not in self.nodes and (not os.path.dirname(path) or os.path.dirname(path) in self.nodes)
        ]
        return ["mkdir", rng.choice(free)] if free else None

    def _pick_rmdir(self, rng: random.Random) -> Call | None:
        empty = [path for path in self.paths("dir") if not self.below(path)]
        return ["rmdir", rng.choice(empty)] if empty else None

    def _pick_setxattr(self, rng: random.Random) -> Call | None:
        paths = self.paths("file") + self.paths("dir")
        if not paths:
            return None
        name = rng.choice(["user.one", "user.two"])
        return ["setxattr", rng.choice(paths), name, rng.choice([0, 10, 3000, 20_000]), rng.getrandbits(32)]

    def _pick_removexattr(self, rng: random.Random) -> Call | None:
        paths = [path for path in sorted(self.nodes) if self.nodes[path].xattrs]
        path = rng.choice(paths) if paths else None
        return ["removexattr", path, rng.choice(sorted(self.nodes[path].xattrs))] if path else None

    def _pick_chmod(self, rng: random.Random) -> Call | None:
        path = self._file(rng)
        return ["chmod", path, rng.randrange(0o1000)] if path else None

    def _pick_fsync(self, rng: random.Random) -> Call | None:
        path = self._file(rng)
        return ["fsync", path] if path else None

    def _pick_record(self, rng: random.Random) -> Call:
        return ["record", rng.randrange(RECORDS), rng.getrandbits(32)]

    # -- applying -------------------------------------------------------------------------------------------------

    def apply(self, call: Call) -> None:
        """Do a call."""
        kind, *words = call
        getattr(self, f"_{kind}")(*words)

    def _create(self, path: str, mode: int) -> None:
        self.new(path, "file", mode)

    def _symlink(self, path: str, target: str) -> None:
        self.new(path, "link", 0o777).target = target

    def _mkdir(self, path: str) -> None:
        self.new(path, "dir", 0o777)

    def _write(self, path: str, at: int, length: int, seed: int) -> None:
        data = self.nodes[path].data
        data.extend(bytes(max(0, at - len(data))))
        data[at : at + length] = content(seed, length)

    _mapped = _write

    def _append(self, path: str, length: int, seed: int) -> None:
        self._write(path, len(self.nodes[path].data), length, seed)

    def _truncate(self, path: str, size: int) -> None:
        data = self.nodes[path].data
        del data[size:]
        data.extend(bytes(size - len(data)))

    def _unlink(self, path: str) -> None:
        del self.nodes[path]

    _rmdir = _unlink

    def _take(self, path: str) -> dict[str, Node]:
        """Take a path with all that is below it out of the tree: by what follows the path."""
        return {other[len(path) :]: self.nodes.pop(other) for other in [path, *self.below(path)]}

    def _put(self, path: str, taken: dict[str, Node]) -> None:
        self.nodes.update({path + rest: node for rest, node in taken.items()})

    def _rename(self, old: str, new: str) -> None:
        self.nodes.pop(new, None)
        self._put(new, self._take(old))

    def _exchange(self, one: str, two: str) -> None:
        first, second = self._take(one), self._take(two)
        self._put(two, first)
        self._put(one, second)

    def _link(self, old: str, new: str) -> None:
        self.nodes[new] = self.nodes[old]

    def _setxattr(self, path: str, name: str, size: int, seed: int) -> None:
        self.nodes[path].xattrs[name] = content(seed, size)

    def _removexattr(self, path: str, name: str) -> None:
        del self.nodes[path].xattrs[name]

    def _chmod(self, path: str, mode: int) -> None:
        self.nodes[path].mode = mode

    def _fsync(self, path: str) -> None:
        pass

    def _record(self, slot: int, seed: int) -> None:
        self.records[slot] = content(seed, RECORD)


class Ground:
    """Where one worker's paths are: a directory of its own, and one that all share, below ``top``."""

    def __init__(self, top: Path, worker: int, workers: int) -> None:
        self.top, self.worker, self.workers = top, worker, workers
        self.own = top / f"w{worker}"
        self.shared = top / "shared"
        self.records = top / "records"

    def make(self) -> None:
        """Make the directories and the file of records."""
        self.own.mkdir(parents=True)
        self.shared.mkdir(exist_ok=True)
        self.records.touch()
        os.truncate(self.records, self.workers * RECORDS * RECORD)

    def path(self, path: str) -> str:
        """The real path."""
        if path.startswith("s/"):
            return f"{self.shared}/w{self.worker}-{path[2:]}"
        return f"{self.own}/{path}"

    def record_at(self, slot: int) -> int:
        """Offset of one of the worker's records: those of all workers alternate."""
        return (slot * self.workers + self.worker) * RECORD

    def found(self) -> Found:
        """Look at everything."""
        found = Found()
        links = defaultdict(list)
        paths = {
            f"s/{name.partition('-')[2]}" for name in os.listdir(self.shared) if name.startswith(f"w{self.worker}-")
        }
        for folder, *names in os.walk(self.own):
            paths |= {os.path.relpath(os.path.join(folder, name), self.own) for name in (*names[0], *names[1])}
        for path in paths:
            real = self.path(path)
            status = os.lstat(real)
            row: dict[str, Any] = {"mode": oct(status.st_mode)}
            if stat.S_ISLNK(status.st_mode):
                row["target"] = os.readlink(real)
            else:
                row["xattrs"] = {name: os.getxattr(real, name) for name in os.listxattr(real)}
            if stat.S_ISREG(status.st_mode):
                row["nlink"] = status.st_nlink
                row["data"] = Path(real).read_bytes()
                links[status.st_ino].append(path)
            found.rows[path] = row
        found.links = sorted(sorted(group) for group in links.values())
        with self.records.open("rb") as file:
            for slot in range(RECORDS):
                file.seek(self.record_at(slot))
                found.records[slot] = file.read(RECORD)
        return found


class Found:
    """What there is of one worker's: a row for each path, the groups of hard links, the records."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.links: list[list[str]] = []
        self.records: dict[int, bytes] = {}

    def differences(self, model: Model) -> list[str]:
        """What is otherwise than in the model, one line each."""
        lines = [f"{path}: is there" for path in sorted(set(self.rows) - set(model.nodes))]
        groups = defaultdict(list)
        for path, node in sorted(model.nodes.items()):
            if node.kind == "file":
                groups[node.number].append(path)
        for path, node in sorted(model.nodes.items()):
            row = self.rows.get(path)
            if row is None:
                lines.append(f"{path}: is not there")
                continue
            kind = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "link": stat.S_IFLNK}[node.kind]
            wanted: dict[str, Any] = {"mode": oct(kind | node.mode)}
            if node.kind == "link":
                wanted["target"] = node.target
            else:
                wanted["xattrs"] = node.xattrs
            if node.kind == "file":
                wanted["nlink"] = len(groups[node.number])
                wanted["data"] = node.data
            lines += [
                f"{path}: {name}: {_unlike(wanted.get(name), row.get(name))}"
                for name in {**wanted, **row}
                if wanted.get(name) != row.get(name)
            ]
        if self.links != sorted(groups.values()):
            lines.append(f"hard links: expected {sorted(groups.values())}, found {self.links}")
        for slot, record in self.records.items():
            if record != model.records.get(slot, bytes(RECORD)):
                lines.append(f"record {slot}: another one")
        return lines

    def settle(self, model: Model, pending: Call | None) -> tuple[Model, list[str]]:
        """The model with the call that did not return, as far as it is there; and what is otherwise."""
        before = self.differences(model)
        if not before or pending is None:
            return model, before
        done = copy.deepcopy(model)
        done.apply(pending)
        after = self.differences(done)
        if after and pending[0] in PARTIAL and self._is_mixed(model, done, pending):
            return done, []
        return done, [f"{pending} did not return; without it: {before}, with it: {after}"] if after else []

    def _is_mixed(self, model: Model, done: Model, pending: Call) -> bool:
        """Whether the only difference is that a write is there in part.

        Each byte is the old or the new one, and what is beyond the old end is new.  What is found becomes what ``done``
        has.
        """
        if pending[0] == "record":
            slot = pending[1]
            data, old, new = self.records[slot], model.records.get(slot, bytes(RECORD)), done.records[slot]
            done.records[slot] = data
        else:
            path = pending[1]
            data = self.rows.get(path, {}).get("data", b"")
            old, new = bytes(model.nodes[path].data), bytes(done.nodes[path].data)
            done.nodes[path].data = bytearray(data)
        if self.differences(done) or not len(old) <= len(data) <= max(len(old), len(new)):
            return False
        common = min(len(old), len(data))
        return data[common:] == new[common : len(data)] and all(
            one in both for one, *both in zip(data[:common], old, new, strict=False)
        )


def _unlike(wanted: Any, found: Any) -> str:
    """Two values for an error message: long ones by their lengths and where they differ first."""
    if not isinstance(wanted, bytes | bytearray) or not isinstance(found, bytes | bytearray):
        return f"expected {wanted!r:.200}, found {found!r:.200}"
    at = next((at for at, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), None)
    return f"expected {len(wanted)} bytes, found {len(found)}, first difference at {at}"
