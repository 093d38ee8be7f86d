"""Held files, and guests' memory made in one step: what a filesystem in memory can show of them."""

import errno
import json
import os
import stat
import struct
from collections.abc import Callable

import pytest

from pkernfs import api
from pkernfs import format as f
from pkernfs.errors import FsError
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.filesystem import Filesystem
from pkernfs.fs.holds import Held
from pkernfs.fs.ram import create_ram
from pkernfs.fs.rename import RENAME_EXCHANGE
from pkernfs.iommu import mapping
from pkernfs.server.conversation import Conversation
from tests.core.support import (
    ME,
    ROOT,
    MiB,
    assert_sound,
    content,
    fails,
    mkdir,
    mkdomain,
    mkfile,
    new_fs,
    open_fs,
    tree,
    unchanged,
)

BLOCK = 2 * MiB


@pytest.fixture
def held() -> Filesystem:
    """A file "d/ram" with a second name "link", held, and another one."""
    fs = new_fs()
    ino = mkfile(fs, b"ram", b"RAM" * 5000, mkdir(fs, b"d"))
    fs.link(ino, ROOT, b"link")
    fs.setxattr(ino, b"user.x", b"y")
    mkfile(fs, b"other", b"other")
    assert fs.holds.hold(ino, "g1 is saved")
    return fs


