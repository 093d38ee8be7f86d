"""What is done to a region, and in which states: the table of the proof.

There is one journal for one transaction: "journal wrap-around" is the sequence number that wraps (state old-sequence)
and a body over an older, longer one (every state has a body full of old bytes); "a full journal" cannot be, as mkfs
makes it as large as the largest transaction: the states whose slabs are full and the operations that move whole blocks
make those, and the proof compares their size with the journal's.
"""

import stat
from collections.abc import Callable
from typing import NamedTuple

from pkernfs.format import PAGE
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.ram import create_ram
from pkernfs.fs.rename import RENAME_EXCHANGE, RENAME_NOREPLACE
from pkernfs.iommu.reclaim import acknowledge
from tests.core.crash.states import LEAF_EXTENTS
from tests.core.support import ME, ROOT, MiB, mkdir, unmap

BLOCK = 2 * MiB
Run = Callable[[Filesystem], object]


class Operation(NamedTuple):
    """One call (or a few that end the same way).

    ``content``: it writes; the bytes may be there in part after a crash, all else happens or not.
    """

    run: Run
    content: bool = False


def create(name: bytes, kind: int, parent: bytes = b"", **more: object) -> Run:
    return lambda fs: fs.create(fs.resolve(parent), name, kind, ME, **more)  # type: ignore[arg-type]


def unlink(path: bytes, *, opened: bool = False, forget: bool = False) -> Run:
    def run(fs: Filesystem) -> None:
        parent, _, name = path.rpartition(b"/")
        ino = fs.resolve(path)
        if opened:
            fs.lookups.add(ino)
        fs.unlink(fs.resolve(parent), name)
        if forget:
            fs.reclaimer.forget(ino, 1)

    return run


def rmdir(path: bytes, *, opened: bool = False) -> Run:
    def run(fs: Filesystem) -> None:
        if opened:
            fs.lookups.add(fs.resolve(path))
        parent, _, name = path.rpartition(b"/")
        fs.rmdir(fs.resolve(parent), name)

    return run


def rename(old: bytes, new: bytes, flags: int = 0, opened: bytes = b"") -> Run:
    def run(fs: Filesystem) -> None:
        if opened:
            fs.lookups.add(fs.resolve(opened))
        parent, _, name = old.rpartition(b"/")
        new_parent, _, new_name = new.rpartition(b"/")
        fs.rename(fs.resolve(parent), name, fs.resolve(new_parent), new_name, flags)

    return run


def setattr_(path: bytes, **change: int) -> Run:
    return lambda fs: fs.setattr(fs.resolve(path), SetAttr(**change))


def setxattr(path: bytes, name: bytes, value: bytes) -> Run:
    return lambda fs: fs.setxattr(fs.resolve(path), name, value)


def removexattr(path: bytes, name: bytes) -> Run:
    return lambda fs: fs.removexattr(fs.resolve(path), name)


def write(path: bytes, offset: int, count: int) -> Run:
    return lambda fs: fs.write(fs.resolve(path), offset, b"W" * count)


NAMES: dict[str, Run] = {
    "create": create(b"new", stat.S_IFREG | 0o644),
    "create-ram": lambda fs: create_ram(fs, ROOT, b"new", BLOCK + PAGE, 0o600, ME),
    "create-ram-in-pieces": lambda fs: create_ram(fs, ROOT, b"new", 5 * PAGE, 0o600, ME, fragmented=True),
    "create-first": create(b"new", stat.S_IFREG | 0o644, b"empty"),
    "mkdir": lambda fs: mkdir(fs, b"new"),
    "mkfifo": create(b"new", stat.S_IFIFO | 0o600),
    "mknod": create(b"new", stat.S_IFCHR | 0o600, rdev=0x103),
    "mksock": create(b"new", stat.S_IFSOCK | 0o600, b"d"),
    "symlink-short": create(b"new", stat.S_IFLNK | 0o777, target=b"t" * 9),
    "symlink-long": create(b"new", stat.S_IFLNK | 0o777, target=b"t" * 999),
    "link": lambda fs: fs.link(fs.resolve(b"g"), ROOT, b"new"),
    "unlink": unlink(b"link"),
    "unlink-fifo": unlink(b"fifo"),
    "unlink-one-of-two": unlink(b"g"),
    "unlink-only-name": unlink(b"d/e/inner"),
    "unlink-big": unlink(b"big"),
    "unlink-sparse": unlink(b"sparse"),
    "unlink-open": unlink(b"sparse", opened=True),
    "unlink-open-and-forget": unlink(b"sparse", opened=True, forget=True),
    "unlink-open-big-and-forget": unlink(b"big", opened=True, forget=True),
    "rmdir": rmdir(b"empty"),
    "rmdir-open": rmdir(b"empty", opened=True),
    "rename": rename(b"link", b"new"),
    "rename-directory": rename(b"d", b"new"),
    "rename-to-other-directory": rename(b"link", b"empty/new"),
    "rename-directory-down": rename(b"empty", b"d/new"),
    "rename-directory-up": rename(b"d/e", b"new"),
    "rename-noreplace": rename(b"big", b"d/new", RENAME_NOREPLACE),
    "rename-same-inode": rename(b"g", b"d/f"),
    "rename-over-file": rename(b"g", b"big"),
    "rename-over-file-elsewhere": rename(b"five", b"d/e/inner"),
    "rename-over-file-with-two-names": rename(b"big", b"g"),
    "rename-over-sparse": rename(b"fifo", b"sparse"),
    "rename-over-open-file": rename(b"five", b"big", opened=b"big"),
    "rename-over-open-sparse": rename(b"d/f", b"sparse", opened=b"sparse"),
    "rename-over-directory": rename(b"d/e", b"empty"),
    "rename-over-open-directory": rename(b"d/e", b"empty", opened=b"empty"),
    "rename-over-link": rename(b"big", b"link"),
    "exchange-files": rename(b"big", b"g", RENAME_EXCHANGE),
    "exchange-files-elsewhere": rename(b"link", b"d/e/inner", RENAME_EXCHANGE),
    "exchange-file-and-directory": rename(b"big", b"empty", RENAME_EXCHANGE),
    "exchange-directory-and-file-elsewhere": rename(b"empty", b"d/f", RENAME_EXCHANGE),
    "exchange-directories": rename(b"d", b"empty", RENAME_EXCHANGE),
    "exchange-directories-elsewhere": rename(b"empty", b"d/e", RENAME_EXCHANGE),
}

