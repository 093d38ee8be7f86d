"""A mount of a user who is not root, with fusermount3: its server can be killed and replaced as root's can."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from tests.mount.site import PYTHON_FOR_ALL, ROOT, Site, run

UID = 1  # one that /etc/passwd knows everywhere

#: Run by root in a mount namespace of its own: a /dev/fuse that everybody may open, and the checkout where users can
#: read it.
SCRIPT = """
set -eu
home=$1 uid=$2 checkout=$3 prefix=$4 code=$5
mknod "$home/fuse" c 10 229
chmod 666 "$home/fuse"
mount --bind "$home/fuse" /dev/fuse
mkdir "$home/checkout" "$home/venv"
mount --bind "$checkout" "$home/checkout"
mount --bind "$prefix" "$home/venv"
export XDG_RUNTIME_DIR=$home PYTHONPATH=$home/checkout HOME=$home
cd "$home"
trap 'umount -q "$home/mnt" || true' EXIT
setpriv --reuid "$uid" --regid "$uid" --clear-groups "$home/venv/bin/python" -P -c "$code" "$home"
"""

PROGRAM = """
import json, os, subprocess, sys, time
home = sys.argv[1]
mnt = home + "/mnt"
programs = home + "/venv/bin/"

def pkernfs(*arguments):
    return subprocess.run([sys.executable, "-P", "-c", "import sys; from pkernfs.cli import main; sys.exit(main())",
                           *arguments], check=True, capture_output=True, text=True).stdout

def command(name, *arguments):
    code = f"import sys; from pkernfs.cli import {name}; sys.exit({name}())"
    subprocess.run([sys.executable, "-P", "-c", code, *arguments], check=True)

def status():
    return json.loads(pkernfs("status", "--json", mnt))

def wait(condition):
    end = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

command("main_mkfs", "--size", "64M", "--quiet", home + "/region")
command("main_mount", home + "/region", mnt, "-o", f"log={home}/log")
block = os.urandom(1 << 20)
with open(mnt + "/f", "w+b", buffering=0) as file:
    for number in range(4):
        before = status()
        os.kill(before["worker"], 9)
        assert file.write(block) == len(block)
        os.mkdir(f"{mnt}/d{number}")
        os.rename(f"{mnt}/d{number}", f"{mnt}/e{number}")
        wait(lambda: status()["takeovers"] == number + 1)
    file.seek(0)
    assert file.read() == 4 * block
    os.fsync(file.fileno())
assert sorted(os.listdir(mnt)) == ["e0", "e1", "e2", "e3", "f", "iommu"]
pkernfs("upgrade", "--probation", "0.1", mnt)
pkernfs("upgrade", "--keeper", mnt)
before = status()
os.kill(before["keeper"], 9)
wait(lambda: status()["keeper"] != before["keeper"])
os.kill(status()["worker"], 9)
with open(mnt + "/f", "rb") as file:
    assert file.read() == 4 * block
subprocess.run(["fusermount3", "-u", mnt], check=True)
command("main_mount", home + "/region", mnt, "-o", f"log={home}/log")
assert os.path.getsize(mnt + "/f") == 4 << 20
os.kill(status()["keeper"], 15)
wait(lambda: not os.path.ismount(mnt))
print("done")
"""


@PYTHON_FOR_ALL
@pytest.mark.skipif(not shutil.which("fusermount3"), reason="needs fusermount3")
def test_takeovers_and_upgrades_of_a_users_mount(unmounted: Site) -> None:
    home = unmounted.tmp / "home"
    (home / "mnt").mkdir(parents=True)
    for path in (home, home / "mnt"):
        os.chown(path, UID, UID)
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", SCRIPT, "bash"]
    result = run(*command, home, str(UID), ROOT, sys.prefix, PROGRAM)
    log = (home / "log").read_text() if (home / "log").exists() else ""
    assert (result.returncode, result.stdout) == (0, "done\n"), (result, log)
