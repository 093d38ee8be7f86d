"""examples/api.md: what it shows of the Python API works, block by block."""

from __future__ import annotations

import re
from pathlib import Path

from pkernfs import api, client, vfio
from tests.mount.site import MiB, Site

PAGE = Path(__file__).parents[2] / "examples" / "api.md"


def test_the_examples(site: Site) -> None:
    with (site.mnt / "guest-ram").open("wb") as file:
        file.truncate(16 * MiB)
    text = PAGE.read_text()
    names: dict[str, object] = {"mnt": str(site.mnt)}
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) > 8
    for block in blocks:
        # Where a traceback names a line it is that of the page.
        lines = "\n" * (text[: block.start()].count("\n") + 1)
        exec(compile(lines + block[1], PAGE, "exec"), names)


def test_what_is_public_is_documented() -> None:
    """Every name of the API has a docstring, and the page or a docstring shows what it is for."""
    text = PAGE.read_text()
    for module in (client, vfio):
        for name in module.__all__:
            assert getattr(module, name).__doc__, f"{module.__name__}.{name}"
    for name in ("info", "file", "status", "quota", "ask"):
        assert f"client.{name}(" in text
    for verb in api.VERBS.values():
        assert verb.request.__doc__
        assert verb.reply is not api.Refusal