ATTRIBUTES: dict[str, Run] = {
    "chmod": setattr_(b"g", mode=0o4711),
    "chown": setattr_(b"set-id", uid=3, gid=4),
    "utimens": setattr_(b"d", atime=5, mtime=-6),
    "all-attributes": setattr_(b"g", mode=0o600, uid=3, gid=4, size=PAGE, atime=7, mtime=8),
    "set-direct": lambda fs: fs.attributes.set_region_mapped(fs.resolve(b"big"), True),
    "hold": lambda fs: fs.holds.hold(fs.resolve(b"big"), "saved"),
    "hold-one-with-attributes": lambda fs: fs.holds.hold(fs.resolve(b"g"), "w" * 255),
    "xattr-first": setxattr(b"big", b"user.new", b"value"),
    "xattr-first-large": setxattr(b"big", b"user.new", b"w" * 5000),
    "xattr-small": setxattr(b"d", b"user.new", b"value"),
    "xattr-large": setxattr(b"d", b"user.new", b"w" * 60_000),
    "xattr-one-of-many": setxattr(b"g", b"user.new", b"w" * 500),
    "xattr-small-by-small": setxattr(b"d", b"user.small", b"w" * 99),
    "xattr-small-by-large": setxattr(b"d", b"user.small", b"w" * 513),
    "xattr-large-by-large": setxattr(b"d", b"user.large", b"w" * 9001),
    "xattr-large-by-small": setxattr(b"d", b"user.large", b"w"),
    "xattr-remove-small": removexattr(b"d", b"user.small"),
    "xattr-remove-large": removexattr(b"d", b"user.large"),
    "xattr-remove-last": removexattr(b"empty", b"user.only"),
    "xattr-remove-one-of-many": removexattr(b"g", b"user.07"),
}

SIZES: dict[str, Run] = {
    **{
        f"grow-{size}": setattr_(b"g", size=size)
        for size in (11, PAGE, PAGE + 1, 3 * PAGE + 1, MiB - 1, MiB, BLOCK - 1, BLOCK, BLOCK + 1, 5 * MiB)
    },
    **{
        f"cut-{size}": setattr_(b"big", size=size)
        for size in (BLOCK + 100_000, BLOCK + 1, BLOCK, BLOCK - 1, MiB, MiB - 1, 100_000, PAGE + 1, PAGE, 1, 0)
    },
    **{f"cut-sparse-{pages}": setattr_(b"sparse", size=pages * PAGE) for pages in (50, 9, 1, 0)},
    "cut-sparse-inside": setattr_(b"sparse", size=8 * PAGE + 1),
    "grow-sparse": setattr_(b"sparse", size=200 * PAGE),
    "grow-big-in-its-block": setattr_(b"big", size=3 * MiB),
    "cut-inline-extents": setattr_(b"five", size=7 * PAGE),
}

WRITES: dict[str, Run] = {
    "overwrite": write(b"big", 12_345, 20_000),
    "append-in-page": write(b"g", 10, 100),
    "append-behind-gap": write(b"g", 1000, 100),
    "append-pages": write(b"g", 4000, 30_000),
    "append-to-block": write(b"big", 3_000_100, 5000),
    "append-behind-gap-in-block": write(b"big", 3_100_000, 5000),
    "hole": write(b"sparse", 5 * PAGE, 5000),
    "over-holes": write(b"sparse", 100, 200_000),
    "sixth-extent": write(b"five", 20 * PAGE, 10),
    "makes-block": write(b"sparse", 0, MiB + 70_000),
    "blocks": write(b"g", 0, BLOCK + 5000),
    "far-away": write(b"g", 1 << 40, 10),
}

