"""The worker that waits to take over."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.mount.site import Site, wait_for


def has_imported(pid: int) -> bool:
    """Whether a worker has come to what it does after its imports: it makes a file for its stacks."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if "pkernfs-stacks" in os.readlink(fd):
                return True
    return False


def another_standby(site: Site, than: int) -> bool:
    """Whether there is a standby, and not this one."""
    return site.status()["standby"] not in (0, than)


def test_one_that_ends_is_replaced(site: Site) -> None:
    """Also after it was up; no takeover comes to one that is gone."""
    site.expected = re.compile("standby: (has ended|cannot start: .* has ended with signal SIGKILL)|takes over")
    for _ in range(2):
        wait_for(lambda: site.status()["standby"], "a standby")
        standby = site.status()["standby"]
        wait_for(partial(has_imported, standby), "its imports")
        os.kill(standby, signal.SIGKILL)
        wait_for(partial(another_standby, site, standby), "another standby")
    before = site.status()
    os.kill(before["worker"], signal.SIGKILL)
    wait_for(lambda: site.status()["takeovers"] == 1, "a takeover")
    assert site.status()["worker"] == before["standby"]
