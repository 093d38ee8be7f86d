"""Whoever copies the mount table outside holds none of the tests' mounts."""

from __future__ import annotations

import os
import subprocess

from tests.mount.site import Site, wait_for


def test_a_copy_of_the_mount_table_holds_no_mount_of_a_test(site: Site) -> None:
    """Made by the process that started pytest: an ``unshare -m`` there, that runs before and after the umount."""
    outside = str(os.getppid())
    copy = ["nsenter", "--target", outside, "--mount", "unshare", "--mount", "sleep", "infinity"]
    with subprocess.Popen(copy) as sleeper:
        try:
            there = f"/proc/{sleeper.pid}/ns/mnt"
            known = {os.readlink(f"/proc/{pid}/ns/mnt") for pid in (outside, "self")}
            wait_for(lambda: os.readlink(there) not in known, "the copy")
            site.umount()
        finally:
            sleeper.kill()
