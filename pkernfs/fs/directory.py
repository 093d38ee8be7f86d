"""Directories: names to inode numbers, in a tree keyed by the hash of the name; the keys are the readdir cookies."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pkernfs.errors import CorruptError, FsError, PkernfsError, file_type, mode_text, quoted
from pkernfs.format import DIRENT, KEY_SLOTS, NAME_MAX, ORPHANS_INO, ROOT_INO, Ino, Inode
from pkernfs.fs.damage import corrupt_inode
from pkernfs.fs.named import NamedTree
from pkernfs.fs.transaction import Transaction
from pkernfs.fs.volume import Volume

# A name's key is its cookie, for good: a cookie that is a position shifts when another entry is removed, and a listing
# that goes on from it after a takeover would leave names out.
KEYS_END = (1 << 62) + KEY_SLOTS  #: of the keys that names have; readdir cookies are a little larger, and signed


class Entry(NamedTuple):
    """One name in a directory."""

    key: int  #: readdir cookie
    ino: Ino
    mode: int  #: S_IFMT bits
    name: bytes


def check_name(name: bytes) -> None:
    """Raise FsError, ENAMETOOLONG or EINVAL, when nothing can be called so."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG, quoted(name))
    if not name or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL, quoted(name))


class Directory:
    """The entries of directory ``ino``.  ``finish`` gives the changed inode."""

    def __init__(self, volume: Volume, ino: Ino, inode: Inode) -> None:
        self.volume = volume
        self.ino = ino
        self.inode = inode
        self.tree = NamedTree(volume, ino, inode.root)
        self.entries = 0  #: added minus removed

    def _bad(self, found: str) -> CorruptError:
        return corrupt_inode(self.ino, found, f"directory {self.ino}")

    def decode(self, key: int, value: bytes) -> Entry:
        """An item of the tree as the entry that it should be.  Raises CorruptError."""
        if len(value) <= DIRENT.size:
            raise self._bad(f"an entry of {len(value)} bytes")
        dirent = DIRENT.unpack(value)
        name = value[DIRENT.size :]
        bad_name = len(name) != dirent.length or len(name) > NAME_MAX or b"/" in name or b"\0" in name
        if bad_name or name in (b".", b"..") or key >= KEYS_END:
            raise self._bad(f"an entry with the name {quoted(name)} at key {key:#x}")
        return Entry(key, dirent.ino, dirent.mode, name)

    def find(self, name: bytes) -> Entry | None:
        """The entry with this name, or None."""
        if not self.tree.root:
            return None
        for key, value in self.tree.items_for(name):
            if value[DIRENT.size :] == name:
                return self.decode(key, value)
        return None

    def scan(self, first: int = 0, bad: Callable[[CorruptError], object] | None = None) -> Iterator[Entry]:
        """The entries from cookie ``first`` on.  ``bad`` is told of those that cannot be; without it they raise."""
        for key, value in self.tree.scan(first):
            try:
                entry = self.decode(key, value)
            except CorruptError as error:
                if bad is None:
                    raise
                bad(error)
            else:
                yield entry

    def check_takes(self, name: bytes) -> None:
        """Raise FsError when nothing can get this name here: ENOENT when the directory was removed, EEXIST for dots."""
        if not self.inode.nlink:
            raise FsError(errno.ENOENT, "the directory was removed")
        if name in (b".", b".."):
            raise FsError(errno.EEXIST, quoted(name))

    def target(self, entry: Entry) -> Inode:
        """The inode that an entry names.  Raises CorruptError when they do not agree.

        A directory is reached from the one that it has as its parent only, so that there are no loops to walk into.
        """
        ino = entry.ino
        if ino in (ROOT_INO, ORPHANS_INO):
            raise self._bad(f"{quoted(entry.name)} names inode {ino}, which has no name of its own")
        inode = self.volume.inode_named_by(self.ino, ino)
        found = ""
        if stat.S_IFMT(inode.mode) != entry.mode:
            found = f"{mode_text(inode.mode)}, its name says {file_type(entry.mode)}"
        elif stat.S_ISDIR(inode.mode) and inode.parent != self.ino:
            if self._is_stranger(ino, inode):
                raise self._bad(f"{quoted(entry.name)} names directory {ino}, which is in directory {inode.parent}")
            found = f"parent {inode.parent}, its name is in directory {self.ino}"
        if found:
            raise corrupt_inode(ino, found)
        return inode

    def _is_stranger(self, ino: Ino, inode: Inode) -> bool:
        """Whether directory ``ino`` has its name in its parent, and this entry is one too many.

        Looked up once only: then one of the two is known as damaged.
        """
        known = self.volume.damage.inodes
        if ino in known or self.ino in known:
            return ino not in known
        try:
            parent = Directory(self.volume, inode.parent, self.volume.inode(inode.parent))
            return stat.S_ISDIR(parent.inode.mode) and any(one.ino == ino for one in parent.scan())
        except PkernfsError:
            return False

    def add(self, tx: Transaction, name: bytes, ino: Ino, mode: int) -> None:
        """Add a name that is not there.  Raises FsError(ENOSPC)."""
        key = self.tree.free_key(name)
        self.tree.put(tx, key, DIRENT.pack_values(ino, stat.S_IFMT(mode), len(name)) + name)
        self.entries += 1

    def replace(self, tx: Transaction, entry: Entry, ino: Ino, mode: int) -> None:
        """Let an existing name stand for another inode."""
        self.tree.put(tx, entry.key, DIRENT.pack_values(ino, stat.S_IFMT(mode), len(entry.name)) + entry.name)

    def remove(self, tx: Transaction, entry: Entry) -> None:
        """Remove an entry that was found.  Never allocates."""
        self.tree.delete(tx, entry.key)
        self.entries -= 1

    def finish(self, now: int) -> Inode:
        """The inode with the changes: tree, pages, number of entries, mtime and ctime."""
        return self.inode._replace(
            root=self.tree.root,
            pages=self.inode.pages + self.tree.pages,
            size=self.inode.size + self.entries,
            mtime=now,
            ctime=now,
        )


def open_directory(volume: Volume, ino: Ino) -> Directory:
    """The directory ``ino``.  Raises FsError: ESTALE, ENOTDIR."""
    inode = volume.inode(ino)
    if not stat.S_ISDIR(inode.mode):
        raise FsError(errno.ENOTDIR, f"inode {ino} is not a directory")
    return Directory(volume, ino, inode)
