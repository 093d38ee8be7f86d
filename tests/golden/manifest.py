"""What is in a mounted region, as data that can be compared: by system calls and the commands of an installation.

Uses nothing of pkernfs itself: the same questions are asked of the version that made an image and of the present one.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any


def manifest(mountpoint: Path, pkernfs: str) -> dict[str, Any]:
    """Everything below ``mountpoint``; ``pkernfs`` is the command to ask about quotas and page tables."""

    def ask(*words: str | Path) -> dict[str, Any]:
        done = subprocess.run([pkernfs, *words, "--json"], stdout=subprocess.PIPE, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    limits = ask("quota", mountpoint / "tenant")["quota"]
    return {
        "files": {name: entry(mountpoint / name) for name in names(mountpoint)},
        "quota": {key: limits[key] for key in ("limit", "used")},
        "domains": {one["name"]: domain(one) for one in ask("iommu", "list", mountpoint)["domains"]},
    }


def names(top: Path) -> list[str]:
    """Paths below ``top``, and "." for itself, sorted."""
    found = ["."]
    for folder, directories, files in os.walk(top):
        found += [os.path.relpath(os.path.join(folder, name), top) for name in directories + files]
    return sorted(found)


def entry(path: Path) -> dict[str, Any]:
    """What lstat(2), read(2), readlink(2) and getxattr(2) tell of a file."""
    facts = path.lstat()
    found: dict[str, Any] = {
        "mode": oct(facts.st_mode),
        "owner": [facts.st_uid, facts.st_gid],
        "nlink": facts.st_nlink,
        "size": facts.st_size,
        "ino": facts.st_ino,
    }
    if not may_change(path):
        found["mtime"] = facts.st_mtime_ns
    if stat.S_ISREG(facts.st_mode):
        found["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    elif stat.S_ISLNK(facts.st_mode):
        found["target"] = os.readlink(path)
    elif stat.S_ISCHR(facts.st_mode):
        found["device"] = [os.major(facts.st_rdev), os.minor(facts.st_rdev)]
    found["xattrs"] = {
        name: hashlib.sha256(os.getxattr(path, name, follow_symlinks=False)).hexdigest()[:16]
        for name in sorted(os.listxattr(path, follow_symlinks=False))
    }
    return found


def may_change(path: Path) -> bool:
    """Whether hardware may store into the file at any time: it shows the time of asking as its mtime."""
    return path.parent.name == "iommu" or path.name == "guest-ram"


def domain(facts: dict[str, Any]) -> dict[str, Any]:
    """What a domain maps, and who is attached to it."""
    return {
        **{key: facts[key] for key in ("format", "levels", "id")},
        "mappings": [
            {key: one[key] for key in ("iova", "length", "file", "offset", "access")} for one in facts["mappings"]
        ],
        "devices": [{key: one[key] for key in ("device", "persistent")} for one in facts["devices"]],
    }


def to_text(found: dict[str, Any]) -> str:
    """A manifest as JSON with a line for each file."""
    parts = [
        f"{json.dumps(key)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(part[name])}" for name in part)
        + "\n}"
        for key, part in found.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"
