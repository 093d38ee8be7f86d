"""A process that changes files until its filesystem dies, and says which calls had returned by then.

    with Load(folder, seed, log) as load: ...; calls = load.finished()

The log (on another filesystem) gets a line before each call and one after it.  A call is a JSON list; ``Model`` knows
what the calls make of a directory, so that it can be compared with what is there after a crash: everything that
returned, and at most the one call that did not, done or not (a write may be done in part).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = [f"file{index}" for index in range(8)]


def content(seed: int, length: int) -> bytes:
    """The bytes of a write."""
    return random.Random(seed).randbytes(length)


def choose(rng: random.Random, sizes: dict[str, int]) -> list[Any]:
    """The next call, given the files that there are and their sizes."""
    missing = [name for name in NAMES if name not in sizes]
    kind = rng.choices(
        ["write", "append", "fsync", "truncate", "create", "unlink", "rename", "exchange", "xattr", "mkdir"],
        [40, 15, 10, 8, 10, 4, 6, 3, 3, 1],
    )[0]
    if not sizes or (kind == "create" and missing):
        return ["create", rng.choice(missing)]
    name = rng.choice(sorted(sizes))
    if kind == "write":
        length = rng.choice([1, 100, 4096, 5000, 70_000, 200_000])
        return [
            "write",
            name,
            rng.choice([0, rng.randrange(400_000), rng.randrange(90) * 4096]),
            length,
            rng.getrandbits(32),
        ]
    if kind == "append":
        return ["write", name, sizes[name], rng.choice([10, 3000, 50_000]), rng.getrandbits(32)]
    if kind == "truncate":
        return ["truncate", name, rng.choice([0, rng.randrange(500_000)])]
    if kind == "rename":
        return ["rename", name, rng.choice(NAMES)]
    if kind == "xattr":
        return ["xattr", name, rng.choice([10, 3000]), rng.getrandbits(32)]
    if kind == "exchange" and len(sizes) > 1:
        return ["exchange", *rng.sample(sorted(sizes), 2)]
    if kind == "unlink":
        return ["unlink", name]
    return ["fsync", name]


class Model:
    """What a directory holds: content and attribute of each file."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self.xattrs: dict[str, bytes] = {}  # by name, as they move with it

    def apply(self, call: list[Any]) -> None:
        """Do a call."""
        kind, name, *rest = call
        if kind == "create":
            self.files[name] = bytearray()
            self.xattrs.pop(name, None)
        elif kind == "write":
            at, length, seed = rest
            data = self.files[name]
            data.extend(bytes(max(0, at - len(data))))
            data[at : at + length] = content(seed, length)
        elif kind == "truncate":
            data = self.files[name]
            del data[rest[0] :]
            data.extend(bytes(rest[0] - len(data)))
        elif kind == "unlink":
            del self.files[name]
            self.xattrs.pop(name, None)
        elif kind == "rename" and name != rest[0]:
            self.files[rest[0]] = self.files.pop(name)
            self.xattrs.pop(rest[0], None)
            if name in self.xattrs:
                self.xattrs[rest[0]] = self.xattrs.pop(name)
        elif kind == "exchange":
            tables: tuple[dict[str, Any], ...] = (self.files, self.xattrs)
            for table in tables:
                both = {new: table.pop(old) for new, old in ((name, rest[0]), (rest[0], name)) if old in table}
                table.update(both)
        elif kind == "xattr":
            self.xattrs[name] = content(rest[1], rest[0])

    def differences(self, folder: Path, but: str = "") -> list[str]:
        """What is otherwise in the directory, one line each; not looking into the file ``but``."""
        found = sorted(os.listdir(folder))
        lines = [] if found == sorted(self.files) else [f"names: expected {sorted(self.files)}, found {found}"]
        for name in set(found) & set(self.files) - {but}:
            data, wanted = (folder / name).read_bytes(), self.files[name]
            if data != wanted:
                at = next((i for i, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b), None)
                lines.append(f"{name}: {len(wanted)} bytes expected, {len(data)} found, first difference at {at}")
            xattr = os.getxattr(folder / name, "user.load") if os.listxattr(folder / name) else None
            if xattr != self.xattrs.get(name):
                lines.append(f"{name}: another attribute")
        return lines


