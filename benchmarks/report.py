"""How a benchmark tells its figures: a table for people, and a JSON file with the versions."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def report(title: str, rows: list[dict[str, Any]], json_file: Path | None) -> None:
    """Prints the rows, and writes them with what they were measured on."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if json_file is not None:
        import jax

        about = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
        about |= {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
        content = {"benchmark": title, "versions": about, "rows": rows}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
