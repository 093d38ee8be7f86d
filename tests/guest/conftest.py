"""What the tests with real guests share with the demonstration: they import it from examples/."""

import sys
from pathlib import Path

import pytest

from pkernfs.qemu.cmdline import find_qemu
from pkernfs.qemu.errors import QemuError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def images() -> Path:
    """Directory with the guest's kernel and initramfs; skips where there is no QEMU to boot them."""
    try:
        find_qemu()
    except QemuError as error:
        pytest.skip(str(error))
    from live_update import guest_images

    return guest_images()
