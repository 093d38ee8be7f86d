"""A real Linux guest lives through the death of QEMU and of every pkernfs process, five times in a row."""

import contextlib
import os
from pathlib import Path

import pytest
from live_update import MODES, LiveUpdate, Report
from mounted import Mounted

from pkernfs import client
from pkernfs.qemu.console import parse

pytestmark = [pytest.mark.guest, pytest.mark.mount, pytest.mark.timeout(600)]

MIB = 1 << 20
RESTARTS = 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting without fusermount3 needs root")
@pytest.mark.parametrize("mode", MODES)
def test_guest_goes_on_through_five_restarts(
    mode: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = Path(f"/dev/shm/pkernfs-test-guest-{os.getpid()}-{mode}")
    mounted = Mounted(region, tmp_path / "mnt", tmp_path / "log")
    with contextlib.ExitStack() as stack:
        stack.callback(mounted.close)
        mounted.make("512M")
        mounted.mount()
        update = LiveUpdate(mounted, mode, 256 * MIB, images, Report())
        stack.callback(update.close)
        update.boot()
        quit_guest = update.guest.quit

        def quit_and_try_to_remove() -> None:
            """A saved guest, which nobody maps, is not removed by mistake."""
            quit_guest()
            for path in (update.ram, update.state):
                with pytest.raises(PermissionError):
                    path.unlink()

        monkeypatch.setattr(update.guest, "quit", quit_and_try_to_remove)
        for _ in range(RESTARTS):
            update.restart()
        assert [client.file(str(path)).held for path in (update.ram, update.state)] == [None, None]

        # restart() has checked each step; this is the guest's own account of all of it.
        beats = list(parse(update.guest.console.text()))
        assert len({beat.boot_id for beat in beats}) == 1
        assert [beat.tick for beat in beats] == list(range(1, len(beats) + 1))
    assert not region.exists()
    assert not mounted.is_mounted()
    assert mounted.servers() == []
