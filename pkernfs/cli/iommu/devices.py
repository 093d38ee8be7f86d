"""pkernfs iommu attach, detach: which domain a device does DMA through."""

from __future__ import annotations

import argparse

from pkernfs.cli.iommu.arguments import add_domain, device, domain, existing
from pkernfs.cli.iommu.replies import reminder
from pkernfs.cli.parsers import Verb, add_json, add_mount
from pkernfs.cli.text import show
from pkernfs.errors import printable

ATTACH = """\
Let a device do DMA through a domain: its context entry (AMD: device table entry) points to the domain's tables.

  pkernfs iommu attach /mnt/pkernfs/iommu/dom-0 00:05.0
  pkernfs iommu attach /mnt/pkernfs/iommu/dom-0 0001:3b:00.1 --persistent

When a mount ends, in whatever way, the next one takes a device's entry away before it serves anything; one that was
attached with --persistent goes on doing DMA, and `attach` by its next owner claims it.  The device is named as lspci
does: [SEGMENT:]BUS:DEVICE.FUNCTION in hexadecimal.
"""


def _attach_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)
    parser.add_argument("device", metavar="DEVICE", help="[SEGMENT:]BUS:DEVICE.FUNCTION, as lspci has it")
    parser.add_argument("--persistent", action="store_true", help="it goes on doing DMA across a live update")
    add_json(parser)


def _attach(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    name = device(arguments.device)
    request = api.IommuAttach(device=name, persistent=arguments.persistent)
    result = client.ask(domain(arguments.domain), request)
    kept = ", persistent" * result.persistent
    line = f"{result.device}: {result.state} to {printable(result.domain)}, domain id {result.id}{kept}"
    show(arguments, result, [line])
    return 0


DETACH = """\
Take a device's context entry (AMD: device table entry) away: its DMA faults as soon as what hardware has cached of it
is invalidated.

  pkernfs iommu detach /mnt/pkernfs 00:05.0
"""


def _detach_arguments(parser: argparse.ArgumentParser) -> None:
    add_mount(parser)
    parser.add_argument("device", metavar="DEVICE", help="[SEGMENT:]BUS:DEVICE.FUNCTION, as lspci has it")
    add_json(parser)


def _detach(arguments: argparse.Namespace) -> int:
    from pkernfs import api, client

    name = device(arguments.device)
    path = existing(arguments.mount, "a path")
    result = client.ask(path, api.IommuDetach(device=name))
    show(arguments, result, [f"{result.device}: detached", *reminder(result.invalidations, path)])
    return 0


VERBS = {
    "attach": Verb(ATTACH, _attach_arguments, _attach),
    "detach": Verb(DETACH, _detach_arguments, _detach),
}
