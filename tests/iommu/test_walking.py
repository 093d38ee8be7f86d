"""A second process walks the tables all the time while they change: what stays is never wrong or missing."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkernfs.format import PAGE, GiB, MiB, Requester
from pkernfs.fs.mkfs import mkfs
from pkernfs.iommu import devices, domain, mapping, reclaim, replace
from pkernfs.region import open_region
from tests.core.support import ME, assert_sound, open_fs
from tests.iommu.stamped import stamp, stamped_file
from tests.iommu.watcher import Watcher

BASE = 1 << 40
DEVICE = Requester(0x28)
BLOCK = 2 * MiB
AT = GiB - 4 * MiB  #: IOVA of the file, across two tables of level 2
ROUNDS = 40
WALKS = 1000


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pkernfs-test-") as name:
        yield Path(name)


@pytest.mark.parametrize("form", ["vtd", "amd"])
def test_what_stays_while_all_else_changes(form: str, folder: Path) -> None:
    path = folder / "region"
    with path.open("wb") as file:
        file.truncate(64 * MiB)
    draw = random.Random(8)
    with open_region(str(path)) as region:
        mkfs(region, phys_base=BASE)
        fs = open_fs(region)
        ram, other = stamped_file(fs, b"ram", 8 * MiB), stamped_file(fs, b"other", 4 * MiB)
        ino = domain.create(fs, b"dom-0", form, 4, ME)
        devices.attach(fs, ino, DEVICE)
        mapping.map_file(fs, ino, AT, ram)
        # Of each leaf of 2 MiB the first and the last page, and some between; pages 100 to 130 come and go.
        pages = {block * 512 + page for block in range(4) for page in (0, 1, 99, 131, 511)}
        pages |= {page for page in draw.sample(range(2048), 20) if not 100 <= page % 512 <= 130}
        stays = [(AT + page * PAGE, stamp(ram, page)) for page in sorted(pages)]
        root = devices.root_table(fs, form, 0)
        with Watcher(folder / "shared", path, BASE, form, root, DEVICE, stays) as watcher:
            first = watcher.count
            rounds = 0
            while (rounds < ROUNDS or watcher.count < first + WALKS) and watcher.process.poll() is None:
                rounds += 1
                # Split a large leaf, and merge it again, both while it is walked.
                hole = draw.randrange(4) * 512 + draw.randrange(100, 120)
                count = draw.randrange(1, 11)
                mapping.unmap(fs, ino, AT + hole * PAGE, count * PAGE)
                # Beside it: the same tables, and tables of their own.
                beside = draw.choice((AT - BLOCK, AT + 8 * MiB, AT - 5 * PAGE, 7 << 40, 0))
                mapping.map_file(fs, ino, beside, other, 0, 4 * PAGE if beside == AT - 5 * PAGE else BLOCK)
                if draw.random() < 0.3:
                    replace.replace(fs, ino, draw.choice((1, 2, 3)))
                mapping.map_file(fs, ino, AT + hole * PAGE, ram, hole * PAGE, count * PAGE)
                mapping.unmap(fs, ino, beside, BLOCK if beside != AT - 5 * PAGE else 4 * PAGE)
                # What was given up may be used again when no walk goes on that can have seen it.
                watcher.wait(2)
                reclaim.acknowledge(fs)
        assert_sound(fs)
