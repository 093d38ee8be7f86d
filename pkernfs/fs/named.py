"""Trees of things with names: directories and extended attributes."""

from __future__ import annotations

import errno

from pkernfs.errors import FsError
from pkernfs.format import KEY_SLOTS, name_key
from pkernfs.fs.btree import Tree


def free_key(tree: Tree, first: int) -> int:
    """The first of the KEY_SLOTS keys from ``first`` on that is not taken.  Raises FsError(ENOSPC)."""
    taken = {key for key, _ in tree.between(first, first + KEY_SLOTS - 1)}
    for key in range(first, first + KEY_SLOTS):
        if key not in taken:
            return key
    raise FsError(errno.ENOSPC, f"inode {tree.owner} holds {KEY_SLOTS} names of this hash already")


class NamedTree(Tree):
    """A tree whose keys are hashes of names.  Names with one hash stand in KEY_SLOTS keys behind one another."""

    def items_for(self, name: bytes) -> list[tuple[int, bytes]]:
        """What stands where ``name`` would: for the caller to compare."""
        first = name_key(self.volume.sb.hash_seed, name)
        return self.between(first, first + KEY_SLOTS - 1)

    def free_key(self, name: bytes) -> int:
        """The first key for ``name`` that is not taken.  Raises FsError(ENOSPC)."""
        return free_key(self, name_key(self.volume.sb.hash_seed, name))
