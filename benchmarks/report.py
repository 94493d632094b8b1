"""How figures are told: a JSON line each as they come, and tables at the end."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Figure = dict[str, Any]
PACKAGES = ("arrakis_jax", "jax", "jaxlib", "flax", "numpy", "transformers")


def measured_on() -> Figure:
    """Versions, device, and the processor with its cores and instructions for products."""
    import jax

    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "cores": cores(),
        **processor(),
    }


def processor() -> Figure:
    """The processor's name and, on Linux, its vector and matrix instructions."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {"processor": platform.processor()}
    about = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in file.read_text().splitlines()
        if ":" in line
    )
    known = [x for x in about.get("flags", "").split() if x.startswith(("avx", "amx"))]
    name = about.get("model name") or platform.processor()
    return {"processor": name, "instructions": known}


def cores() -> int | None:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Report:
    """Prints figures, one JSON line each, and keeps them for the tables."""

    def __init__(self, out: Path | None):
        self.figures: dict[str, list[Figure]] = {}
        self.columns: dict[str, tuple[str, ...]] = {}
        self.file = None if out is None else out.open("w")

    def add(self, benchmark: str, figures: Iterable[Figure], columns: tuple[str, ...] = ()) -> None:
        """All of a benchmark; its table has these columns alone, if there are any."""
        self.columns[benchmark] = columns
        for figure in figures:
            line = json.dumps({"benchmark": benchmark, **figure})
            print(line, flush=True)
            if self.file is not None:
                print(line, file=self.file, flush=True)
            self.figures.setdefault(benchmark, []).append(figure)

    def tables(self) -> None:
        """One for each benchmark; a column for every name that a figure has."""
        console = Console()
        console.width = max(console.width, 120)
        for benchmark, figures in self.figures.items():
            names = self.columns[benchmark] or list(dict.fromkeys(n for f in figures for n in f))
            table = Table(*(name.replace("_", " ") for name in names), title=benchmark)
            for figure in figures:
                row = [told(figure.get(name)) for name in names]
                if any(row):
                    table.add_row(*row)
            console.print(table)


def told(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
