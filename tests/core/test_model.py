"""Random programs against a model of plain dicts and bytearrays, with remounts in between."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pkernfs.errors import FsError
from pkernfs.format import Ino
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.rename import RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.core.support import ME, ROOT, MiB, assert_sound, new_fs, open_fs

LIMIT = 6 * MiB


class Node:
    """A file or directory of the model."""

    def __init__(self, ino: Ino, mode: int) -> None:
        self.ino = ino
        self.mode = mode
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.data = bytearray()
        self.xattrs: dict[bytes, bytes] = {}
        self.entries: dict[bytes, Node] = {}
        self.parent: Node = self
        self.opened = 0

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"long" * 60])
XATTRS = st.sampled_from([b"user.a", b"user.b", b"trusted." + b"c" * 200])
SIZES = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, 4097, MiB - 4096, MiB, 2 * MiB - 1, 2 * MiB, 2 * MiB + 1, 5 * MiB]),
    st.integers(0, 40_000),
    st.integers(0, LIMIT),
)
COUNTS = st.one_of(st.sampled_from([1, 100, 4096, 5000, 130_000, MiB]), st.integers(1, 20_000))
PICK = st.integers(0, 10**6)


class Machine(RuleBasedStateMachine):
    """The rules."""

    def __init__(self) -> None:
        super().__init__()
        self.fs: Filesystem = self.made()
        self.root = Node(ROOT, stat.S_IFDIR)
        self.orphans: dict[int, Node] = {}

    def made(self) -> Filesystem:
        return new_fs(14)

    @initialize(lazy=st.booleans())
    def begin(self, lazy: bool) -> None:
        self.fs.reclaimer.in_background = self.lazy = lazy

        for n in range(4):
            self.create(n, b"ab"[n % 2 : n % 2 + 1], stat.S_IFDIR)
            self.create(n, b"cd"[n % 2 : n % 2 + 1], stat.S_IFREG)

    # -- picking ---------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Everything with a name, and open files without one."""
        found: dict[int, Node] = {}
        todo = [self.root]
        while todo:
            node = todo.pop()
            found[node.ino] = node
            todo += [child for child in node.entries.values() if child.ino not in found]
        return list(found.values()) + [node for node in self.orphans.values() if node.ino not in found]

    def dir(self, pick: int) -> Node:
        all_dirs = [node for node in self.nodes() if node.is_dir]
        return all_dirs[pick % len(all_dirs)]

    def name(self, parent: Node, pick: int, name: bytes) -> bytes:
        """A name that is there, two times out of three, or any."""
        names = sorted(parent.entries)
        return names[pick // 3 % len(names)] if names and pick % 3 else name

    def file(self, pick: int) -> Node | None:
        files = [node for node in self.nodes() if stat.S_ISREG(node.mode)]
        return files[pick % len(files)] if files else None

    # -- both sides ------------------------------------------------------------------------------------------------

    def expect(
        self,
        number: int,
        operation: Callable[[], Any],
        *,
        content: bool = False,  # noqa: ARG002  # both are
        last: bool = True,  # noqa: ARG002  # for subclasses
    ) -> Any:
        """Run; ``number``: the errno that the model says.  None when there is no space, which the model cannot know.

        ``content``: it stores content.  ``last``: it is the last call of its rule.  Both are for the models that build
        upon this one.
        """
        try:
            result = operation()
        except FsError as error:
            if error.errno == errno.ENOSPC and number == 0:
                self.compare()
                return None
            if error.errno != number:
                raise
            return None
        assert number == 0, f"expected {errno.errorcode[number]}"
        return result if result is not None else True

    def drop(self, node: Node) -> None:
        """One name less."""
        node.nlink = 0 if node.is_dir else node.nlink - 1
        if not node.nlink and node.opened:
            self.orphans[node.ino] = node

    # -- rules -----------------------------------------------------------------------------------------------------

    @rule(where=PICK, name=NAMES, kind=st.sampled_from([stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]))
    def create(self, where: int, name: bytes, kind: int) -> None:
        parent = self.dir(where)
        number = 0 if parent.nlink else errno.ENOENT
        if not number and name in parent.entries:
            number = errno.EEXIST
        target = name * 100 if kind == stat.S_IFLNK else b""
        ino = self.expect(number, lambda: self.fs.create(parent.ino, name, kind | 0o644, ME, target=target[:4000]))
        if ino:
            node = Node(ino, kind | 0o644)
            node.data = bytearray(target[:4000])
            node.parent = parent
            parent.entries[name] = node
            parent.nlink += node.is_dir

    @rule(which=PICK, offset=SIZES, count=COUNTS, byte=st.integers(1, 255))
    def write(self, which: int, offset: int, count: int, byte: int) -> None:
        node = self.file(which)
        if node is None:
            return
        data = bytes([byte]) * count
        done = self.expect(0, lambda: self.fs.write(node.ino, offset, data), content=True)
        if done:
            node.data.extend(bytes(max(0, offset + done - len(node.data))))
            node.data[offset : offset + done] = data[:done]

    @rule(which=PICK, size=SIZES)
    def truncate(self, which: int, size: int) -> None:
        node = self.file(which)
        if node and self.expect(0, lambda: self.fs.setattr(node.ino, SetAttr(size=size))):
            del node.data[size:]
            node.data.extend(bytes(size - len(node.data)))

    @rule(which=PICK, step=st.integers(2, 9), count=st.integers(10, 100))
    def scatter(self, which: int, step: int, count: int) -> None:
        """Many extents."""
        node = self.file(which)
        if node is None:
            return
        for n in range(count):
            self.write_one(node, n * step * 4096, last=n == count - 1)

    def write_one(self, node: Node, offset: int, *, last: bool) -> None:
        if self.expect(0, lambda: self.fs.write(node.ino, offset, b"s"), content=True, last=last):
            node.data.extend(bytes(max(0, offset + 1 - len(node.data))))
            node.data[offset : offset + 1] = b"s"

    @rule(which=PICK, where=PICK, name=NAMES)
    def link(self, which: int, where: int, name: bytes) -> None:
        node, parent = self.file(which), self.dir(where)
        if node is None:
            return
        number = errno.ENOENT if not node.nlink or not parent.nlink else errno.EEXIST if name in parent.entries else 0
        if self.expect(number, lambda: self.fs.link(node.ino, parent.ino, name)):
            node.nlink += 1
            parent.entries[name] = node

    @rule(where=PICK, which=PICK, name=NAMES)
    def unlink(self, where: int, which: int, name: bytes) -> None:
        parent = self.dir(where)
        name = self.name(parent, which, name)
        node = parent.entries.get(name)
        number = errno.ENOENT if node is None else errno.EISDIR if node.is_dir else 0
        if self.expect(number, lambda: self.fs.unlink(parent.ino, name)):
            self.drop(parent.entries.pop(name))

    @rule(where=PICK, which=PICK, name=NAMES)
    def rmdir(self, where: int, which: int, name: bytes) -> None:
        parent = self.dir(where)
        name = self.name(parent, which, name)
        node = parent.entries.get(name)
        number = errno.ENOENT if node is None else 0 if node.is_dir else errno.ENOTDIR
        if node and node.entries:
            number = errno.ENOTEMPTY
        if self.expect(number, lambda: self.fs.rmdir(parent.ino, name)):
            self.drop(parent.entries.pop(name))
            parent.nlink -= 1

    @rule(
        a=PICK,
        b=PICK,
        which=PICK,
        onto=PICK,
        name=NAMES,
        new_name=NAMES,
        flags=st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]),
    )
    def rename(self, a: int, b: int, which: int, onto: int, name: bytes, new_name: bytes, flags: int) -> None:
        source, target = self.dir(a), self.dir(b)
        name, new_name = self.name(source, which, name), self.name(target, onto, new_name)
        number = self.rename_errno(source, name, target, new_name, flags)
        if not self.expect(number, lambda: self.fs.rename(source.ino, name, target.ino, new_name, flags)):
            return
        old, new = source.entries[name], target.entries.get(new_name)
        if old is new:
            return
        if flags == RENAME_EXCHANGE:
            assert new
            source.entries[name], target.entries[new_name] = new, old
            source.nlink += new.is_dir - old.is_dir
            target.nlink += old.is_dir - new.is_dir
            new.parent = source
        else:
            del source.entries[name]
            target.entries[new_name] = old
            source.nlink -= old.is_dir
            target.nlink += old.is_dir
            if new:
                target.nlink -= new.is_dir
                self.drop(new)
        old.parent = target

    def rename_errno(self, source: Node, name: bytes, target: Node, new_name: bytes, flags: int) -> int:
        old, new = source.entries.get(name), target.entries.get(new_name)
        if old is None or (flags == RENAME_EXCHANGE and new is None):
            return errno.ENOENT
        if flags == RENAME_NOREPLACE and new is not None:
            return errno.EEXIST
        if old.is_dir and self.is_below(target, old):
            return errno.EINVAL
        if new is None:
            return 0 if target.nlink else errno.ENOENT
        if old is new:
            return 0
        if flags == RENAME_EXCHANGE:
            return errno.EINVAL if new.is_dir and self.is_below(source, new) else 0
        if old.is_dir != new.is_dir:
            return errno.ENOTDIR if old.is_dir else errno.EISDIR
        return errno.ENOTEMPTY if new.entries else 0

    def is_below(self, node: Node, ancestor: Node) -> bool:
        while node is not ancestor:
            if node is self.root:
                return False
            node = node.parent
        return True

    @rule(which=PICK, name=XATTRS, size=st.sampled_from([0, 10, 512, 513, 5000, 65536]), byte=st.integers(1, 255))
    def setxattr(self, which: int, name: bytes, size: int, byte: int) -> None:
        node = self.nodes()[which % len(self.nodes())]
        value = bytes([byte]) * size
        if self.expect(0, lambda: self.fs.setxattr(node.ino, name, value)):
            node.xattrs[name] = value

    @rule(which=PICK, name=XATTRS)
    def removexattr(self, which: int, name: bytes) -> None:
        node = self.nodes()[which % len(self.nodes())]
        number = 0 if name in node.xattrs else errno.ENODATA
        if self.expect(number, lambda: self.fs.removexattr(node.ino, name)):
            del node.xattrs[name]

    @rule(which=PICK)
    def open(self, which: int) -> None:
        node = self.nodes()[which % len(self.nodes())]
        if node is not self.root:
            node.opened += 1
            self.fs.lookups.add(node.ino)

    @rule(which=PICK)
    def close(self, which: int) -> None:
        opened = [node for node in self.nodes() if node.opened]
        if opened:
            node = opened[which % len(opened)]
            node.opened -= 1
            self.expect(0, lambda: self.fs.reclaimer.forget(node.ino, 1))
            if not node.opened:
                self.orphans.pop(node.ino, None)

    @precondition(lambda self: self.fs.reclaimer.pending)
    @rule()
    def step(self) -> None:
        self.expect(0, self.fs.reclaimer.step)

    @rule()
    def remount(self) -> None:
        """The server is killed and the next one mounts."""
        self.compare()
        self.mount()
        self.compare()

    def mount(self) -> None:
        """A new server: nobody has anything open."""
        self.close_all()
        self.fs = open_fs(self.fs.region)
        self.fs.reclaimer.in_background = self.lazy
        assert self.fs.orphans.inos() == []

    def close_all(self) -> None:
        for node in self.nodes():
            node.opened = 0
        self.orphans.clear()

    # -- comparing -------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Everything is the same on both sides, and sound."""
        fs = self.fs
        for node in self.nodes():
            inode = fs.getattr(node.ino)
            hidden = 1 if node is self.root else 0
            assert stat.S_IFMT(inode.mode) == stat.S_IFMT(node.mode)
            assert inode.nlink == node.nlink + hidden
            assert {name: fs.getxattr(node.ino, name) for name in fs.listxattr(node.ino)} == node.xattrs
            if node.is_dir:
                entries = {entry.name: entry.ino for entry in fs.readdir(node.ino)}
                assert inode.size == len(entries)
                if hidden:
                    del entries[b"iommu"]
                assert entries == {name: child.ino for name, child in node.entries.items()}
                assert fs.lookup(node.ino, b"..") == node.parent.ino or not node.nlink
            elif stat.S_ISLNK(node.mode):
                assert fs.readlink(node.ino) == node.data
            else:
                assert inode.size == len(node.data)
                assert bytes(fs.read(node.ino, 0, len(node.data) + 1)) == bytes(node.data)
        assert_sound(fs)

    def teardown(self) -> None:
        self.compare()
        self.fs.reclaimer.settle()
        self.compare()
        for node in self.nodes():
            if node.opened:
                self.fs.reclaimer.forget(node.ino, node.opened)
        self.fs.reclaimer.settle()
        assert self.fs.orphans.inos() == []
        assert_sound(self.fs)


def run_machine(examples: int, steps: int, machine: type[Machine] = Machine) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_programs() -> None:
    run_machine(120, 60)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_many_random_programs() -> None:
    run_machine(200, 80)
