"""Regions in files: locks, refusals, read-only use, giving memory back, the end of the host's memory."""

import errno
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from pkernfs.errors import CorruptError, FormatError, FsError, PkernfsError, RegionBusyError, RegionError
from pkernfs.format import BLOCK, MAGIC, PAGE, SUPERBLOCK, Superblock
from pkernfs.fs.attributes import SetAttr
from pkernfs.fs.mkfs import mkfs
from pkernfs.iommu.guard import open_filesystem
from pkernfs.processes import lock_holder
from pkernfs.region import (
    DaxRegion,
    FileRegion,
    MemoryRegion,
    RecordingRegion,
    copies_of,
    open_region,
    read_superblock,
    superblock,
)
from pkernfs.region.base import ZERO_CHUNK
from pkernfs.region.superblock import encode_superblock
from tests.core.conftest import HOLD
from tests.core.support import (
    ROOT,
    MiB,
    assert_sound,
    content,
    digest,
    fails,
    mkfile,
    new_fs,
    open_fs,
    sparse_file,
    tree,
    unchanged,
)


def one_line(error: PkernfsError) -> bool:
    return bool(str(error)) and "\n" not in str(error)


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_region_keeps_what_was_stored(made: str) -> None:
    with open_region(made) as region:
        assert region.kind == ("tmpfs" if made.startswith("/dev/shm") else "file")
        assert region.volatile == (region.kind == "file")
        assert (region.size, region.path, region.readonly) == (32 * MiB, made, False)
        fs = open_fs(region)
        assert content(fs, fs.resolve(b"f")) == b"content"
        fs.write(fs.resolve(b"f"), 0, b"CON")
        assert_sound(fs)
    with open_region(made, readonly=True) as region:
        fs = open_fs(region)
        assert content(fs, fs.resolve(b"f")) == b"CONtent"


def test_the_lock_names_its_holder(made: str, hold: Callable[..., subprocess.Popen[str]]) -> None:
    assert lock_holder(made) is None
    holder = hold(made)
    found = lock_holder(made)
    assert found
    assert (found.pid, found.command.split()[0]) == (holder.pid, os.path.basename(sys.executable))
    before = digest(made)
    for readonly in (False, True):
        with pytest.raises(RegionBusyError, match=rf"in use by process {holder.pid}, python") as caught:
            open_region(made, readonly=readonly)
        assert one_line(caught.value)
        assert caught.value.errno == errno.EBUSY
    # Without the lock it can be looked at.
    with open_region(made, readonly=True, locked=False) as region:
        assert read_superblock(region).magic == MAGIC
    assert digest(made) == before
    holder.communicate("")
    assert lock_holder(made) is None
    with open_region(made):
        pass


def test_readers_share_and_keep_writers_out(made: str, hold: Callable[..., subprocess.Popen[str]]) -> None:
    reader = hold(made, "readonly")
    with open_region(made, readonly=True), pytest.raises(RegionBusyError, match=f"process {reader.pid}"):
        open_region(made)


def test_one_process_does_not_open_a_region_twice(made: str) -> None:
    with open_region(made), pytest.raises(RegionBusyError, match="another process"):
        open_region(made)


def test_a_killed_holder_leaves_no_lock(made: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, made, "writable"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout
    process.stdout.readline()
    process.kill()
    process.communicate()
    with open_region(made):
        pass


def test_a_failed_open_leaves_no_lock_and_no_descriptor(made: str) -> None:
    os.truncate(made, 32 * MiB + 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FormatError):
            open_region(made)
    assert len(os.listdir("/proc/self/fd")) == before


# -- what is not a region ---------------------------------------------------------------------------------------------


def test_paths_that_are_no_regions(tmp_path: Path) -> None:
    for what, path in {
        "no such region": tmp_path / "missing",
        "expected a file or a device-DAX device, found a directory": tmp_path,
        "expected a device-DAX device, found one of the subsystem mem": Path("/dev/null"),
    }.items():
        with pytest.raises(RegionError, match=what) as caught:
            open_region(str(path))
        assert one_line(caught.value)


@pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK, 4 * BLOCK - 1, 4 * BLOCK + 4096, 32 * MiB + 1])
def test_sizes_that_no_region_has(path: str, size: int) -> None:
    sparse_file(path, size)
    for readonly in (False, True):
        with pytest.raises(FormatError, match=f"expected a multiple of 2 MiB, at least 8 MiB, found {size} bytes") as c:
            open_region(path, readonly=readonly)
        assert one_line(c.value)
    assert os.stat(path).st_size == size


