"""The kernel's limits on cached and dirty pages of one mount: /sys/class/bdi/MAJOR:MINOR.

With the defaults (read_ahead_kb 128, strict_limit 1, max_ratio 1) a guest that writes to its mapped memory at random is
stopped at every few pages: 2 million random increments in 1.5 GiB took 98 s, with these values 0.4 s.
"""

import os

#: strict_limit is there from Linux 6.2 on ("mm: add knob /sys/class/bdi/<bdi>/strict_limit"); max_ratio counts without.
LIMITS = {"read_ahead_kb": 1024, "strict_limit": 0, "max_ratio": 100}


def tune(device: str) -> str:
    """Raise the limits of the mount ``device`` (MAJOR:MINOR); "", or in one line why that was not possible.

    A limit that this kernel does not have is none; one that cannot be raised does not keep the others as they are.
    """
    return raise_limits(f"/sys/class/bdi/{device}")


def raise_limits(folder: str) -> str:
    """``tune``, of the limits in ``folder``."""
    refused = ""
    try:
        present = os.listdir(folder)
    except OSError as error:
        present, refused = [], str(error.strerror)
    for name in filter(present.__contains__, LIMITS):
        try:
            with open(f"{folder}/{name}", "w", encoding="ascii") as file:
                file.write(str(LIMITS[name]))
        except OSError as error:
            refused = refused or str(error.strerror)
    return refused and (
        f"cannot raise the page cache limits in {folder} ({refused}): "
        "random writes to mapped files will be slow; mount as root with /sys writable"
    )