DOMAINS: dict[str, Run] = {
    "domain-made": create(b"new", stat.S_IFREG | 0o644, b"iommu"),
    "domain-first-block": setattr_(b"iommu/empty", size=BLOCK),
    "domain-removed": unlink(b"iommu/dom-0"),
    "domain-removed-while-open": unlink(b"iommu/dom-0", opened=True),
    "domain-renamed": rename(b"iommu/dom-0", b"iommu/new"),
    "domain-replaced": rename(b"iommu/empty", b"iommu/dom-0"),
    "mapped-file-removed": unlink(b"five"),
    "mapped-file-replaced": rename(b"d/f", b"big"),
    "mapped-file-cut": setattr_(b"big", size=BLOCK),
    "mapped-file-grown": write(b"five", 20 * PAGE, 400 * PAGE),
    "last-mapping-goes": lambda fs: unmap(fs, fs.resolve(b"iommu/dom-0"), 1000),
}

OPERATIONS: dict[str, Operation] = {
    **{name: Operation(run) for name, run in {**NAMES, **ATTRIBUTES, **SIZES}.items()},
    **{name: Operation(run, content=True) for name, run in WRITES.items()},
    **{name: Operation(run, content=name == "mapped-file-grown") for name, run in DOMAINS.items()},
    # For one state only.
    "mount": Operation(lambda fs: None),
    "new-extent-level": Operation(write(b"leaf", 3 * LEAF_EXTENTS * PAGE, 10), content=True),
    "new-extent-inside": Operation(write(b"leaf", 100 * PAGE, 10), content=True),
    "cut-extent-level": Operation(setattr_(b"levels", size=(3 * LEAF_EXTENTS - 9) * PAGE)),
    "unlink-levels": Operation(unlink(b"levels")),
    "release": Operation(lambda fs: fs.holds.release(fs.resolve(b"held"))),
    "hold-another": Operation(lambda fs: fs.holds.hold(fs.resolve(b"big"), "saved")),
    "quota-set": Operation(lambda fs: fs.quotas.set(fs.resolve(b"empty"), 1 << 30)),
    "quota-within": Operation(create(b"new", stat.S_IFREG | 0o644, b"limited")),
    "quota-removed": Operation(rmdir(b"limited")),
    "quota-taken": Operation(lambda fs: fs.quotas.set(ROOT, 0)),
    "fill-holes": Operation(write(b"five", 100 * PAGE, 40 * PAGE), content=True),
    "last-slot-goes": Operation(unlink(b"last")),
    "acknowledged": Operation(acknowledge),
    "last-page-goes": Operation(removexattr(b"filler", b"user.last")),
}

#: What does something else in a state than in "small".
CASES: dict[str, list[str]] = {
    "small": [*NAMES, *ATTRIBUTES, *SIZES, *WRITES],
    "tight": [*NAMES, *ATTRIBUTES, *SIZES, *WRITES],
    "split": ["create", "mkdir", "symlink-long", "link", "rename", "rename-directory-up", "exchange-files"],
    "merge": ["unlink", "rename", "rename-to-other-directory"],
    "no-slots": ["create", "mkdir", "symlink-short", "create-first", "mkfifo"],
    "no-pages": [
        "create",
        "mkdir",
        "symlink-long",
        "create-first",
        "xattr-first-large",
        "grow-4097",
        "hole",
        "append-pages",
    ],
    "last-slot": ["last-slot-goes", "create"],
    "last-page": ["last-page-goes", "unlink-sparse", "create"],
    "holes": ["fill-holes", "xattr-large", "symlink-long", "unlink-sparse"],
    "leaves": ["new-extent-level", "new-extent-inside", "cut-extent-level", "unlink-levels"],
    "removed": ["mount", "create", "grow-5242880"],
    "quotas": [
        *NAMES,
        "cut-sparse-inside",
        "append-pages",
        "hole",
        "xattr-large",
        "quota-set",
        "quota-removed",
        "quota-within",
        "quota-taken",
    ],
    "old-sequence": ["create", "unlink-sparse", "append-pages"],
    "domains": [*DOMAINS],
    "held": ["release", "hold-another"],
    "awaiting": [
        *("cut-100000", "cut-0", "cut-sparse-9", "cut-sparse-0", "cut-inline-extents", "grow-sparse"),
        *("unlink-sparse", "mapped-file-removed", "mapped-file-replaced", "hole", "acknowledged"),
    ],
}
EVERY: list[tuple[str, str]] = [(state, name) for state, names in CASES.items() for name in names]