def with_checksum(**fields: Any) -> Callable[[Superblock], bytes]:
    return lambda sb: encode_superblock(sb._replace(**fields))


def as_it_is(**fields: Any) -> Callable[[Superblock], bytes]:
    return lambda sb: SUPERBLOCK.pack(sb._replace(**fields))


SUPERBLOCKS: dict[str, tuple[str, Callable[[Superblock], bytes]]] = {
    "zeros": ("expected magic 0x706b65726e6673, found zeros", lambda sb: bytes(256)),
    "other-data": ("expected magic 0x706b65726e6673, found magic 0x4141414141414141", lambda sb: b"A" * 256),
    "magic": ("found magic 0x1", as_it_is(magic=1)),
    "version": ("expected format version 1, found 2", with_checksum(version=2)),
    "checksum": ("superblock checksum: expected 0x[0-9a-f]{8}, found 0x00000005", as_it_is(checksum=5)),
    "any-bit": ("superblock checksum", lambda sb: SUPERBLOCK.pack(sb)[:100] + b"!" + SUPERBLOCK.pack(sb)[101:]),
    "incompatible-feature": ("unknown incompatible features 0x8", with_checksum(incompat=8)),
    "read-only-feature": ("features 0x40 allow reading only", with_checksum(ro_compat=0x40)),
    "block-size": (
        "expected blocks/pages/inodes of 2097152/4096/256 bytes, found 4096/4096/256",
        with_checksum(block_size=4096),
    ),
    "too-few-blocks": ("expected 4 to 2147483648 blocks, found 3", with_checksum(blocks=3)),
    "too-many-blocks": ("expected 4 to 2147483648 blocks, found 2147483649", with_checksum(blocks=(1 << 31) + 1)),
    "longer-than-the-file": (
        "the region is truncated: expected 35651584 bytes, found 33554432",
        with_checksum(blocks=17),
    ),
    "geometry": ("expected table_pages/journal_offset/first_block 1/0x200000/", with_checksum(first_block=9)),
}


@pytest.mark.parametrize(("what", "raw"), SUPERBLOCKS.values(), ids=SUPERBLOCKS)
def test_superblocks_that_are_refused(made: str, what: str, raw: Callable[[Superblock], bytes]) -> None:
    with open_region(made) as region:
        region.store(0, raw(read_superblock(region)))
    before = digest(made)
    with open_region(made) as region:
        with pytest.raises(FormatError, match=what) as caught:
            open_filesystem(region)
        assert one_line(caught.value)
        assert str(caught.value).startswith(f"{made}: ")
    assert digest(made) == before


def test_a_read_only_feature_can_be_read(made: str) -> None:
    with open_region(made) as region:
        region.store(0, with_checksum(ro_compat=0x40, compat=2)(read_superblock(region)))
    with open_region(made, readonly=True) as region:
        assert open_filesystem(region).resolve(b"f")


