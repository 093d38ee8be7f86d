"""Names of PCI functions, as lspci(8) prints them: 0000:00:05.0.

A requester is what the IOMMU knows a function by: PCI segment << 16 | bus << 8 | device << 3 | function.
"""

import re

from pkernfs.errors import UsageError, quoted
from pkernfs.format import Requester

FORM = re.compile(r"(?:([0-9a-f]{1,4}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-9a-f])", re.IGNORECASE)


def parse(word: str) -> Requester:
    """The requester that ``[SSSS:]BB:DD.F``, all hexadecimal, names.  Raises UsageError."""
    match = FORM.fullmatch(word)
    segment, bus, device, function = (int(part or "0", 16) for part in match.groups()) if match else (0, 0, 32, 8)
    if device > 0x1F or function > 7:
        raise UsageError(
            f"{quoted(word)}: expected a device as lspci prints it, [SSSS:]BB:DD.F in hexadecimal, such as 00:05.0",
            hint="device at most 1f, function at most 7",
        )
    return Requester(segment << 16 | bus << 8 | device << 3 | function)


def text(requester: Requester) -> str:
    """The name of a requester, with its segment: 0000:00:05.0."""
    return f"{requester >> 16:04x}:{requester >> 8 & 0xFF:02x}:{requester >> 3 & 0x1F:02x}.{requester & 7}"
