"""Print what is in an image: python -m tests.reader IMAGE."""

import mmap
import stat
import sys

from tests.reader.reader import Reader


def main(path: str) -> None:
    """Print what is in the image at ``path``."""
    with open(path, "rb") as file:
        reader = Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        print(f"label {reader.label!r}, {reader.blocks} blocks, {reader.free_pages()} pages free, "
              f"{reader.replayed} records of the journal applied")  # fmt: skip
        lines = [(name.decode(errors="backslashreplace"), entry) for name, entry in sorted(reader.tree().items())]
        lines += [(f"(orphan {ino})", entry) for ino, entry in reader.orphans().items()]
        for name, entry in lines:
            arrow = f" -> {entry.target.decode(errors='backslashreplace')}" if entry.target else ""
            facts = f"{entry.nlink:3} {entry.uid:5} {entry.gid:5} {entry.size:12} {len(entry.extents):4}x"
            print(f"{entry.ino:8} {stat.filemode(entry.mode)} {facts} {name}{arrow}")


if __name__ == "__main__":
    main(sys.argv[1])