def test_a_crash_while_a_feature_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every store: it opens, has the features that it says it has, and all copies agree."""
    monkeypatch.setattr(superblock, "RO_COMPAT_KNOWN", 7)
    fs = new_fs(32, RecordingRegion)
    region = cast(RecordingRegion, fs.region)
    assert fs.volume.sb.ro_compat == 1
    before = bytes(region.view)
    region.log.clear()
    fs.volume.enable(6)
    assert fs.volume.sb.ro_compat == 7
    log = list(region.log)
    assert len(log) == 6
    assert all(store.word for store in log)
    for count in range(len(log) + 1):
        cut = RecordingRegion(image=before)
        for store in log[:count]:
            cut.store(store.offset, store.data)
        assert read_superblock(cut).ro_compat == (7 if count else 1)
        again = open_fs(cut)
        assert_sound(again)
        raw = [cut.read(at, 192) for at in (0, *copies_of(again.volume.sb))]
        assert raw == [encode_superblock(again.volume.sb)[:192]] * len(raw)


def test_a_truncated_file(made: str) -> None:
    os.truncate(made, 30 * MiB)
    with (
        open_region(made) as region,
        pytest.raises(FormatError, match="truncated: expected 33554432 bytes, found 31457280"),
    ):
        open_filesystem(region)
    assert os.stat(made).st_size == 30 * MiB


def test_a_longer_file_is_fine(made: str) -> None:
    os.truncate(made, 64 * MiB)
    with open_region(made) as region:
        fs = open_fs(region)
        assert fs.volume.sb.blocks == 16
        assert_sound(fs)


# -- read-only --------------------------------------------------------------------------------------------------------


def test_reading_writes_nothing(made: str) -> None:
    """Not even where the journal must be replayed: that happens in memory."""
    with open_region(made) as region:
        fs = open_fs(region)
        journal = fs.volume.journal
        mkfile(fs, b"new", b"x")
        journal_at = journal.header_at
        region.store_word(journal_at, region.word(journal_at) + 1 - 2)
        region.store_word(journal_at, 2 * journal.sequence + 1)
    before, times = digest(made), os.stat(made)
    with open_region(made, readonly=True) as region:
        fs = open_fs(region)
        assert fs.volume.recovered
        tree(fs)
        with fails(errno.EROFS):
            mkfile(fs, b"more")
        fs.close()
    assert digest(made) == before
    assert os.stat(made).st_mtime_ns == times.st_mtime_ns
    with open_region(made) as region:
        assert open_fs(region).volume.recovered
        assert_sound(open_fs(region))


def test_a_damaged_journal_is_not_applied(made: str) -> None:
    with open_region(made) as region:
        fs = open_fs(region)
        at = fs.volume.journal.header_at
        region.store_word(at, region.word(at) + 1)
        region.store(at + 4096, b"damage")
    before = digest(made)
    with open_region(made) as region, pytest.raises(CorruptError, match="the journal"):
        open_filesystem(region)
    assert digest(made) == before


# -- memory -----------------------------------------------------------------------------------------------------------


def used(path: str) -> int:
    """Bytes of memory behind the file."""
    return os.stat(path).st_blocks * 512


def test_memory_is_reserved_and_given_back(made: str) -> None:
    empty = used(made)
    with open_region(made) as region:
        fs = open_fs(region)
        ino = mkfile(fs, b"ram")
        fs.setattr(ino, SetAttr(size=16 * MiB))
        assert used(made) >= empty + 16 * MiB
        fs.write(ino, 0, b"\xff" * (4 * MiB))
        fs.setattr(ino, SetAttr(size=2 * MiB))
        assert used(made) <= empty + 4 * MiB
        fs.unlink(ROOT, b"ram")
        assert used(made) <= empty + MiB
        assert_sound(fs)
    # A region made anew has given everything back.
    with open_region(made) as region:
        region.store(10 * MiB, b"\xff" * MiB)
        mkfs(region)
    assert used(made) <= empty + MiB


@pytest.mark.parametrize("length", [PAGE, MiB], ids=["little", "much"])
def test_what_is_present_is_in_the_page_table(made: str, length: int) -> None:
    """Whoever looks at it afterwards meets no page fault."""
    with open(made, "r+b") as file:
        file.seek(16 * MiB)
        file.write(b"x" * length)
    with open_region(made) as region:
        for again in (False, True):
            if again:
                region.reserve(16 * MiB, 2 * MiB)
            view = region.present(16 * MiB, length)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            assert any(view[::PAGE]) is not again
            assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 8


def test_reserved_memory_is_zero(made: str) -> None:
    with open_region(made) as region:
        region.store(20 * MiB, b"\xff" * (4 * MiB))
        region.reserve(20 * MiB, 2 * MiB)
        assert not any(region.read(20 * MiB, 2 * MiB))
        assert region.read(22 * MiB, 4) == b"\xff" * 4
        region.store(20 * MiB, b"\xff" * MiB)
        region.zero(20 * MiB, MiB)
        assert not any(region.read(20 * MiB, MiB))
        region.flush()


@pytest.fixture
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A filesystem that is mounted for the test: parameters (type, options)."""
    kind, options = request.param
    done = subprocess.run(
        ["mount", "-t", kind, "-o", options, "none", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount {kind}: {done.stderr.strip()}")
    yield str(tmp_path)
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.mount
@pytest.mark.parametrize("mounted", [("tmpfs", "size=16m")], indirect=True)
def test_a_host_without_memory_is_no_space_and_no_sigbus(mounted: str) -> None:
    """A region of 64 MiB on a tmpfs of 16 MiB."""
    path = f"{mounted}/region"
    sparse_file(path, 64 * MiB)
    with open_region(path) as region:
        mkfs(region)
        fs = open_fs(region)
        ino = mkfile(fs, b"f", b"x")
        assert fs.statfs().free * 4096 > 32 * MiB
        before = used(path)
        unchanged(fs, errno.ENOSPC, lambda: fs.setattr(ino, SetAttr(size=32 * MiB)))
        assert used(path) <= before, "what was reserved in vain goes back"
        done = 0
        with fails(errno.ENOSPC):
            while True:
                done += fs.write(ino, done, b"y" * MiB)
        assert 4 * MiB < done < 16 * MiB
        assert content(fs, ino) == b"y" * done
        # What needs no memory goes on.
        fs.setattr(ino, SetAttr(mode=0o600, uid=7))
        assert_sound(fs)
        fs.unlink(ROOT, b"f")
        fs.setattr(mkfile(fs, b"g"), SetAttr(size=4 * MiB))
        assert_sound(fs)


@pytest.mark.mount
@pytest.mark.parametrize("mounted", [("tmpfs", "size=4m")], indirect=True)
def test_mkfs_on_a_host_without_memory(mounted: str) -> None:
    path = f"{mounted}/region"
    sparse_file(path, 4096 * MiB)
    with open_region(path) as region, fails(errno.ENOSPC):
        mkfs(region)
    with open_region(path, readonly=True) as region, pytest.raises(FormatError, match="found zeros"):
        read_superblock(region)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """40 MiB of huge pages."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    try:
        before = int(setting.read_text())
        setting.write_text("20")
        if int(setting.read_text()) < 20:
            setting.write_text(str(before))
            pytest.skip(f"the kernel gave {setting.read_text().strip()} of 20 huge pages")
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    yield
    setting.write_text(str(before))


@pytest.mark.mount
@pytest.mark.serial
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("mounted", [("hugetlbfs", "pagesize=2M")], indirect=True)
def test_a_region_of_huge_pages(mounted: str) -> None:
    path = f"{mounted}/region"
    sparse_file(path, 64 * MiB)
    # More than there are: a sparse region, whose pages are not set aside by mapping it.
    with open_region(path) as region:
        mkfs(region)
        fs = open_fs(region)
        ino = mkfile(fs, b"ram")
        fs.setattr(ino, SetAttr(size=16 * MiB))
        unchanged(fs, errno.ENOSPC, lambda: fs.setattr(ino, SetAttr(size=50 * MiB)))
        fs.unlink(ROOT, b"ram")
    os.unlink(path)
    sparse_file(path, 32 * MiB)
    with open_region(path) as region:
        assert (region.kind, region.volatile) == ("hugetlbfs", False)
        mkfs(region)
        fs = open_fs(region)
        small = mkfile(fs, b"small", b"content")
        ino = mkfile(fs, b"ram")
        fs.setattr(ino, SetAttr(size=16 * MiB))
        fs.write(ino, 5 * MiB, b"x" * MiB)
        empty = used(path)
        unchanged(fs, errno.ENOSPC, lambda: fs.setattr(small, SetAttr(size=24 * MiB)))
        fs.unlink(ROOT, b"ram")
        assert used(path) <= empty - 16 * MiB
        fs.setattr(small, SetAttr(size=16 * MiB))
        assert content(fs, small) == b"content".ljust(16 * MiB, b"\0")
        assert_sound(fs)
    with open_region(path, readonly=True) as region:
        fs = open_fs(region)
        assert content(fs, fs.resolve(b"small"))[:7] == b"content"


# -- twins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MemoryRegion, RecordingRegion])
def test_a_region_in_memory(kind: type[MemoryRegion]) -> None:
    region = kind(8 * MiB)
    region.store(100, b"abc")
    region.store_word(4096, 0x0123456789ABCDEF)
    assert region.read(99, 5) == b"\0abc\0"
    assert region.read(4096, 8) == bytes.fromhex("efcdab8967452301")
    assert region.word(4096) == 0x0123456789ABCDEF
    region.zero(0, 4096)
    region.discard(4096, 4096)
    assert not any(region.view)
    region.store(MiB, b"\xff" * (3 * MiB))
    region.reserve(MiB, 3 * MiB)
    assert not any(region.view)
    again = kind(image=region.view)
    assert again.size == region.size
    with kind(8 * MiB) as closed:
        closed.flush()


def test_a_recording_can_be_replayed() -> None:
    region = RecordingRegion(16 * MiB)
    mkfs(region)
    fs = open_fs(region)
    mkfile(fs, b"f", b"x" * (3 * MiB))
    fs.unlink(ROOT, b"f")
    twin = MemoryRegion(16 * MiB)
    for store in region.log:
        assert not store.word or (len(store.data) == 8 and store.offset % 8 == 0)
        twin.store(store.offset, store.data)
    assert bytes(twin.view) == bytes(region.view)
    assert len(ZERO_CHUNK) == MiB


def test_dax_is_for_devices_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises((RegionError, FormatError)):
        DaxRegion(str(path))
    assert issubclass(DaxRegion, FileRegion)
    with suppress(RegionError):
        open_region("/dev/zero")


# -- a medium that fails ----------------------------------------------------------------------------------------------


class FailingMap:
    """A mapping whose msync fails."""

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


def test_after_a_flush_that_failed_nothing_is_written(tmp_path: Path) -> None:
    path = str(tmp_path / "region")
    sparse_file(path, 16 * MiB)
    with open_region(path) as region:
        if not region.volatile:
            pytest.skip("the folder of the tests is not on a disk")
        mkfs(region)
        fs = open_fs(region)
        real, region._map = region._map, cast(mmap.mmap, FailingMap())
        with pytest.raises(FsError, match="the medium failed, reading only from now on") as caught:
            region.flush()
        assert caught.value.errno == errno.EIO
        with fails(errno.EROFS):
            mkfile(fs, b"new")
        assert [entry.name for entry in fs.readdir(ROOT)] == [b"iommu"]
        region._map = real


class WearyRegion(MemoryRegion):
    """A medium with barriers that fails for good after ``left`` flushes."""

    barriers = True
    left = 100

    def flush(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.readonly = True
            raise FsError(errno.EIO, "the medium failed")


@pytest.mark.parametrize("left", range(4))
def test_a_commit_on_a_medium_that_fails(left: int) -> None:
    """The call fails, and the next mount finds the state before it or, once it was sealed, after it."""
    region = WearyRegion(16 * MiB)
    mkfs(region)
    fs = open_fs(region)
    region.left = left
    with fails(errno.EIO):
        mkfile(fs, b"new")
    with fails(errno.EROFS):
        mkfile(fs, b"later")
    fs = open_fs(MemoryRegion(image=region.view))
    assert_sound(fs)
    assert [entry.name for entry in fs.readdir(ROOT) if entry.name != b"iommu"] == [b"new"] * (left > 1)
