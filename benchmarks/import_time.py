"""`import arrakis_jax` against `import jax, flax.nnx`: median seconds of fresh processes."""

import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

STATEMENTS = {"jax and flax": "import jax, flax.nnx", "arrakis_jax": "import arrakis_jax"}
REPEATS = 7


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(REPEATS + 1):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    table = Table("import", "seconds", "ratio", title="Import time (aim: 1.3)")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}", f"{value / medians['jax and flax']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
