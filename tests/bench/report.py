"""What was measured, as one Markdown table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    label: str
    unit: str


class Report:
    """All figures, in the order in which rows and systems first appeared."""

    def __init__(self) -> None:
        self.samples: dict[Row, dict[str, list[float]]] = {}

    def add(self, label: str, unit: str, system: str, value: float) -> None:
        """Add the figure of one round."""
        self.samples.setdefault(Row(label, unit), {}).setdefault(system, []).append(value)

    def systems(self) -> list[str]:
        """Names of the systems: the columns."""
        return list(dict.fromkeys(name for row in self.samples.values() for name in row))

    def markdown(self) -> str:
        """Table of the medians, each with the least and the greatest figure where they are apart."""
        systems = self.systems()
        lines = ["| |" + "".join(f" {name} |" for name in systems), "|---|" + "---:|" * len(systems)]
        for row, columns in self.samples.items():
            cells = "".join(f" {cell(columns.get(name, []))} |" for name in systems)
            lines.append(f"| {row.label}, {row.unit} |{cells}")
        return "\n".join(lines)

    def json(self) -> str:
        """Every single figure, and the machine."""
        rows = [{"label": row.label, "unit": row.unit, "samples": columns} for row, columns in self.samples.items()]
        return json.dumps({"machine": machine(), "rows": rows}, indent=1)


def cell(samples: list[float]) -> str:
    """Return the median and, where they differ from it as printed, the extremes."""
    if not samples:
        return "-"
    middle, least, most = (short(value) for value in (statistics.median(samples), min(samples), max(samples)))
    return middle if least == middle == most else f"{middle} ({least}-{most})"


def short(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """Say what the figures were measured on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
