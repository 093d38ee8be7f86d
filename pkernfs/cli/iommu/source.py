"""Where the verbs that look get their facts from: the server of a mount, or a region that is not mounted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkernfs.cli.arguments import region_and_path
from pkernfs.cli.iommu.arguments import existing
from pkernfs.cli.iommu.ask import ask
from pkernfs.cli.text import printable
from pkernfs.errors import UsageError

if TYPE_CHECKING:
    from pkernfs.fs.filesystem import Filesystem

Facts = dict[str, Any]


class Source:
    """A mount: each question goes to its server.  ``path`` is real, and a domain's where one was asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def list(self) -> Facts:
        """All domains."""
        return ask(self.path, "list")

    def root(self, form: str, segment: int) -> Facts:
        """The root table of a PCI segment, made when there is none yet."""
        return ask(self.path, "root", format=form, segment=segment)

    def walk(self, iova: int, device: str | None = None) -> Facts:
        """One translation, of a device or of the domain that ``path`` is."""
        return ask(self.path, "walk", iova=iova, **({} if device is None else {"device": device}))

    def audit(self) -> Facts:
        """The proof, and what contradicts it."""
        return ask(self.path, "audit")

    def ino(self) -> int:
        """The inode of the domain."""
        return os.stat(self.path).st_ino

    def file(self, ino: int) -> Facts:
        """The memory of a file, which need not have a name.  Raises PkernfsError."""
        from pkernfs.client import control

        return control(self.path, "file", ino=ino)


class Offline(Source):
    """A region, read anew for each question; ``path`` is the domain's in it."""

    def __init__(self, region: str, path: str) -> None:
        super().__init__(path)
        self.region = region

    def _use(self, use: Callable[[Filesystem], Any]) -> Any:
        from pkernfs.cli.offline import with_filesystem

        return with_filesystem(self.region, use)

    def list(self) -> Facts:
        from pkernfs.iommu import views

        found: Facts = self._use(views.list_all)
        return found

    def root(self, form: str, segment: int) -> Facts:
        from pkernfs.iommu import views

        found: Facts = self._use(lambda fs: views.root(fs, form, segment))
        return found

    def walk(self, iova: int, device: str | None = None) -> Facts:
        from pkernfs.iommu import pci, views

        if device is not None:
            requester = pci.parse(device)
            found: Facts = self._use(lambda fs: views.walk(fs, requester, None, iova))
        else:
            found = self._use(lambda fs: views.walk(fs, None, fs.resolve(os.fsencode(self.path)), iova))
        return found

    def audit(self) -> Facts:
        from pkernfs.iommu import views

        found: Facts = self._use(views.audit)
        return found

    def ino(self) -> int:
        found: int = self._use(lambda fs: fs.resolve(os.fsencode(self.path)))
        return found

    def file(self, ino: int) -> Facts:
        from pkernfs.fs.facts import file_facts

        found: Facts = self._use(lambda fs: file_facts(fs, ino))
        return found


def source(word: str, *, domain: bool = False) -> Source:
    """The source that a word names: a path in a mount, a region (mounted or not); with ``domain``, a domain in either.

    Raises UsageError, PkernfsError.
    """
    from pkernfs.client import mount_of
    from pkernfs.mountinfo import mountpoints_of

    what = "a domain" if domain else "a path"
    if mount_of(word) is not None:
        found = Source(existing(word, what, "pkernfs iommu create makes one" if domain else ""))
        if domain and not os.path.isfile(found.path):
            raise UsageError(f"{word}: expected a domain, MOUNT/iommu/NAME, or MOUNT DEVICE IOVA")
        return found
    region, path = region_and_path(word)
    if bool(path) != domain:
        raise UsageError(f"{word}: expected {'REGION:/iommu/NAME' if domain else 'MOUNT or REGION'}")
    for mountpoint in reversed(mountpoints_of(os.path.realpath(region))):
        try:
            os.statvfs(mountpoint)  # not stat: the kernel may know the answer to that
        except OSError:
            continue  # its servers were killed: nobody changes the region
        return source(os.path.join(mountpoint, path.lstrip("/")), domain=domain)
    return Offline(region, path)


def file_name(one: Facts) -> str:
    """The file of a mapping, for people."""
    return printable(one["file"]) if one["file"] is not None else f"inode {one['ino']}, without a name"
