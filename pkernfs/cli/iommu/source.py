"""Where the verbs that look get their facts from: the server of a mount, or a region that is not mounted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pkernfs.cli.arguments import region_and_path
from pkernfs.cli.iommu.arguments import existing
from pkernfs.errors import UsageError, printable
from pkernfs.format import Ino, Iova

if TYPE_CHECKING:
    from pkernfs import api
    from pkernfs.fs.filesystem import Filesystem
T = TypeVar("T")


class Source:
    """A mount: each question goes to its server.  ``path`` is real, and a domain's where one was asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def list(self) -> api.Domains:
        """All domains."""
        from pkernfs import api, client

        return client.ask(self.path, api.IommuList())

    def root(self, form: api.Format, segment: int) -> api.RootTable:
        """The root table of a PCI segment, made when there is none yet."""
        from pkernfs import api, client

        return client.ask(self.path, api.IommuRoot(format=form, segment=segment))

    def walk(self, iova: Iova, device: str | None = None) -> api.Walk:
        """One translation, of a device or of the domain that ``path`` is."""
        from pkernfs import api, client

        return client.ask(self.path, api.IommuWalk(iova=iova, device=device))

    def audit(self) -> api.Audited:
        """The proof, and what contradicts it."""
        from pkernfs import api, client

        return client.ask(self.path, api.IommuAudit())

    def ino(self) -> Ino:
        """The inode of the domain."""
        return Ino(os.stat(self.path).st_ino)

    def file(self, ino: Ino) -> api.FileInfo:
        """The memory of a file, which need not have a name.  Raises PkernfsError."""
        from pkernfs import api, client

        return client.ask(self.path, api.File(ino=ino))


class Offline(Source):
    """A region, read anew for each question; ``path`` is the domain's in it."""

    def __init__(self, region: str, path: str) -> None:
        super().__init__(path)
        self.region = region

    def _use(self, use: Callable[[Filesystem], T]) -> T:
        from pkernfs.cli.offline import with_filesystem

        return with_filesystem(self.region, use)

    def list(self) -> api.Domains:
        """All domains, as the server tells of them."""
        from pkernfs.iommu import names, views

        return self._use(lambda fs: names.at_once(fs, views.list_all(fs)))

    def root(self, form: api.Format, segment: int) -> api.RootTable:
        """The root table of a PCI segment.  Raises PkernfsError when there is none."""
        from pkernfs.iommu import views

        return self._use(lambda fs: views.root(fs, form, segment))

    def walk(self, iova: Iova, device: str | None = None) -> api.Walk:
        """One translation, of a device or of the domain that ``path`` is."""
        from pkernfs.iommu import names, pci
        from pkernfs.iommu.walk import walk, walk_device

        if device is not None:
            requester = pci.parse(device)
            return self._use(lambda fs: names.at_once(fs, walk_device(fs, requester, iova)))
        return self._use(lambda fs: names.at_once(fs, walk(fs, fs.resolve(os.fsencode(self.path)), iova)))

    def audit(self) -> api.Audited:
        """The proof, and what contradicts it."""
        from pkernfs.iommu import views

        return self._use(views.audit)

    def ino(self) -> Ino:
        """The inode of the domain."""
        return self._use(lambda fs: fs.resolve(os.fsencode(self.path)))

    def file(self, ino: Ino) -> api.FileInfo:
        """The memory of a file.  Raises PkernfsError."""
        from pkernfs.fs.facts import file_facts

        return self._use(lambda fs: file_facts(fs, ino))


def source(word: str, *, domain: bool = False) -> Source:
    """The source that a word names: a path in a mount, a region (mounted or not); with ``domain``, a domain in either.

    Raises UsageError, PkernfsError.
    """
    from pkernfs.client import mount_of
    from pkernfs.served import served

    what = "a domain" if domain else "a path"
    if mount_of(word) is not None:
        found = Source(existing(word, what, "pkernfs iommu create makes one" if domain else ""))
        if domain and not os.path.isfile(found.path):
            raise UsageError(f"{word}: expected a domain, MOUNT/iommu/NAME, or MOUNT DEVICE IOVA")
        return found
    region, path = region_and_path(word)
    if bool(path) != domain:
        raise UsageError(f"{word}: expected {'REGION:/iommu/NAME' if domain else 'MOUNT or REGION'}")
    keeper = served(os.path.realpath(region))
    for mount in keeper.here() if keeper else ():
        if mount.root == "/":
            return source(os.path.join(mount.mountpoint, path.lstrip("/")), domain=domain)
    if keeper and not domain:
        return Source(os.path.realpath(region))  # it is mounted in other mount namespaces only
    return Offline(region, path)


def file_name(one: api.DomainMapping | api.Walk) -> str:
    """The file of a mapping, for people."""
    return printable(one.file) if one.file is not None else f"inode {one.ino}, without a name"
