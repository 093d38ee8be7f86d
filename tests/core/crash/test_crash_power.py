"""Power cuts: regions on a disk lose any of the words that were not flushed."""

import pytest
import trio

from pkernfs.fs.filesystem import Filesystem
from pkernfs.region import FLUSH, RecordingRegion
from tests.core.crash.operations import EVERY, OPERATIONS
from tests.core.crash.proof import Proof, prove_power_cuts, record
from tests.core.crash.states import image_of
from tests.core.support import open_fs

SHORT = [
    *[("small", name) for name in ("create", "mkdir", "symlink-long", "link", "unlink-big", "unlink-open", "rmdir")],
    *[("small", name) for name in ("rename-over-file", "rename-directory-up", "exchange-file-and-directory")],
    *[("small", name) for name in ("chmod", "xattr-large", "xattr-large-by-large", "xattr-remove-last")],
    *[("small", name) for name in ("grow-4097", "grow-5242880", "cut-100000", "cut-0", "cut-sparse-inside")],
    *[("small", name) for name in ("overwrite", "append-in-page", "append-behind-gap-in-block", "hole", "far-away")],
    *[
        ("tight", name)
        for name in ("create", "unlink-sparse", "xattr-large-by-large", "append-in-page", "append-pages")
    ],
    ("split", "create"),
    ("no-pages", "create"),
    ("last-page", "last-page-goes"),
    ("old-sequence", "create"),
]
WHILE_RECOVERING = [("small", "create"), ("small", "xattr-remove-last"), ("last-page", "last-page-goes")]


def ids(cases: list[tuple[str, str]]) -> list[str]:
    return ["-".join(case) for case in cases]


@pytest.mark.parametrize(("state", "name"), SHORT, ids=ids(SHORT))
def test_any_of_what_was_not_flushed_may_land(state: str, name: str) -> None:
    prove_power_cuts(state, name, subsets=1)


@pytest.mark.parametrize(("state", "name"), WHILE_RECOVERING, ids=ids(WHILE_RECOVERING))
def test_a_power_cut_while_recovering_from_a_power_cut_or_a_kill(state: str, name: str) -> None:
    prove_power_cuts(state, name, subsets=0, depth=1)


@pytest.mark.slow
@pytest.mark.parametrize(("state", "name"), EVERY, ids=ids(EVERY))
def test_any_of_what_was_not_flushed_may_land_in_many_ways(state: str, name: str) -> None:
    prove_power_cuts(state, name, subsets=8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("state", "name"), EVERY, ids=ids(EVERY))
def test_power_cuts_while_recovering(state: str, name: str) -> None:
    prove_power_cuts(state, name, subsets=1, depth=1)


@pytest.mark.parametrize("name", ["overwrite", "append-in-page"])
def test_content_is_lost_without_a_flush_and_there_with_one(name: str) -> None:
    """The medium of these tests does lose what was not flushed; fsync is what content needs."""
    operation = OPERATIONS[name]
    for flush, found in ((False, 0), (True, 1)):

        def run(fs: Filesystem, flush: bool = flush) -> None:
            operation.run(fs)
            if flush:
                fs.region.flush()

        recording = record(image_of("small"), [run], volatile=True)
        flushed = [n for n, store in enumerate(recording.log) if store is FLUSH]
        recording.region.apply(recording.log[: flushed[-1]] if flushed else [])
        assert Proof(recording, operation).judge("the power is cut") == found


@pytest.mark.parametrize("state", ["small", "tight"])
@pytest.mark.parametrize("name", ["rename-over-file", "chmod", "unlink-sparse"])
def test_a_medium_that_flushes_nothing_is_noticed(state: str, name: str) -> None:
    """As with nobarrier: nothing of a transaction that was committed in part is applied."""
    recording = record(image_of(state), [OPERATIONS[name].run])
    Proof(recording, OPERATIONS[name], refusal=True).committed_in_part(subsets=20)


@pytest.mark.parametrize("name", ["fsync", "fsyncdir"])
def test_fsync_flushes(name: str) -> None:
    from pkernfs.server.operations import Operations

    region = RecordingRegion(image=image_of("small"), volatile=True)
    fs = open_fs(region)
    ino = fs.resolve(b"big")
    fs.write(ino, 0, b"W" * 100)
    assert region.log[-1] is not FLUSH
    trio.run(getattr(Operations(fs, dict), name), ino, False)
    assert region.log[-1] is FLUSH