#: What changes a held file, or its names.
REFUSED: dict[str, Callable[[Filesystem, f.Ino, f.Ino], object]] = {
    "write": lambda fs, ino, d: fs.write(ino, 0, b"x"),
    "append": lambda fs, ino, d: fs.write(ino, 15000, b"x"),
    "truncate": lambda fs, ino, d: fs.setattr(ino, SetAttr(size=0)),
    "grow": lambda fs, ino, d: fs.setattr(ino, SetAttr(size=5 * MiB)),
    "chmod": lambda fs, ino, d: fs.setattr(ino, SetAttr(mode=0o777)),
    "chown": lambda fs, ino, d: fs.setattr(ino, SetAttr(uid=5)),
    "utimes": lambda fs, ino, d: fs.setattr(ino, SetAttr(mtime=5)),
    "open-for-writing": lambda fs, ino, d: fs.attributes.check_open(ino, os.O_WRONLY),
    "open-for-both": lambda fs, ino, d: fs.attributes.check_open(ino, os.O_RDWR),
    "open-and-truncate": lambda fs, ino, d: fs.attributes.check_open(ino, os.O_RDONLY | os.O_TRUNC),
    "setxattr": lambda fs, ino, d: fs.setxattr(ino, b"user.x", b"z"),
    "removexattr": lambda fs, ino, d: fs.removexattr(ino, b"user.x"),
    "unlink": lambda fs, ino, d: fs.unlink(d, b"ram"),
    "unlink-other-name": lambda fs, ino, d: fs.unlink(ROOT, b"link"),
    "rename": lambda fs, ino, d: fs.rename(d, b"ram", d, b"new"),
    "rename-away": lambda fs, ino, d: fs.rename(d, b"ram", ROOT, b"new"),
    "rename-over": lambda fs, ino, d: fs.rename(ROOT, b"other", d, b"ram"),
    "exchange": lambda fs, ino, d: fs.rename(ROOT, b"other", d, b"ram", RENAME_EXCHANGE),
    "exchange-back": lambda fs, ino, d: fs.rename(d, b"ram", ROOT, b"other", RENAME_EXCHANGE),
    "link": lambda fs, ino, d: fs.link(ino, ROOT, b"third"),
    "remove-its-directory": lambda fs, ino, d: fs.unlink(d, b"ram") or fs.rmdir(ROOT, b"d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_changes_a_held_file(held: Filesystem, name: str) -> None:
    """As with chattr +i, EPERM for root too; afterwards, and after a mount, it is as it was."""
    ino, directory = held.resolve(b"d/ram"), held.resolve(b"d")
    unchanged(held, errno.EPERM, lambda: REFUSED[name](held, ino, directory))
    again = open_fs(held.region)
    unchanged(again, errno.EPERM, lambda: REFUSED[name](again, ino, directory))
    assert held.holds.release(ino)
    REFUSED[name](held, ino, directory)
    assert_sound(held)


def test_what_goes_on_around_a_held_file(held: Filesystem) -> None:
    ino = held.resolve(b"d/ram")
    held.rename(ROOT, b"d", ROOT, b"e")
    held.quotas.set(held.resolve(b"e"), 0) if held.quotas.get(ino).ino else None
    held.attributes.check_open(ino, os.O_RDONLY)
    assert content(held, ino) == b"RAM" * 5000
    held.attributes.set_region_mapped(ino, True)
    assert held.holds.of(ino, held.getattr(ino)) == Held(held.holds.of(ino, held.getattr(ino)).since, "g1 is saved")  # type: ignore[union-attr]
    assert_sound(held)


def test_a_quota_around_a_held_file() -> None:
    fs = new_fs()
    d = mkdir(fs, b"d")
    ino = mkfile(fs, b"ram", b"RAM", d)
    fs.holds.hold(ino, "saved")
    fs.quotas.set(d, MiB)
    with fails(errno.EPERM):
        fs.unlink(d, b"ram")
    fs.quotas.set(d, 0)
    assert fs.holds.of(ino, fs.getattr(ino)) is not None
    assert_sound(fs)


def test_what_is_held(held: Filesystem) -> None:
    """Only regular files, that are no page tables and have a name; for one reason at a time."""
    ino = held.resolve(b"link")
    assert not held.holds.hold(ino, "g1 is saved")
    unchanged(held, errno.EEXIST, lambda: held.holds.hold(ino, "another reason"))
    for other in (ROOT, held.resolve(b"d"), held.resolve(b"iommu/root-pgtables"), mkdomain(held)):
        unchanged(held, errno.EINVAL, lambda other=other: held.holds.hold(other, "why"))  # type: ignore[misc]
    for reason in ("", "x" * 256, "two\nlines", "\udcff"):
        unchanged(held, errno.EINVAL, lambda reason=reason: held.holds.hold(held.resolve(b"other"), reason))  # type: ignore[misc]
    assert held.holds.hold(held.resolve(b"other"), "\u00e4" * 127)
    gone = mkfile(held, b"gone")
    held.lookups.add(gone)
    held.unlink(ROOT, b"gone")
    with fails(errno.ENOENT):
        held.holds.hold(gone, "why")
    assert [one for one in held.holds.all() if one] == sorted([ino, held.resolve(b"other")])


def test_release_leaves_nothing() -> None:
    fs = new_fs()
    ino = mkfile(fs, b"ram", b"RAM")
    before = tree(fs)
    fs.holds.hold(ino, "saved")
    assert fs.volume.sb.ro_compat & f.RO_COMPAT_HELD
    assert fs.holds.release(ino)
    assert not fs.holds.release(ino)
    assert tree(fs) == before
    assert [one for one in fs.holds.all() if one] == []


@pytest.mark.parametrize("verb", ["hold", "release"])
def test_only_root_may_ask(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """Of the users that a control socket answers, root and the owner of the mount."""

    class Connection:
        uid = 1000

        def getsockopt(self, *_: int) -> bytes:
            return struct.pack("3i", 1, self.uid, 100)

    monkeypatch.setattr(os, "getuid", lambda: 1000)
    line = json.dumps({"verb": verb, "ino": 5, **({"reason": "x"} if verb == "hold" else {})}).encode() + b"\n"
    for uid, allowed in ((1000, False), (0, True)):
        connection = Connection()
        connection.uid = uid
        conversation = Conversation(connection, api.Server.WORKER, 1)
        conversation.feed(line)
        request = conversation.next()
        assert isinstance(request, api.Request) == allowed
        assert allowed or (isinstance(request, FsError) and request.errno == errno.EPERM)


def test_a_device_gets_no_held_memory_to_write_to() -> None:
    fs = new_fs()
    ino = create_ram(fs, ROOT, b"ram", BLOCK, 0o600, ME)
    domain = mkdomain(fs)
    fs.holds.hold(ino, "saved")
    with fails(errno.EPERM):
        mapping.map_file(fs, domain, 0, ino)
    mapping.map_file(fs, domain, 0, ino, access="ro")
    fs.holds.release(ino)
    mapping.map_file(fs, domain, BLOCK, ino)
    fs.holds.hold(ino, "saved")
    mapping.map_file(fs, domain, BLOCK, ino, live_update=True)


def scatter(fs: Filesystem, keep: int) -> None:
    """No two free blocks side by side, beyond the first ``keep``."""
    kept = create_ram(fs, ROOT, b"keep", keep * BLOCK, 0o600, ME) if keep else None
    names: list[bytes] = []
    while fs.volume.space.free_blocks > 1:
        names.append(b"block%d" % len(names))
        create_ram(fs, ROOT, names[-1], BLOCK, 0o600, ME)
    for name in names[1::2]:
        fs.unlink(ROOT, name)
    if kept:
        fs.unlink(ROOT, b"keep")


def test_ram_is_allocated_and_in_one_piece() -> None:
    fs = new_fs()
    for n, size in enumerate((4096, MiB, BLOCK, BLOCK + 4096, 9 * MiB)):
        ino = create_ram(fs, ROOT, b"%d" % n, size, 0o640, ME)
        inode = fs.getattr(ino)
        (extent,) = fs.content.extents(ino)
        assert (inode.size, stat.S_IMODE(inode.mode), inode.uid, inode.gid) == (size, 0o640, ME.uid, ME.gid)
        assert extent.start == 0
        assert extent.length * 4096 >= size
        assert extent.page % 512 == 0
        assert content(fs, ino) == bytes(size)
    assert_sound(fs)


def test_ram_takes_the_piece_that_is_there_or_nothing() -> None:
    fs = new_fs()
    scatter(fs, keep=3)
    unchanged(fs, errno.ENOSPC, lambda: create_ram(fs, ROOT, b"ram", 4 * BLOCK, 0o600, ME))
    ino = create_ram(fs, ROOT, b"ram", 3 * BLOCK, 0o600, ME)
    assert len(fs.content.extents(ino)) == 1
    unchanged(fs, errno.ENOSPC, lambda: create_ram(fs, ROOT, b"more", 2 * BLOCK, 0o600, ME))
    ino = create_ram(fs, ROOT, b"more", 2 * BLOCK, 0o600, ME, fragmented=True)
    assert len(fs.content.extents(ino)) == 2
    unchanged(fs, errno.ENOSPC, lambda: create_ram(fs, ROOT, b"big", 64 * MiB, 0o600, ME, fragmented=True))
    unchanged(fs, errno.ENOSPC, lambda: create_ram(fs, ROOT, b"huge", 1 << 40, 0o600, ME, fragmented=True))


def test_ram_that_is_refused() -> None:
    fs = new_fs()
    mkfile(fs, b"there")
    tenant = mkdir(fs, b"tenant")
    fs.quotas.set(tenant, BLOCK + 65536)
    for number, parent, name, size in (
        (errno.EEXIST, ROOT, b"there", BLOCK),
        (errno.EINVAL, ROOT, b"ram", 0),
        (errno.EINVAL, ROOT, b"ram", 4097),
        (errno.EFBIG, ROOT, b"ram", 1 << 50),
        (errno.ENAMETOOLONG, ROOT, b"x" * 256, BLOCK),
        (errno.EINVAL, ROOT, b"a/b", BLOCK),
        (errno.ENOTDIR, fs.resolve(b"there"), b"ram", BLOCK),
        (errno.EPERM, fs.resolve(b"iommu"), b"ram", BLOCK),
        (errno.EDQUOT, tenant, b"ram", 2 * BLOCK),
    ):
        unchanged(fs, number, lambda parent=parent, name=name, size=size: create_ram(fs, parent, name, size, 0o600, ME))  # type: ignore[misc]
    create_ram(fs, tenant, b"ram", BLOCK, 0o600, ME)
    assert_sound(fs)
