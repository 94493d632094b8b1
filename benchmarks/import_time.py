"""`import arrakis_jax` against `import jax, flax.nnx`: median seconds of fresh processes.

python benchmarks/import_time.py [--json FILE]     (aim: a ratio of 1.3)
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from report import report

STATEMENTS = {"jax and flax": "import jax, flax.nnx", "arrakis_jax": "import arrakis_jax"}
REPEATS = 9


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def main(json_file: Annotated[Path | None, typer.Option("--json")] = None) -> None:
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(REPEATS + 1):  # the first fills the disk's cache
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    rows = [
        {"import": name, "seconds": value, "ratio": value / medians["jax and flax"]}
        for name, value in medians.items()
    ]
    report("import time", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
