"""The table of verbs in api.py says what the worker and the keeper answer: no verb more, none less."""

from pkernfs import api
from pkernfs.fs.filesystem import Filesystem
from pkernfs.server.iommu import OPERATIONS
from pkernfs.server.keeper import Keeper
from pkernfs.server.operations import Operations
from pkernfs.server.verbs import verbs


def of(server: api.Server) -> set[type]:
    return {verb.request for verb in api.VERBS.values() if verb.server is server}


def test_the_worker(fs: Filesystem) -> None:
    handlers = verbs(Operations(fs, dict), "0:45", lambda _: None, lambda _, __: None)
    assert set(handlers) == of(api.Server.WORKER)
    assert {*OPERATIONS, api.IommuAudit} == {verb for verb in handlers if verb.__name__.startswith("Iommu")}


def test_the_keeper() -> None:
    handlers = Keeper.__new__(Keeper).handlers()  # of no mount: they are not called
    assert {*handlers, api.GetStatus} == of(api.Server.KEEPER)