class Load:
    """The process, seen from the test."""

    def __init__(self, folder: Path, seed: int, log: Path) -> None:
        self.folder, self.seed, self.log = folder, seed, log
        self.log.touch()
        words = [sys.executable, "-I", __file__, str(folder), str(seed), str(log)]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def lines(self) -> int:
        """How far it is: two lines a call."""
        return self.log.read_bytes().count(b"\n")

    def wait(self) -> None:
        """Wait for its end: the filesystem was killed."""
        _, complaint = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaint

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.communicate()

    def verify(self) -> int:
        """Compare the directory with what the calls that returned must have made of it; how many they were."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        model = Model()
        pending = None
        count = 0
        for entry in entries:
            if entry == "done":
                assert pending is not None
                model.apply(pending)
                count += 1
                pending = None
            elif entry == "failed":
                break
            else:
                pending = entry
        before = model.differences(self.folder)
        if pending is None or not before:
            assert before == [], f"seed {self.seed}, {count} calls returned"
            return count
        sizes = {name: len(data) for name, data in model.files.items()}
        old = bytes(model.files.get(pending[1], b""))
        model.apply(pending)
        after = model.differences(self.folder)
        if after and pending[0] == "write":
            # The beginning of a write may be there: each byte is the old one or the new one, in one piece.
            name = pending[1]
            assert model.differences(self.folder, but=name) == [], f"seed {self.seed}: {pending}"
            data = (self.folder / name).read_bytes()
            new = bytes(model.files[name])
            cut = next(i for i in range(len(new) + 1) if i == len(data) or i == len(new) or data[i] != new[i])
            assert data[cut:] == old[cut:], f"seed {self.seed}: {pending} in part, and not its beginning"
            return count
        assert after == [], f"seed {self.seed}, {count} calls returned, {pending} did not: {before} before it; {sizes}"
        return count


def main() -> None:
    """The process: make calls until one fails with ENOTCONN, ECONNABORTED or EIO."""
    folder, seed, log = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "wb", buffering=0)  # noqa: SIM115
    os.chdir(folder)
    rng = random.Random(seed)
    libc = ctypes.CDLL(None, use_errno=True)
    sizes: dict[str, int] = {}
    files: dict[str, int] = {}

    def opened(name: str) -> int:
        if name not in files:
            files[name] = os.open(name, os.O_RDWR)
        return files[name]

    def close(*names: str) -> None:
        for name in names:
            if name in files:
                os.close(files.pop(name))

    try:
        while True:
            call = choose(rng, sizes)
            log.write(json.dumps(call).encode() + b"\n")
            kind, name, *rest = call
            if kind == "create":
                files[name] = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                sizes[name] = 0
            elif kind == "write":
                at, length, number = rest
                if os.pwrite(opened(name), content(number, length), at) != length:
                    raise OSError(errno.EIO, "a short write: the server died between its parts")
                sizes[name] = max(sizes[name], at + length)
            elif kind == "truncate":
                os.ftruncate(opened(name), rest[0])
                sizes[name] = rest[0]
            elif kind == "unlink":
                os.unlink(name)
                close(name)
                del sizes[name]
            elif kind == "rename":
                os.rename(name, rest[0])
                if name != rest[0]:
                    close(name, rest[0])
                    sizes[rest[0]] = sizes.pop(name)
            elif kind == "exchange":
                if libc.renameat2(-100, name.encode(), -100, rest[0].encode(), 2):
                    raise OSError(ctypes.get_errno(), "renameat2")
                close(name, rest[0])
                sizes[name], sizes[rest[0]] = sizes[rest[0]], sizes[name]
            elif kind == "xattr":
                os.setxattr(name, "user.load", content(rest[1], rest[0]))
            else:
                os.fsync(opened(name))
            log.write(b'"done"\n')
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
            raise
        log.write(b'"failed"\n')


if __name__ == "__main__":
    main()
