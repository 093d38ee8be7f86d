"""Importing other packages without what they import and we never use.

pyfuse3 and crc32c ask importlib.metadata for their own version, which loads email, zipfile, csv and more; trio can TLS,
which loads OpenSSL.  Each process of a mount has its own copy of all that, and the first worker's time to load it is a
part of the time that mounting takes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

#: Loaded when something of them is used.
ON_DEMAND: Final = ("ssl", "hmac")


def _metadata() -> ModuleType:
    """What stands in for importlib.metadata: of no package the version is known."""
    made = ModuleType("importlib.metadata")
    made.PackageNotFoundError = ModuleNotFoundError  # type: ignore[attr-defined]
    made.version = lambda _: "unknown"  # type: ignore[attr-defined]
    return made


def _on_demand(name: str) -> ModuleType:
    """What stands in for a module.

    Not importlib.util.LazyLoader, whose module is loaded by the second ``import`` of it, which asks for its spec.
    """

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(name) is made:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    made = ModuleType(name)
    made.__getattr__ = get  # type: ignore[method-assign]
    return made


@contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported inside for the first time gets what stands in for modules that nobody has loaded yet."""
    made = {name: _on_demand(name) for name in ON_DEMAND} | {"importlib.metadata": _metadata()}
    made = {name: module for name, module in made.items() if name not in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in made.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
