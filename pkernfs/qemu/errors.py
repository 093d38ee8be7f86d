"""The error of this package."""

from pkernfs.errors import PkernfsError


class QemuError(PkernfsError):
    """A QEMU, or a guest in it, did not do what was asked."""

    def __init__(self, expected: str, found: str, hint: str) -> None:
        super().__init__(f"expected {expected}, found {found}", hint=hint)
        self.expected = expected  #: what should have been, as in "a QEMU >= 8.2"
        self.found = found  #: what was there instead

    def __reduce__(self) -> tuple[type["QemuError"], tuple[str, str, str]]:
        return QemuError, (self.expected, self.found, self.hint)
